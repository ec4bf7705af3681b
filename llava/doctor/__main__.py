"""Say what this machine has and lacks for training here, each with what to do, as a text to paste into a report."""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor

from llava.errors import report_errors

EPILOG = """Exit status: 0 if a run on the CPU can start; 1 if something that every run needs is missing or broken.
The text has no tokens, and neither home folders nor the names of the user and the machine. Nothing goes over the
network without --network. What may be broken is tried in child processes: a package that crashes costs one line."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llava.doctor",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON: can_start, rows, variables")
    parser.add_argument("--network", action="store_true", help="also ask the hub once whether it answers")
    parser.add_argument("--output", default="checkpoints", help="where runs will be written (checkpoints)")
    parser.add_argument("--timeout", type=float, default=90, help="seconds that each trial may take (90)")
    return parser


def examine(args) -> dict:
    """{"schema": 1, "can_start", "rows": {group: [row]}, "variables": {name: value}}; nothing private in it."""
    from llava.doctor.accelerators import attention_rows, deepspeed_rows, torch_rows
    from llava.doctor.machine import hub_rows, llava_rows, machine_rows, variable_rows, variables
    from llava.doctor.packages import package_rows
    from llava.doctor.rows import OK, private
    from llava.doctor.versions import wanted

    want, seconds = wanted(), args.timeout
    with ThreadPoolExecutor(2) as pool:
        packages = pool.submit(package_rows, want, seconds)
        torch = pool.submit(torch_rows, seconds).result()
        on_gpu = any(row.name.startswith("GPU ") and row.status == OK for row in torch)
        works = torch[0].status == OK
        attention = pool.submit(attention_rows, seconds, on_gpu) if works else None
        deepspeed = pool.submit(deepspeed_rows, seconds, on_gpu) if works else None
        groups = {
            "machine": [*machine_rows(want, args.output), *llava_rows(seconds), *variable_rows()],
            "PyTorch": [*torch, *(attention.result() if works else []), *(deepspeed.result() if works else [])],
            "packages": packages.result(),
            "hub": hub_rows(args.network, min(seconds, 10)),
        }
    return {
        "schema": 1,
        "can_start": not any(row.stops for rows in groups.values() for row in rows),
        "rows": {group: [row.public() for row in rows] for group, rows in groups.items()},
        "variables": {name: private(value) for name, value in variables().items()},
    }


def text(found: dict) -> str:
    """The report as lines; those that need something end with what to do."""
    rows = [row for group in found["rows"].values() for row in group]
    lacks = [row for row in rows if row["status"] in ("missing", "broken")]
    needed = [row["name"] for row in lacks if row["needed"]]
    if found["can_start"]:
        lines = [f"llava doctor: a run on the CPU can start; {len(lacks)} optional things are missing or broken"]
    else:
        lines = [f"llava doctor: no run can start: {', '.join(needed)} (needed) missing or broken"]
    width = max(len(row["name"]) for row in rows)
    for group, members in found["rows"].items():
        lines += ["", f"{group}:"]
        for row in members:
            status = row["status"].upper() if row["needed"] and row in lacks else row["status"]
            todo = f"  -> {row['todo']}" if row["todo"] else ""
            lines.append(f"  {status:<8} {row['name']:<{width}}  {row['found']}{todo}")
    lines += ["", "variables:"]
    lines += [f"  {name}={value}" for name, value in found["variables"].items()] or ["  none that matter"]
    return "\n".join(lines)


@report_errors
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    print("looking at this machine: up to a minute", file=sys.stderr)
    found = examine(args)
    print(json.dumps(found, indent=2) if args.json else text(found))
    return 0 if found["can_start"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
