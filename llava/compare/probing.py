"""`python -m llava.compare.probing ASKED.json OUT.json`: probe the towers of training runs, in a process of its own.

ASKED.json: {"folder": labelled pictures, "output": folder for what is kept, "towers": {NAME: command line of a training
run, as `llava.config.resolve` takes it}}. OUT.json: {"towers": {NAME: what `llava.compare.probe.probe` tells}}.
"""

import json
import sys
from pathlib import Path

from llava.errors import report_errors


@report_errors
def main(argv: list[str] | None = None) -> None:
    file, out = sys.argv[1:] if argv is None else argv
    asked = json.loads(Path(file).read_text(encoding="utf-8"))

    from llava.compare.probe import probe
    from llava.config import resolve
    from llava.families.llava_geometry import run_config
    from llava.train.checkpoints import write_json

    towers = {name: run_config(resolve(words)) for name, words in asked["towers"].items()}
    write_json(Path(out), {"towers": probe(towers, asked["folder"], asked["output"])})


if __name__ == "__main__":
    main()
