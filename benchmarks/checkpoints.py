"""What it costs to trust a checkpoint (`llava.train.checkpoints`): writing alone, flushing, hashing, verifying.

Writes safetensors files of random numbers as a save would, by turns with and without what the project adds, and reads
them back. Writes one JSON.
"""

import argparse
import json
import platform
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
from llava.errors import report_errors  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="checkpoints.py", description=__doc__.split("\n")[0])
    parser.add_argument("--megabytes", type=int, default=1000, help="of one checkpoint")
    parser.add_argument("--files", type=int, default=4, help="that it has")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: a temporary one")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "checkpoints.json", help="JSON to write")
    return parser


@report_errors
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        seconds = measure(Path(folder), args.megabytes, args.files, args.repeats)
    gigabytes = args.megabytes / 1000
    figures = {name: round(statistics.median(times) / gigabytes, 3) for name, times in seconds.items()}
    report = {
        "schema": 1,
        "hardware": {"platform": platform.platform(), "disk": str(args.folder or tempfile.gettempdir())},
        "shapes": {"megabytes": args.megabytes, "files": args.files, "repeats": args.repeats},
        "figures": {"seconds_per_gigabyte": figures},
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1))
    for name, value in figures.items():
        print(f"{name}: {value} s/GB")
    return 0


def measure(out: Path, megabytes: int, files: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of each part, once for each repeat."""
    import torch
    from safetensors.torch import save_file

    from llava.train import checkpoints

    weights = torch.randn(megabytes * 10**6 // files // 4)
    seconds: dict[str, list[float]] = {"written alone": [], "flushed and hashed": [], "full": [], "sizes": []}

    def timed(name: str, function, *args):
        begun = time.perf_counter()
        result = function(*args)
        seconds[name].append(time.perf_counter() - begun)
        return result

    def write(folder: Path) -> None:
        for number in range(files):
            save_file({"w": weights}, folder / f"model-{number}.safetensors")

    for step in range(1, repeats + 1):
        folder = checkpoints.temporary(out, step)
        folder.mkdir(parents=True)
        (folder / checkpoints.STATE_NAME).write_text(json.dumps({"global_step": step}))
        timed("written alone", write, folder)
        made = timed("flushed and hashed", checkpoints.entries, folder, checkpoints.files_in(folder))
        final = checkpoints.publish(folder, out, {"step": step}, made)
        for how in ("full", "sizes"):
            wrong = timed(how, checkpoints.fault, final, how)
            assert wrong is None, wrong
        shutil.rmtree(final)
    return seconds


if __name__ == "__main__":
    sys.exit(main())
