"""Compare vision towers inside a VLM: train each with the same recipe and several seeds, and report what differs.

    python -m llava.tools.compare_towers configs/compare/demo.yaml              # on the CPU, embedded data
    python -m llava.tools.compare_towers configs/compare/llava_next.yaml --jobs 2
    python -m llava.tools.compare_towers configs/compare/llava_next.yaml --slurm

Leaves report.md, report.html, results.json, results.csv, table.tex and pictures in compare/NAME, and each run in
compare/NAME/runs/TOWER/seed_S. The same command goes on after an interruption, and takes up towers and seeds that were
added. Ctrl-C lets every run finish its step and save; again: stop at once.
"""

import argparse
import sys
from pathlib import Path

from llava.errors import report_errors, report_interrupts


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llava.tools.compare_towers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="--key value: a key of a training run, for all runs and stages; --STAGE.key value: for one stage; "
        "--EVALUATION.key value: an argument of an evaluation. Exit status: 0 all runs are finished, or stopped and "
        "saved; 1 some failed or are missing; 2 refused.",
    )
    parser.add_argument("comparison", metavar="FILE", help="the comparison's YAML, as those in configs/compare")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder of all runs (default: compare/NAME)")
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="runs at once (default: 1), which share out GPUs or CPU threads"
    )
    parser.add_argument("--only", nargs="+", metavar="TOWER", help="run these towers; report on all that is there")
    parser.add_argument("--collect", action="store_true", help="run nothing, report on what is there")
    parser.add_argument("--probe", metavar="FOLDER", help="probe the frozen towers on labelled pictures, too")
    parser.add_argument("--no-cost", action="store_true", help="do not measure tokens, time and memory")
    parser.add_argument("--slurm", action="store_true", help="write array jobs and a collect job, run nothing")
    parser.add_argument("--dry-run", action="store_true", help="say what would be run")
    parser.add_argument("--gpu", metavar="NAME", help="with --dry-run: what fits on NUM_GPUS (8) such GPUs")
    parser.add_argument("--hours", type=float, metavar="H", help="with --gpu: how long they are there")
    parser.add_argument("--task", metavar="GROUP:N", help=argparse.SUPPRESS)  # of an array job
    return parser


@report_errors
@report_interrupts
def main(argv: list[str] | None = None) -> None:
    args, words = build_parser().parse_known_args(sys.argv[1:] if argv is None else argv)

    from llava.compare.command import command

    raise SystemExit(command(args, words))


if __name__ == "__main__":
    main()
