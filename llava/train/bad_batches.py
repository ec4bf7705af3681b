"""`bad_batches.jsonl` in a run's folder: which records were in the steps whose numbers were not right."""

import json
import math
import os
from pathlib import Path

FILE_NAME = "bad_batches.jsonl"


class BadBatches:
    """The file, one row for a rank's part of a step.

    A row is {"step": from 1, "epoch", "rank", "kind": loss | gradient | input | weight | spike, "value": the number, or
    "nan" or "inf", or a weight's name, "ids": of the rank's records}.

    Args:
        folder: the run's.
        writes: whether this rank keeps the file.
    """

    def __init__(self, folder: str, writes: bool):
        self.path, self.writes = Path(folder) / FILE_NAME, writes

    def begin(self, step: int) -> int:
        """Keep the rows of the steps that a run goes on from; those of later ones will come again.

        Returns:
            how many steps were skipped up to there; on a rank without the file 0.
        """
        if not (self.writes and self.path.is_file()):
            return 0
        rows = [row for row in map(_row, self.path.read_text().splitlines()) if row and row["step"] <= step]
        beside = self.path.with_suffix(".tmp")
        beside.write_text("".join(map(_line, rows)))
        os.replace(beside, self.path)
        return len({row["step"] for row in rows if row["kind"] not in ("spike", "weight")})

    def add(self, rows: list[dict]) -> None:
        if self.writes and rows:
            with self.path.open("a") as file:
                file.writelines(map(_line, rows))


def written(value: float) -> float | str:
    """A number as JSON can hold it."""
    return value if math.isfinite(value) else str(value)


def _line(row: dict) -> str:
    return json.dumps(row) + "\n"


def _row(line: str) -> dict | None:
    try:
        row = json.loads(line)
    except ValueError:  # the last one of a run that was killed
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) and "kind" in row else None
