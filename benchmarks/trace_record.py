"""Which of this project's functions one padded image passes through, from its record to its loss.

Trains one step of a tiny model on one record (`image_aspect_ratio pad`, batch of one) through the training program
itself, and lists what ran between the first sample that is asked of the data set and the end of the first
`compute_loss`.

The rule: every function of the packages `llava` and `llavavit` that was called then counts once. Properties are left
out. A comprehension, a generator expression or a lambda belongs to the function that it is written in. What runs only
because a module is imported, and code that is made at run time (dataclasses), does not count.
"""

import argparse
import contextlib
import inspect
import io
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
from llava.errors import report_errors  # noqa: E402

PACKAGES = tuple(f"{ROOT / name}/" for name in ("llava", "llavavit"))


class Tracer:
    """A profile function for `sys.setprofile`; `seen` holds the code objects in the order of their first calls.

    Attributes:
        dataset: whose first `__getitem__` starts the record; set when there is a trainer.
    """

    def __init__(self):
        self.seen: dict = {}
        self.dataset = None
        self.running = False
        self.importing = 0

    def __call__(self, frame, event, arg):
        code = frame.f_code
        if code.co_name == "<module>":
            self.importing += {"call": 1, "return": -1}.get(event, 0)
        elif event == "call":
            of_dataset = self.dataset is not None and frame.f_locals.get("self") is self.dataset
            self.running |= of_dataset and code.co_name in ("__getitem__", "__getitems__")
            if self.running and not self.importing and code not in self.seen and counts(frame):
                self.seen[code] = None
        elif event == "return" and self.running and code.co_name == "compute_loss" != frame.f_back.f_code.co_name:
            sys.setprofile(None)  # Trainer's own returns into that of its subclass


def counts(frame) -> bool:
    """Whether the frame runs a function of this project that is no property."""
    code = frame.f_code
    if not code.co_filename.startswith(PACKAGES) or code.co_name.startswith("<"):
        return False
    if not code.co_flags & inspect.CO_OPTIMIZED:  # the body of a class
        return False
    owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    getter = inspect.getattr_static(type(owner), code.co_name, None)
    getter = getattr(getter, "fget", None) or getattr(getter, "func", None)  # property, cached_property
    return getattr(getter, "__code__", None) is not code


def trace(flags: list[str]) -> list[dict]:
    """Run the training program on `flags`; [{"name", "file", "line"}] in the order of the first calls."""
    from transformers import Trainer

    from llava.train.train import train

    tracer, loader = Tracer(), Trainer.get_train_dataloader

    def watched(trainer):
        tracer.dataset = trainer.train_dataset
        made = loader(trainer)
        sys.setprofile(tracer)
        return made

    Trainer.get_train_dataloader = watched
    try:
        train(flags)
    finally:
        sys.setprofile(None)
        Trainer.get_train_dataloader = loader
    return [
        {
            "name": getattr(code, "co_qualname", code.co_name),
            "file": str(Path(code.co_filename).relative_to(ROOT)),
            "line": code.co_firstlineno,
        }
        for code in tracer.seen
    ]


def padded_image() -> list[dict]:
    """`trace` of one record with one image on a model of a few thousand weights."""
    from tests import tiny

    changes = {"image_aspect_ratio": "pad", "mm_patch_merge_type": "flat", "image_grid_pinpoints": None}
    changes |= {"per_device_train_batch_size": 1, "max_steps": 1, "dataloader_num_workers": 0}
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(said))
        stack.enter_context(contextlib.redirect_stderr(said))
        try:
            return trace(tiny.train_flags(Path(folder), "i", **changes))
        except SystemExit:
            raise SystemExit(f"error: the training run failed\n{said.getvalue()}") from None


@report_errors
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="trace_record.py", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="F", help="file to write the functions to")
    args = parser.parse_args(argv)
    functions = padded_image()
    files = sorted({function["file"] for function in functions})
    for function in functions:
        print(f"{function['file']}:{function['line']}  {function['name']}")
    print(f"total: {len(functions)} functions in {len(files)} files")
    if args.json:
        args.json.write_text(json.dumps({"schema": 1, "functions": functions, "files": files}, indent=1) + "\n")


if __name__ == "__main__":
    main()
