"""`python -m llava.compare.probing ASKED.json OUT.json`: probe the towers of training runs, in a process of its own.

ASKED.json: {"folder": labelled pictures, "output": folder for what is kept, "towers": {NAME: command line of a training
run, as `llava.config.resolve` takes it}}. OUT.json: {"towers": {NAME: what `llava.compare.probe.probe` tells}}.
"""

import argparse
import json
from pathlib import Path

from llava.errors import report_errors


@report_errors
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("asked", metavar="ASKED.json")
    parser.add_argument("out", metavar="OUT.json")
    args = parser.parse_args(argv)
    asked = json.loads(Path(args.asked).read_text(encoding="utf-8"))

    from llava.compare.probe import probe
    from llava.config import resolve
    from llava.families.llava_geometry import run_config
    from llava.train.checkpoints import write_json

    towers = {name: run_config(resolve(words)) for name, words in asked["towers"].items()}
    write_json(Path(args.out), {"towers": probe(towers, asked["folder"], asked["output"])})


if __name__ == "__main__":
    main()
