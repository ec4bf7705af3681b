"""Run the checks of gpu_checks/ on one CUDA device, or in small shapes on a CPU, and write one JSON.

Prints a line per verdict (PASS or FAIL, with its figures) and ends with status 1 when any failed.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "numpy", "flash-attn", "triton")

for folder in (HERE, ROOT):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
from llava.errors import report_errors  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpu_suite.sh", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: cuda where there is one"
    )
    parser.add_argument("--output", type=Path, default=HERE / "results" / "gpu_suite.json", help="JSON to write")
    parser.add_argument("--workdir", type=Path, default=ROOT / "checkpoints" / "gpu_suite", help="for the demo's files")
    parser.add_argument("--only", nargs="+", metavar="CHECK", help="run these checks only")
    parser.add_argument("--skip", nargs="+", metavar="CHECK", default=[], help="leave these checks out")
    parser.add_argument("--list", action="store_true", help="name the checks and end")
    parser.add_argument("--commit", help="git commit to record, where this is not a git checkout")
    parser.add_argument("--smoke-configs", nargs="+", metavar="NAME", help="only these of configs/train")
    parser.add_argument("--golden-cases", type=int, help="only the first N golden checkpoints")
    parser.add_argument("--demo-steps", type=int, help="steps per stage; 0: all of them (default on CUDA; on a CPU 2)")
    parser.add_argument("--tower-preset", help="size of the vision tower (clip-l336; demo)")
    parser.add_argument(
        "--generate-preset", help="size of the generating LLM (qwen2-7b; demo; small, qwen2-1.5b, qwen2-0.5b)"
    )
    parser.add_argument("--generate-layers", type=int, help="fewer layers of it")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32], help="rows generated at once")
    parser.add_argument("--new-tokens", type=int, help="tokens generated per row (64; 16)")
    parser.add_argument("--generate-repeats", type=int, default=5, help="timed repeats of a generation")
    parser.add_argument(
        "--train-preset", help="size of the trained LLM (qwen2-1.5b; small; demo, qwen2-0.5b, qwen2-7b)"
    )
    parser.add_argument("--train-batch", type=int, default=4, help="rows of a training step")
    parser.add_argument("--steps", type=int, default=10, help="timed training steps")
    parser.add_argument("--peak-tflops", type=float, help="the device's dense bf16 TFLOP/s (default: by its name)")
    return parser


def prepare_torch(device: str) -> str:
    """The device to use ("cuda" or "cpu"), float32 made to mean float32."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    import transformers

    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: --device cuda, but PyTorch sees no CUDA device")
    transformers.utils.logging.disable_progress_bar()
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False  # convolutions, such as a tower's patch embedding, use it by default
    return device if device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")


def commit() -> str:
    """The checkout's commit, with "+changes" when tracked files differ from it; "unknown" outside git."""
    git = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT)]
    try:
        found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found + ("+changes" if changed else "")


def versions() -> dict[str, str | None]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def start_report(args: argparse.Namespace, device: str) -> dict:
    """What every report begins with, of the machine and the run; the machine is printed."""
    from gpu_checks.measure import hardware

    machine, packages = hardware(device), versions()
    print(f"{machine.get('gpu') or machine['cpu']}, {machine['threads']} CPU threads, {packages}", flush=True)
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": machine,
        "versions": packages,
        "commit": getattr(args, "commit", None) or commit(),
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
    }


def finish_report(report: dict, path: Path, passed: bool, fault: str) -> int:
    """Write a benchmark's report and say so; the exit status, 1 with `fault` where it did not pass."""
    write_json(report, path)
    print(f"\nwritten to {path}")
    if not passed:
        print(f"error: {fault}", file=sys.stderr)
    return 0 if passed else 1


def write_json(content: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_report(path: Path, report: dict, results: list) -> None:
    report["passed"] = all(result.passed for result in results)
    report["checks"] = [
        {
            "name": result.name,
            "passed": result.passed,
            "seconds": result.seconds,
            "tests": result.tests,
            "figures": result.figures,
        }
        for result in results
    ]
    write_json(report, path)


def choose(checks: dict, only: list[str] | None, skip: list[str]) -> list:
    """The checks to run, in their registered order."""
    unknown = [name for name in (*(only or ()), *skip) if name not in checks]
    if unknown:
        raise SystemExit(f"error: no check {', '.join(unknown)}; there are {', '.join(checks)}")
    return [entry for name, entry in checks.items() if (only is None or name in only) and name not in skip]


@report_errors
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    device = prepare_torch(args.device)
    from gpu_checks import measure, registry

    chosen = choose(registry.load_checks(), args.only, args.skip)
    if args.list:
        print("\n".join(f"{entry.name:20} {entry.summary}" for entry in chosen))
        return 0
    small = device == "cpu"
    context = registry.Context(device, small, args, ROOT, args.workdir.resolve())
    report = start_report(args, device) | {"mode": "small shapes on a CPU" if small else "cuda"}
    start = time.monotonic()
    report["ceilings"] = measure.ceilings(device, small)
    print("     " + ", ".join(f"{name} {value:,.1f}" for name, value in report["ceilings"].items()), flush=True)
    results = []
    for entry in chosen:
        print(f"---- {entry.name}: {entry.summary}", flush=True)
        results.append(registry.run_check(entry, context))
        report["seconds"] = round(time.monotonic() - start, 1)
        write_report(args.output, report, results)  # after each: a run that is cut off keeps what it has
        measure.free_memory(device)
    print("----")
    for result in results:
        print(f"{'PASS' if result.passed else 'FAIL'} {result.name} ({result.seconds} s)")
    failed = sum(not result.passed for result in results)
    print(f"{len(results) - failed} of {len(results)} checks passed in {report['seconds']} s; written to {args.output}")
    return 1 if failed or not results else 0


if __name__ == "__main__":
    sys.exit(main())
