"""Python, processor, memory, disk, the hub and the environment's variables; nothing is imported for it."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tempfile

from llava.doctor.rows import BROKEN, MISSING, NOTE, OK, Row, gibibytes
from llava.doctor.versions import ROOT, Wanted, fits

LITTLE_DISK, NO_DISK, LITTLE_SHM, LITTLE_MEMORY = 10 * 2**30, 2**29, 2**30, 3 * 2**30


def machine_rows(want: Wanted, output: str) -> list[Row]:
    """Of Python, the system, processors, memory and disks; `output` is where runs are to be written."""
    version = platform.python_version()
    right = fits(version, want.python)
    todo = (
        "" if right else f"use a Python {want.python}: PYTHON=... bash scripts/finetune.sh, or python3.11 -m venv .venv"
    )
    return [
        Row("Python", OK if right else BROKEN, f"{version} ({want.python})", todo, needed=True),
        Row("system", OK, f"{platform.system()} {platform.release()} {platform.machine()}, {_libc()}".rstrip(", ")),
        _processors(),
        _memory(),
        *_disks(output),
        _shared_memory(),
        _open_files(),
        _compiler(),
    ]


def _libc() -> str:
    return " ".join(platform.libc_ver()).strip()


def _processors() -> Row:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _words("/sys/fs/cgroup/cpu.max")
    limit = int(quota[0]) / int(quota[1]) if len(quota) == 2 and quota[0] != "max" else None
    name = re.search(r"model name\s*:\s*(.+)", _read("/proc/cpuinfo"))
    said = f"{usable} of {os.cpu_count()} cores" + (f", {name.group(1).strip()}" if name else "")
    if limit is not None and limit < usable:
        todo = f"set OMP_NUM_THREADS={max(1, int(limit))}: more threads than that wait for each other"
        return Row("processors", NOTE, f"{said}; the container may use {limit:g}", todo)
    return Row("processors", OK, said)


def _memory() -> Row:
    kilobytes = dict(re.findall(r"^(\w+):\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE))
    if not kilobytes:
        return Row("memory", OK, "not known here")
    total, free = (int(kilobytes.get(key, 0)) * 1024 for key in ("MemTotal", "MemAvailable"))
    limit, used = (_words(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit and limit[0].isdigit() and int(limit[0]) < total:
        total, free = int(limit[0]), min(free, int(limit[0]) - int(used[0] if used else 0))
    said = f"{gibibytes(free)} free of {gibibytes(total)}"
    if free < LITTLE_MEMORY:
        return Row("memory", NOTE, said, "the demo takes 2 GiB; end other programs, or use a larger machine")
    return Row("memory", OK, said)


def _disks(output: str) -> list[Row]:
    return [
        _disk("disk for runs", output, "output_dir on a larger disk", needed=True),
        _disk("disk for caches", hub_cache(), "HF_HOME=FOLDER on a larger disk"),
        _disk("disk for temporary files", tempfile.gettempdir(), "TMPDIR=FOLDER on a larger disk"),
    ]


def _disk(name: str, folder: str, todo: str, needed: bool = False) -> Row:
    there = os.path.abspath(folder)
    while not os.path.isdir(there) and there != os.path.dirname(there):
        there = os.path.dirname(there)
    try:
        usage = shutil.disk_usage(there)
    except OSError as error:
        return Row(name, BROKEN, f"{folder}: {error.strerror}", todo, needed)
    said = f"{gibibytes(usage.free)} free of {gibibytes(usage.total)} in {folder}"
    if not os.access(there, os.W_OK):
        return Row(name, BROKEN, f"{folder} cannot be written to", todo, needed)
    if usage.free < NO_DISK:
        return Row(name, BROKEN, said, todo, needed)
    return Row(name, NOTE if usage.free < LITTLE_DISK else OK, said, todo if usage.free < LITTLE_DISK else "", needed)


def _shared_memory() -> Row:
    if not os.path.isdir("/dev/shm"):
        return Row("/dev/shm", NOTE, "none", "" if sys.platform != "linux" else "dataloader_num_workers 0")
    total = shutil.disk_usage("/dev/shm").total
    little = total < LITTLE_SHM
    todo = "docker run --shm-size=8g (or --ipc=host), or dataloader_num_workers 0: loaders pass batches through it"
    return Row("/dev/shm", NOTE if little else OK, gibibytes(total), todo if little else "")


def _open_files() -> Row:
    try:
        import resource

        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    except (ImportError, OSError):
        return Row("open files", OK, "not known here")
    little = 0 <= soft < 1024
    said = "no limit" if soft < 0 else f"at most {soft}"
    return Row("open files", NOTE if little else OK, said, "ulimit -n 4096" if little else "")


def _compiler() -> Row:
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    todo = "apt install g++, for torch_compile and DeepSpeed's own operators"
    return Row("C++ compiler", OK if found else MISSING, found or "none", "" if found else todo)


# --- the hub --------------------------------------------------------------------------------------------------------


def hub_home() -> str:
    cache = os.environ.get("XDG_CACHE_HOME", os.path.join(os.path.expanduser("~"), ".cache"))
    return os.path.expanduser(os.environ.get("HF_HOME") or os.path.join(cache, "huggingface"))


def hub_cache() -> str:
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return os.path.expanduser(named or os.path.join(hub_home(), "hub"))


def hub_rows(network: bool, seconds: float) -> list[Row]:
    """Of the cache, the token (whether there is one) and the way to the hub, which is tried only if `network`."""
    folder = hub_cache()
    try:
        models = sum(name.startswith("models--") for name in os.listdir(folder))
    except OSError:
        models = 0
    rows = [Row("hub cache", OK if models else NOTE, f"{models} models in {folder}")]
    token = any(os.environ.get(name) for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"))
    path = os.environ.get("HF_TOKEN_PATH") or os.path.join(hub_home(), "token")
    token = token or os.path.isfile(os.path.expanduser(path))
    rows.append(Row("hub token", OK if token else NOTE, "there is one" if token else "none", "" if token else _LOGIN))
    offline = [
        name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(name, "0") not in ("", "0")
    ]
    if offline:
        said = f"{offline[0]} is set: only what is in the cache is used"
        rows.append(Row("hub access", NOTE, said, f"unset {offline[0]} to download models"))
    elif network:
        rows.append(_reach(seconds))
    else:
        rows.append(Row("hub access", NOTE, "not tried", "python -m llava.doctor --network asks the hub once"))
    return rows


_LOGIN = "`hf auth login`, for models that ask for it"


def _reach(seconds: float) -> Row:
    import urllib.error
    import urllib.request

    end = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    asked = urllib.request.Request(end, method="HEAD", headers={"User-Agent": "llava.doctor"})
    try:
        with urllib.request.urlopen(asked, timeout=seconds) as answer:
            return Row("hub access", OK, f"{end} answers ({answer.status})")
    except urllib.error.HTTPError as error:
        return Row("hub access", OK, f"{end} answers ({error.code})")
    except (OSError, ValueError) as error:
        todo = "set HTTPS_PROXY or HF_ENDPOINT (a mirror), or `hf download` elsewhere and bring the cache along"
        return Row("hub access", BROKEN, f"{end}: {error}", todo)


# --- variables ------------------------------------------------------------------------------------------------------

_PREFIXES = ("NCCL_", "GLOO_", "TORCH", "PYTORCH_", "HF_", "TRANSFORMERS_", "DS_", "ACCELERATE_", "WANDB_", "CUDA_")
_NAMES = (
    *("PYTHONPATH", "PYTHONHOME", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "GOMP_SPINCOUNT", "LD_LIBRARY_PATH", "CXX"),
    *("LD_PRELOAD", "TMPDIR", "NUM_GPUS", "NUM_PROCS", "NNODES", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"),
    *("MASTER_PORT", "ADDR", "PORT", "LAUNCHER", "HOSTFILE", "MAX_RESTARTS", "TOKENIZERS_PARALLELISM", "PYTHON"),
    *("SLURM_JOB_ID", "LLAVA_LONG_TESTS", "TRITON_CACHE_DIR", "KMP_AFFINITY", "XDG_CACHE_HOME", "VIRTUAL_ENV"),
)
_SECRET = re.compile("TOKEN|KEY|SECRET|PASS|CREDENTIAL|AUTH|COOKIE")
_HIDDEN = ("ADDR", "HOST", "ENTITY", "USER", "NAME", "EMAIL", "PROXY", "MASTER_ADDR")


def variables() -> dict[str, str]:
    """Those that change what a run does; what may be secret or private is said to be set, not what it is."""
    found = {}
    for name in sorted(os.environ):
        if name in _NAMES or name.startswith(_PREFIXES):
            hide = (_SECRET.search(name) and name != "TOKENIZERS_PARALLELISM") or name.endswith(_HIDDEN)
            found[name] = "(set)" if hide else os.environ[name]
    return found


def variable_rows() -> list[Row]:
    """Those that are known to spoil runs."""
    rows = []
    if "RANK" in os.environ and "WORLD_SIZE" not in os.environ and "NNODES" not in os.environ:
        rows.append(
            Row("RANK", NOTE, f"{os.environ['RANK']} without WORLD_SIZE", "unset RANK: a process takes it as its own")
        )
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and int(threads) > (os.cpu_count() or 1):
        rows.append(
            Row("OMP_NUM_THREADS", NOTE, f"{threads} of {os.cpu_count()} cores", "set it to the cores there are")
        )
    if os.environ.get("PYTHONHOME"):
        rows.append(
            Row("PYTHONHOME", NOTE, os.environ["PYTHONHOME"], "unset it: Python looks for its own library there")
        )
    return rows


def llava_rows(seconds: float) -> list[Row]:
    """Which package a program finds as llava: this one, none, or another (LLaVA's and LLaVA-NeXT's have the name)."""
    from llava.doctor.children import run

    program = (
        "import importlib.util, json, sys\nsys.path = [p for p in sys.path if p]\n"
        "spec = importlib.util.find_spec('llava')\nprint('\\n\\x1e' + json.dumps(spec and (spec.origin or "
        "list(spec.submodule_search_locations)[0])))"
    )
    answers, _ = run(program, seconds=seconds)
    origin = answers[0] if answers else None
    here = os.path.join(ROOT, "llava")
    if origin and os.path.realpath(os.path.dirname(origin)) == os.path.realpath(here):
        return [Row("llava", OK, f"this one, {here}")]
    if origin:
        todo = f"PYTHONPATH={ROOT}, or an environment of its own: pip uninstall llava, then pip install -e {ROOT}"
        return [
            Row("llava", BROKEN, f"outside of its folder Python finds another llava: {os.path.dirname(origin)}", todo)
        ]
    return [Row("llava", NOTE, f"{here}, which Python finds in this folder alone", f"pip install -e {ROOT}")]


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _words(path: str) -> list[str]:
    return _read(path).split()
