"""What the models of a comparison cost, measured on this machine: tokens, parameters, operations, time and memory.

    python -m llava.compare.cost SUBJECTS.json OUT.json

SUBJECTS.json: {"subjects": {NAME: {"model", "argv", "data_path", "image_folder", "base", "selection"}}, "rounds": 5},
all but the first two may be left out (see `Subject`). OUT.json: {"schema": 1, "host", "notes": [line], "costs": {NAME:
the figures of `measure`}}.
"""

import argparse
import contextlib
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

from llava.errors import LlavaError, report_errors

FIGURES = (
    *("visual_tokens", "tower_params", "total_params", "trained_params", "tower_gflops", "ttft_ms"),
    *("train_samples_per_s", "peak_memory_mb"),
)
ROUNDS = 5
SHARE = 0.5  # of the memory that is free, what the models may take that wait for their turn
COPIES = 4  # of a model's weights as saved: those that answer, and those that learn, which may be float32 of bfloat16


@dataclass(frozen=True)
class Subject:
    """A model to measure.

    Attributes:
        model: folder of the trained model, or of its LoRA adapter or projector.
        argv: of the stage that trained it, as `llava.config.resolve` takes it: CONFIG.yaml --key value ...
        data_path: LLaVA records to ask about; None: the stage's own.
        image_folder: where their image paths start.
        base: the model under a projector or an adapter; None: as the adapter names it.
        selection: a choice of patches, as `llava.eval.exact_match` takes it; None: the model's own.
    """

    model: str
    argv: list[str]
    data_path: str | None = None
    image_folder: str | None = None
    base: str | None = None
    selection: str | None = None


class Measured(NamedTuple):
    """costs: name -> {one of `FIGURES`: value}; notes: how it was measured, and what could not be."""

    costs: dict[str, dict]
    notes: list[str]


def measure(subjects: dict[str, Subject], *, rounds: int = ROUNDS, device: str | None = None) -> Measured:
    """Measure the subjects in one process, in turn: each round has one turn of each, and begins with another one.

    Args:
        subjects: by name.
        rounds: at least 1.
        device: "cuda" or "cpu"; None: cuda where there is one.

    Returns:
        costs: `visual_tokens` is what one picture takes in the language model, on average over the same pictures for
        all; `tower_params` includes a token compressor; `trained_params` those that learn in the stage; `tower_gflops`
        is 2 x multiply-adds of one image at the encoder's own size, or of the pictures where it has none. The others
        are {"median", "p25", "p75"}: `ttft_ms` from a decoded picture to the first token, batches of one;
        `train_samples_per_s` of forward, backward and optimizer step; `peak_memory_mb` of such steps in 2^20 bytes.
        What cannot be measured is None, with a line in the notes; it keeps no other subject from being measured.

    Raises:
        LlavaError: no subjects, or rounds below 1.
    """
    import torch
    from tqdm import tqdm

    if not subjects or rounds < 1:
        raise LlavaError(f"cost: found {len(subjects)} subjects and {rounds} rounds, expected at least one of each")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    names = list(subjects)
    with tempfile.TemporaryDirectory(prefix="llava-cost-") as folder:
        folders = [f"{folder}/{at}" for at in range(len(names))]
        entries = {name: _Entry(name, subjects[name], at, device) for name, at in zip(names, folders, strict=True)}
        kept = _fit(subjects.values()) and len({entry.precision for entry in entries.values()} - {None}) <= 1
        with tqdm(total=rounds * len(names), desc="cost", unit="turn") as bar:
            for at in range(rounds):
                first = at % len(names)
                for name in names[first:] + names[:first]:
                    entries[name].turn(kept)
                    bar.update()
        for entry in entries.values():
            entry.drop()
    costs = {name: entry.cost() for name, entry in entries.items()}
    notes = [f"{entry.name}: {note}" for entry in entries.values() for note in entry.notes]
    return Measured(costs, [_how(rounds, device, kept), *notes])


def _how(rounds: int, device: str, kept: bool) -> str:
    where = "in the host's memory" if kept else "not loaded"
    alone = "one model is on the device at a time; " if device == "cuda" else ""
    resident = "" if device == "cuda" else "; memory: the weights, and what the process grows by in steps"
    return (
        f"cost: {rounds} rounds, the models in turn in one process on {_device_name(device)}; {alone}those that wait "
        f"for their turn are {where}; training: one micro-batch for each optimizer step, without the reading of data"
        + resident
    )


def _fit(subjects) -> bool:
    """Whether all models may wait in the host's memory, by the sizes of their files; not where those are elsewhere."""
    import psutil

    from llava.model.lora import is_lora

    subjects = list(subjects)
    if any(subject.base or is_lora(subject.model) for subject in subjects):
        return False
    files = {file for subject in subjects for file in Path(subject.model).glob("*.safetensors")}
    needed = sum(file.stat().st_size for file in files) * COPIES
    return needed <= SHARE * psutil.virtual_memory().available


class _Entry:
    """A subject, what measures it, and what is found."""

    def __init__(self, name: str, subject: Subject, folder: str, device: str):
        self.name, self.subject, self.folder, self.device = name, subject, folder, device
        self.found, self.notes = dict.fromkeys(FIGURES), []
        self.asking = self.stepping = None  # None after a failure, too
        self.precision = None  # accelerate has one for all trainers that there are in a process
        with self._told("its settings"):
            from llava.compare.asking import Asking
            from llava.compare.stepping import Stepping
            from llava.config import resolve

            run = resolve(list(subject.argv))
            self.asking, self.stepping = Asking(subject, run, device), Stepping(subject.argv, folder, device)
            self.precision = run["bf16"], run["fp16"]
            if run["deepspeed"]:
                self.notes.append("its run uses DeepSpeed; a step is measured on one device without")

    def turn(self, kept: bool) -> None:
        """One of each of its measurements."""
        if self.asking is not None and not self._alone(self.asking, self._ask, kept, "asking it"):
            self.asking = None
        if self.stepping is not None and not self._alone(self.stepping, self._step, kept, "a training step"):
            self.stepping = None

    def _alone(self, unit, measure, kept: bool, what: str) -> bool:
        """Run `measure` with the unit on the device; whether it could be. No other is there meanwhile."""
        with self._told(what):
            unit.load()
            measure()
            unit.rest() if kept else unit.drop()
            self._collect()
            return True
        unit.drop()
        self._collect()
        return False

    def _collect(self) -> None:
        import torch

        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    @contextlib.contextmanager
    def _told(self, what: str):
        """What fails inside is a note; the other subjects are measured all the same."""
        try:
            yield
        except Exception as error:
            kind = "" if isinstance(error, LlavaError) else f"{type(error).__name__}: "
            line = " ".join(str(error).split())[:300]
            self.notes.append(f"{what} cannot be measured: {kind}{line}")
            print(f"{self.name}: {self.notes[-1]}", file=sys.stderr)

    def _ask(self) -> None:
        if self.found["total_params"] is None:
            self.found |= self.asking.facts()
            with self._told("tower_gflops"):
                self.found["tower_gflops"], own = self.asking.gflops()
                if not own:
                    self.notes.append("its encoder has no size of its own: tower_gflops is of the pictures on average")
        self.asking.measure()
        self._keep(self.asking)

    def _step(self) -> None:
        asked = self.stepping.rows
        self.found["trained_params"] = self.stepping.trained_params
        self.stepping.measure()
        self._keep(self.stepping)
        if asked is not None and self.stepping.rows < asked:
            self.notes.append(f"a batch of {asked} does not fit, its steps are of {self.stepping.rows}")

    def _keep(self, unit) -> None:
        for name, values in unit.figures.items():
            self.found[name] = values

    def drop(self) -> None:
        for unit in (self.asking, self.stepping):
            if unit is not None:
                unit.drop()

    def cost(self) -> dict:
        """Its figures, lists of measurements as their median and quartiles."""
        cost = {}
        for name, value in self.found.items():
            cost[name] = spread(value, digits=6) if isinstance(value, list) else value
            if isinstance(value, list) and cost[name] is None:
                self.notes.append(f"{name} cannot be measured on this machine")
        return cost


def spread(values: list, digits: int = 6) -> dict | None:
    """{"median", "p25", "p75"} of measurements (quartiles by linear interpolation); None where one is missing."""
    if not values or None in values:
        return None
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {name: float(f"{value:.{digits}g}") for name, value in (("median", middle), ("p25", low), ("p75", high))}


def _device_name(device: str) -> str:
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"a CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def read_subjects(path: str) -> tuple[dict[str, Subject], int]:
    """The subjects of a file, and how many rounds it asks for.

    Raises:
        LlavaError: it is not what it should be.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LlavaError(f"{path}: cannot be read ({error}), expected JSON of subjects") from None
    subjects = content.get("subjects") if isinstance(content, dict) else None
    if not isinstance(subjects, dict):
        raise LlavaError(f'{path}: found no mapping "subjects", expected one from name to subject')
    known = [field.name for field in fields(Subject)]
    made = {}
    for name, values in subjects.items():
        if not isinstance(values, dict) or not {"model", "argv"} <= values.keys() <= set(known):
            raise LlavaError(f"{path}: {name}: found {values!r:.200}, expected model, argv and some of {known[2:]}")
        made[name] = Subject(**values)
    return made, content.get("rounds", ROUNDS)


@report_errors
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        *("python -m llava.compare.cost",),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("subjects", metavar="SUBJECTS.json", help="what to measure")
    parser.add_argument("output", metavar="OUT.json", help="file to write")
    args = parser.parse_args(argv)
    subjects, rounds = read_subjects(args.subjects)
    # one device: of several a trainer in one process would take all
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]

    from transformers.utils import logging

    from llava.train.checkpoints import write_json

    logging.disable_progress_bar()  # of each loading, among the turns of this one
    costs, notes = measure(subjects, rounds=rounds)
    Path(args.output).resolve().parent.mkdir(parents=True, exist_ok=True)
    write_json(Path(args.output), {"schema": 1, "host": platform.node(), "notes": notes, "costs": costs})


if __name__ == "__main__":
    main()
