"""Hours and memory of a comparison's training runs before any is started, by `benchmarks/scaling.py` of the checkout.

The hours of runs add up: that each takes all devices in turn, or several share them, makes no difference to the model.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from llava.errors import LlavaError

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "scaling.py"


@dataclass(frozen=True)
class Planned:
    """A training run to come: one stage. `argv`: CONFIG.yaml --key value ..., as `llava.config.resolve` takes it."""

    name: str
    tower: str
    seed: int
    argv: list[str]


@dataclass
class Estimate:
    """What the runs take.

    Attributes:
        runs: of each, in order, {"name", "tower", "seed", "hours", "memory_gib" (of one device), "breaks" (["memory"]
            where a device is too small)}, or "error" in place of the last three where it is not known.
        hours: of all that are known; None where nothing could be estimated.
        said: the plan in lines: what each run takes, what fits, and what to cut.
    """

    runs: list[dict] = field(default_factory=list)
    hours: float | None = None
    said: list[str] = field(default_factory=list)


def estimate(runs: list[Planned], gpu: str, hours: float, devices: int = 8) -> Estimate:
    """What runs take on `devices` GPUs of a kind, and what to leave out so that it fits in `hours`.

    Args:
        runs: each stage once that is to be trained.
        gpu: as `benchmarks/scaling.py --gpu`.

    Raises:
        LlavaError: hours or devices not above 0, or what the program refuses, such as a GPU that it does not know.
    """
    if not hours > 0 or devices < 1:
        raise LlavaError(f"--hours {hours:g} on {devices} devices: expected numbers above 0")
    if not PROGRAM.is_file():
        return Estimate(said=[f"hours and memory are not known: {PROGRAM} is not there, which comes with a checkout"])
    found = [_row(run, row) for run, row in zip(runs, _scaled(runs, gpu, hours, devices), strict=True)]
    known = [row for row in found if "error" not in row]
    total = sum(row["hours"] for row in known) if known else None
    result = Estimate(found, total)
    result.said = _lines(found)
    result.said += [f"{len(known)} of {len(found)} runs on {devices} x {gpu}: {_hours(total)}"] if known else []
    unknown = len(found) - len(known)
    result.said += [f"without {unknown} of which nothing is known:"] if known and unknown else []
    result.said += _verdict(known, hours)
    return result


def _scaled(runs: list[Planned], gpu: str, hours: float, devices: int) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "runs.json", Path(folder) / "scaling.json"
        rows = [{"name": run.name, "argv": argv} for run, argv in zip(runs, _from_what_is_there(runs), strict=True)]
        given.write_text(json.dumps(rows), encoding="utf-8")
        command = [sys.executable, str(PROGRAM), "--runs", str(given), "--gpu", gpu, "--hours", str(hours)]
        # what is not in the cache is not known, rather than waited for
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        ended = subprocess.run(
            [*command, "--gpus", str(devices), "--output", str(made)], env=environment, capture_output=True, text=True
        )
        if ended.returncode or not made.is_file():
            lines = ended.stderr.strip().splitlines() or [f"it ended with status {ended.returncode}"]
            raise LlavaError(f"{PROGRAM.name}: {lines[-1]}")
        return json.loads(made.read_text(encoding="utf-8"))["recipes"]


def _from_what_is_there(runs: list[Planned]) -> list[list[str]]:
    """The runs' command lines; one that begins with what another one will leave begins with what that one begins with,
    which has the same sizes."""
    from llava.config import resolve

    resolved: list = []
    for run in runs:
        try:
            resolved.append(resolve(list(run.argv)))
        except LlavaError:  # the program says so in its row
            resolved.append(None)
    leaves = {os.path.normpath(run["output_dir"]): run for run in resolved if run and run["output_dir"]}
    lines = []
    for planned, run in zip(runs, resolved, strict=True):
        argv, seen = list(planned.argv), []
        while run and (path := os.path.normpath(run["model_name_or_path"] or "")) in leaves and path not in seen:
            seen.append(path)
            run = leaves[path]
        if seen:
            argv += ["--model_name_or_path", run["model_name_or_path"]]
            argv += ["--tower", run.tower] if run.tower and "--tower" not in argv else []
        lines.append(argv)
    return lines


def _row(run: Planned, row: dict) -> dict:
    named = {"name": run.name, "tower": run.tower, "seed": run.seed}
    if "error" in row:
        return named | {"error": row["error"].removeprefix(f"{run.name}: ")}
    memory = row["memory"]["total"] / 2**30
    breaks = [what for what in row["breaks"] if what == "memory"]  # the time is that of all runs together
    return named | {"hours": row["hours"], "memory_gib": memory, "breaks": breaks}


def _lines(rows: list[dict]) -> list[str]:
    """A line for each run; one for all seeds of a tower that take the same."""
    alike: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        name, _, rest = _line(row).partition(": ")
        alike.setdefault((row["tower"], name.rpartition("/")[2], rest), []).append(name)
    return [
        f"{names[0]}: {rest}" + (f" (and {len(names) - 1} more such)" if len(names) > 1 else "")
        for (*_, rest), names in alike.items()
    ]


def _line(row: dict) -> str:
    if "error" in row:
        return f"{row['name']}: not known: {row['error']}"
    small = ", more than one device has" if row["breaks"] else ""
    return f"{row['name']}: {_hours(row['hours'])}, {row['memory_gib']:.0f} GiB{small}"


def _hours(hours: float) -> str:
    return f"{hours:,.1f} hours"


def _verdict(known: list[dict], hours: float) -> list[str]:
    """What fits, and what to cut."""
    if not known:
        return ["nothing is known of any run"]
    said = []
    small = sorted({row["tower"] for row in known if row["breaks"]})
    if small:
        said.append(f"memory: {', '.join(small)} do not fit on one device: a smaller batch, ZeRO-3 or more devices")
    total = sum(row["hours"] for row in known)
    if total <= hours:
        return [*said, f"it fits: {_hours(total)} of {_hours(hours)}"]
    ways = [way for way in (_fewer_seeds(known, hours), _fewer_towers(known, hours)) if way]
    if ways:
        return [*said, f"it does not fit in {_hours(hours)}: drop {', or '.join(ways)}"]
    cheapest = min(_sums(known, "tower", "seed").values())
    if cheapest <= hours:
        return [*said, f"it does not fit in {_hours(hours)}: {_both(known, hours)}"]
    return [
        *said,
        f"nothing fits in {_hours(hours)}: one tower with one seed takes {_hours(cheapest)}; more devices, a smaller "
        "language model or fewer samples would help",
    ]


def _sums(rows: list[dict], *keys: str) -> dict:
    """Hours by the values of some keys, in order."""
    sums: dict = {}
    for row in rows:
        key = tuple(row[name] for name in keys)
        sums[key] = sums.get(key, 0.0) + row["hours"]
    return sums


def _fewer_seeds(rows: list[dict], hours: float) -> str | None:
    """Which seeds to drop, the last ones first; None: no number of them is enough."""
    sums, dropped = _sums(rows, "seed"), []
    seeds = [key[0] for key in sums]
    while len(seeds) > 1:
        dropped.insert(0, seeds.pop())
        if (left := sum(sums[seed,] for seed in seeds)) <= hours:
            word = "seed" if len(dropped) == 1 else "seeds"
            return f"{word} {', '.join(map(str, dropped))} (leaves {_hours(left)})"
    return None


def _fewer_towers(rows: list[dict], hours: float) -> str | None:
    """Which towers to drop, as few as can be: those that take longest; None: two would not be left."""
    sums = _sums(rows, "tower")
    order = sorted(sums, key=sums.get)  # quickest first
    for count in range(len(order) - 1, 1, -1):
        if (left := sum(sums[key] for key in order[:count])) <= hours:
            dropped = [key[0] for key in sums if key in order[count:]]
            return f"{', '.join(dropped)} (leaves {_hours(left)})"
    return None


def _both(rows: list[dict], hours: float) -> str:
    """Where neither fewer seeds nor fewer towers are enough: one seed, of the towers that then fit."""
    first = rows[0]["seed"]
    one = [row for row in rows if row["seed"] == first]
    towers = _fewer_towers(one, hours)
    if towers:
        return f"keep seed {first} alone, and drop {towers}"
    sums = _sums(one, "tower")
    quickest = min(sums, key=sums.get)
    return f"with seed {first} alone there is time for {quickest[0]} ({_hours(sums[quickest])}) and no second tower"
