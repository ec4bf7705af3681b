"""The packages that this project needs, and those that it can use: versions against pyproject.toml, and whether they
can be imported at all."""

from __future__ import annotations

from llava.doctor.children import imports
from llava.doctor.rows import BROKEN, MISSING, OK, Row
from llava.doctor.versions import Wanted, fits, installed, module_of

PURPOSE = {  # of what is not needed
    "deepspeed": "ZeRO, offloading",
    "peft": "LoRA",
    "wandb": "report_to wandb",
    "tensorboard": "report_to tensorboard",
    "pyarrow": "Arrow and Parquet data, token lengths that are kept",
    "bitsandbytes": "QLoRA (bits 4 and 8), CUDA",
    "av": "videos",
    "liger-kernel": "use_liger_kernel, CUDA",
    "timm": "encoders of timm",
    "torchvision": "encoders of timm; nothing else needs it",
    "scikit-learn": "the demo's data",
    "matplotlib": "report.png",
    "lmms-eval": "benchmarks (scripts/eval.sh)",
    "pytest": "the tests",
    "pytest-xdist": "scripts/test.sh",
    "ruff": "scripts/test.sh",
    "hypothesis": "the tests",
}
OWN_ENVIRONMENT = ("timm", "lmms-eval")  # extras that bring a torch along
PINNED_FOR = {"filelock": "lmms-eval"}  # packages named for another's sake alone
NOT_IMPORTED = ("lmms-eval", "ruff", "pytest", "pytest-xdist", "hypothesis", "liger-kernel")  # slow, or no library


def package_rows(want: Wanted, seconds: float) -> list[Row]:
    """Of every package that pyproject.toml names, and tensorboard; the versions of those that are there."""
    needed = dict(want.needed) or dict.fromkeys(("torch", "transformers"), "")
    extras = {name: (spec, extra) for extra, specs in want.extras.items() for name, spec in specs.items()}
    extras = {"tensorboard": ("", "")} | {name: entry for name, entry in extras.items() if name not in needed}
    there = {name: installed(name) for name in (*needed, *extras)}
    extras = {name: entry for name, entry in extras.items() if there.get(PINNED_FOR.get(name), "none") is not None}
    tried = [name for name in there if there[name] is not None and name not in NOT_IMPORTED]
    faults = imports([module_of(name) for name in tried], seconds)
    rows = []
    for name, spec in needed.items():
        fault, todo = faults.get(module_of(name)), _install(want, f"{name}{spec}", "")
        rows.append(_row(name, there[name], spec, fault, todo, want.tested.get(name), needed=True))
    for name, (spec, extra) in extras.items():
        fault, todo = faults.get(module_of(name)), _install(want, f"{name}{spec}", extra)
        row = _row(name, there[name], spec, fault, todo, want.tested.get(name))
        if row.status == BROKEN and name == "torchvision":
            row.todo = "pip uninstall torchvision, or the one that fits this torch: transformers stumbles over it"
        if row.status in (MISSING, BROKEN) and name in PURPOSE:
            row.todo = f"{row.todo} (for {PURPOSE[name]})"
        rows.append(row)
    return rows


def _row(name, version, spec, fault, todo, tested, needed=False) -> Row:
    if version is None:
        return Row(name, MISSING, "not installed", todo, needed)
    expected = f" ({spec})" if spec else ""
    if version != "unknown" and not fits(version, spec):
        return Row(name, BROKEN, f"{version}, expected {spec}", todo, needed)
    if fault:
        return Row(name, BROKEN, f"{version}{expected} cannot be imported: {fault}", f"install it anew: {todo}", needed)
    if tested and version.split("+")[0] != tested:
        return Row(name, OK, f"{version}{expected}; tested with {tested}", needed=needed)
    return Row(name, OK, f"{version}{expected}", needed=needed)


def _install(want: Wanted, requirement: str, extra: str) -> str:
    if not want.checkout or requirement == "tensorboard":
        return f"pip install '{requirement}'"
    if extra in OWN_ENVIRONMENT:
        return f"pip install -e '.[{extra}]', in an environment of its own"
    place = f"'.[{extra}]'" if extra else "."
    return f"pip install -c constraints.txt -e {place}"
