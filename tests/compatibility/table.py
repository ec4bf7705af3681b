"""What programs of LLaVA's and LLaVA-NeXT's users import from `llava`: each name with a check that calls it.

The table in docs/compatibility_names.json is written from here:

    python -m tests.compatibility.table docs/compatibility_names.json
"""

import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass

STATUSES = ("same", "differs", "refused")


@dataclass(frozen=True)
class Row:
    """One name.

    Attributes:
        used_in: "project: file; project: file", some of those that import or call it.
        status: "same" in what it takes and gives; "differs", as the note says; "refused": it can be imported, and used
            it says in one line that it does not exist here.
        check: called with what the name stands for, and the `World`.
    """

    name: str
    used_in: str
    status: str
    note: str
    check: Callable

    @property
    def entry(self) -> dict[str, str]:
        return {"name": self.name, "used_in": self.used_in, "status": self.status, "note": self.note}


ROWS: list[Row] = []


def name(name: str, used_in: str, status: str = "same", note: str = ""):
    """Decorate the check of a name."""

    def note_row(check):
        ROWS.append(Row(name, used_in, status, note, check))
        return check

    return note_row


def found(name: str):
    """What a dotted name stands for: a module, or what one has, or what that has."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith("llava"):
                raise
            continue
        for part in parts[end:]:
            value = getattr(value, part)
        return value
    raise AssertionError(f"{name}: not found")


def rows() -> list[Row]:
    """All rows, by name."""
    for module in ("faces", "models", "training", "programs"):
        importlib.import_module(f"tests.compatibility.{module}")
    return sorted(ROWS, key=lambda row: row.name)


def as_json() -> str:
    """The table as it is in docs/compatibility_names.json."""
    return json.dumps([row.entry for row in rows()], indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    # the checks fill the list of the module under its own name, not that of the program
    table = importlib.import_module("tests.compatibility.table")
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        file.write(table.as_json())
