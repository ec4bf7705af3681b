"""Run the demo over several seeds and with other towers, hold each against the bar, write a dated JSON."""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from llava.errors import report_errors
from llava.eval.exact_match import table

ROOT = Path(__file__).resolve().parents[1]
BAR = {"overall": 0.90, "one_digit": 0.95, "every_kind": 0.75}
BLANK_MARGIN = 0.15  # with blank pictures an image kind may be this far above chance: 140 questions are few
LEAST = {"questions": 1000, "one_digit": 300, "share_of_a_kind": 0.08}
DEFAULT_TOWER = "demo_clip"
OTHER_TOWERS = (
    *("demo_hevc_vit", "demo_hevc_vit_packing", "demo_clip_toconv"),
    *("demo_dinov2", "demo_siglip2", "demo_aimv2"),  # encoders of transformers, through one tower
)
QWEN2_VL = "demo_qwen2_vl"  # the demo of scripts/finetune_qwen2_vl.sh; held to the bar with all patches
RARE_KINDS = {"text"}  # kinds without an image: at most 5% of the questions, so not held to the least share


def shortfalls(result: dict) -> list[str]:
    """What in an eval.json (`exact_match`, `n`, `by_kind`) is below the bar; [] if nothing is."""
    kinds, found = result["by_kind"], []
    if result["exact_match"] < BAR["overall"]:
        found.append(f"overall {result['exact_match']:.3f} < {BAR['overall']}")
    if result["n"] < LEAST["questions"]:
        found.append(f"{result['n']} questions < {LEAST['questions']}")
    one_digit = kinds.get("one_digit", {"exact_match": 0.0, "n": 0})
    if one_digit["exact_match"] < BAR["one_digit"]:
        found.append(f"one_digit {one_digit['exact_match']:.3f} < {BAR['one_digit']}")
    if one_digit["n"] < LEAST["one_digit"]:
        found.append(f"{one_digit['n']} one_digit questions < {LEAST['one_digit']}")
    for kind, part in sorted(kinds.items()):
        if part["exact_match"] < BAR["every_kind"]:
            found.append(f"{kind} {part['exact_match']:.3f} < {BAR['every_kind']}")
        if kind not in RARE_KINDS and part["n"] < LEAST["share_of_a_kind"] * result["n"]:
            found.append(f"{kind} has {part['n']} of {result['n']} questions")
    for kind, part in sorted(result.get("blank_images", {}).get("by_kind", {}).items()):
        if part["exact_match"] > part["chance"] + BLANK_MARGIN:
            found.append(f"{kind} with blank pictures {part['exact_match']:.3f}, chance {part['chance']:.3f}")
    return found


def run_demo(seed: int, tower: str, output: Path, extra: list[str]) -> dict:
    """One demo from an empty folder; what is kept of it."""
    flags = {"--seed": str(seed), "--output_dir": str(output)}
    script, stage = "scripts/finetune_qwen2_vl.sh", "qwen2_vl"
    if tower != QWEN2_VL:
        flags["--tower"] = f"configs/towers/{tower}.yaml"
        script, stage = "scripts/finetune.sh", "finetune"
    command = ["bash", script, "--overwrite", *(word for flag in flags.items() for word in flag), *extra]
    run = {"seed": seed, "tower": tower}
    start = time.monotonic()
    done = subprocess.run(command, cwd=ROOT)
    seconds = round(time.monotonic() - start, 1)
    if done.returncode != 0:
        return {**run, "seconds": seconds, "shortfalls": [f"ended with status {done.returncode}"]}
    result = json.loads((output / stage / "eval.json").read_text(encoding="utf-8"))
    questions = {"predictions", "questions", "records", "examples"}
    summary = {name: value for name, value in result.items() if name not in questions}
    return {**run, "seconds": seconds, **summary, "shortfalls": shortfalls(result)}


def host() -> dict:
    packages = ("torch", "transformers", "deepspeed", "numpy", "scikit-learn")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "commit": commit,
    }


@report_errors
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4], help=f"runs with {DEFAULT_TOWER}")
    parser.add_argument("--towers", nargs="*", default=OTHER_TOWERS, help="other towers")
    parser.add_argument("--tower-seeds", type=int, nargs="*", default=[0], help="runs with each of the other towers")
    parser.add_argument("--qwen2-vl-seeds", type=int, nargs="*", default=[0], help="runs of the Qwen2-VL demo")
    parser.add_argument("--output", type=Path, default=ROOT / "checkpoints/long", help="folder for the runs")
    now = datetime.datetime.now(datetime.UTC)
    parser.add_argument("--json", type=Path, default=ROOT / "test_results" / f"long_{now:%Y%m%d}.json")
    parser.add_argument("--check", action="store_true", help="look at the flags and do nothing")
    args, extra = parser.parse_known_args()
    plan = [sys.executable, "-m", "llava.train.recipe", "configs/recipes/demo.yaml", "--dry-run", *extra]
    refused = extra and subprocess.run(plan, cwd=ROOT, stdout=subprocess.DEVNULL).returncode
    if args.check or refused:
        return refused or 0
    wanted = [(seed, DEFAULT_TOWER) for seed in args.seeds]
    wanted += [(seed, tower) for tower in args.towers for seed in args.tower_seeds]
    wanted += [(seed, QWEN2_VL) for seed in args.qwen2_vl_seeds]
    runs, passed = [], False
    args.json.parent.mkdir(exist_ok=True)
    for seed, tower in wanted:
        print(f"{tower}, seed {seed}", flush=True)
        runs.append(run_demo(seed, tower, args.output / f"{tower}_seed{seed}", extra))
        passed = not any(run["shortfalls"] for run in runs) and len(runs) == len(wanted)
        report = {
            "started": now.isoformat(),
            "host": host(),
            "bar": BAR,
            "least": LEAST,
            "demo": runs,
            "passed": passed,
        }
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for run in runs:
        verdict = "; ".join(run["shortfalls"]) or "above the bar"
        score = f"exact match {run.get('exact_match', 0):.3f} in {run['seconds']} s"
        print(f"{run['tower']}, seed {run['seed']}: {score}, {verdict}")
        if "selections" in run:
            print(table(run["selections"]))
    print(f"written to {args.json}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
