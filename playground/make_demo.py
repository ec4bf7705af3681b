"""Make the demo's data and its random models, unless these programs have made them before with this seed.

python playground/make_demo.py --output playground/demo --seed 0
"""

import argparse
import fcntl
import hashlib
import importlib.util
import shutil
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROGRAMS = ("make_demo_data.py", "make_demo_model.py")
MARKER = "made-with-seed"


def load(program: str):
    spec = importlib.util.spec_from_file_location(program.removesuffix(".py"), HERE / program)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make(output: Path, seed: int) -> bool:
    """Make the demo in a folder, which holds nothing else; False: it was there.

    Of several processes that want it at once, one makes it, and the others wait.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output.parent / f".{output.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sums = [hashlib.sha256((HERE / program).read_bytes()).hexdigest()[:16] for program in PROGRAMS]
        made, marker = " ".join([str(seed), *sums]), output / MARKER
        if marker.is_file() and marker.read_text() == made:
            return False
        shutil.rmtree(output, ignore_errors=True)
        for program in PROGRAMS:
            load(program).make(output, seed)
        marker.write_text(made)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("playground/demo"), help="folder to write, and to empty")
    parser.add_argument(
        "--seed", type=int, default=0, help="decides the split, the pictures, the questions, the weights"
    )
    args = parser.parse_args()
    if args.output.is_dir() and any(args.output.iterdir()) and not (args.output / "pretrain.json").is_file():
        parser.error(f"{args.output} holds something other than the demo, expected a folder of its own")
    if make(args.output, args.seed):
        print(f"{args.output}: made with seed {args.seed}")


if __name__ == "__main__":
    main()
