"""Records that gave no sample in a run, and runs that have nothing to learn from."""

import json
import os

from llava.errors import LlavaError
from llava.utils import rank0_print

FILE_NAME = "bad_records.json"  # in a checkpoint: what was left out so far
_FEWEST = 10  # that are tolerated of any data
_LISTED = 10  # records without a label that are told one by one
_STEPS = 3  # without a label, that end a run which has had none


class LeftOut:
    """What all ranks have left out, each record once, as "id: reason".

    Attributes:
        bad: unreadable pictures and the like; more than one in a hundred, and than ten, stop the run.
        no_label: records with nothing to learn; more than every second one, and than ten, stop the run.
    """

    def __init__(self, records: int):
        self.limits = {"bad": max(_FEWEST, records // 100), "no_label": max(_FEWEST, records // 2)}
        self.bad: set[str] = set()
        self.no_label: set[str] = set()
        self._steps, self._labelled = 0, False

    def add(self, bad: list[str], no_label: list[str]) -> None:
        """Tell new ones.

        Raises:
            LlavaError: there are too many; on every rank at the same step, as all are given the same.
        """
        for record in sorted(set(bad) - self.bad):
            rank0_print(f"left out: {record}")
        for number, record in enumerate(sorted(set(no_label) - self.no_label), len(self.no_label) + 1):
            more = "; more such records are counted, not listed" if number == _LISTED else ""
            if number <= _LISTED:
                rank0_print(f"left out, nothing to learn: {record}{more}")
        self.bad.update(bad)
        self.no_label.update(no_label)
        if len(self.bad) > self.limits["bad"]:
            listed = "; ".join(sorted(self.bad))
            raise LlavaError(
                f"{len(self.bad)} bad records, more than the {self.limits['bad']} that are tolerated: {listed}"
            )
        if len(self.no_label) > self.limits["no_label"]:
            raise LlavaError(
                f"{len(self.no_label)} records have nothing to learn, more than the {self.limits['no_label']} that are "
                f"tolerated; the first: {min(self.no_label)}"
            )

    def step(self, labels: int) -> None:
        """Take note of a step's supervised tokens, over all ranks.

        Raises:
            LlavaError: the first steps have none.
        """
        self._steps += 1
        self._labelled |= labels > 0
        if not self._labelled and self._steps >= _STEPS:
            self.check_labelled()

    def check_labelled(self) -> None:
        """Refuse a run whose steps had no label at all."""
        if self._steps and not self._labelled:
            found = sorted(self.bad | self.no_label)
            why = f"; left out: {'; '.join(found[:3])}{' ...' if len(found) > 3 else ''}" if found else ""
            raise LlavaError(f"found no label in the first {self._steps} steps, expected something to learn{why}")

    def save(self, folder: str) -> None:
        if self.bad or self.no_label:
            with open(os.path.join(folder, FILE_NAME), "w") as file:
                json.dump({"bad": sorted(self.bad), "no_label": sorted(self.no_label)}, file, indent=1)

    def load(self, folder: str) -> None:
        """Go on counting from what the run that wrote this checkpoint had left out."""
        path = os.path.join(folder, FILE_NAME)
        if not os.path.isfile(path):
            return
        with open(path) as file:
            found = json.load(file)
        found = {"bad": found} if isinstance(found, list) else found  # of earlier versions
        self.bad, self.no_label = set(found["bad"]), set(found.get("no_label", ()))
