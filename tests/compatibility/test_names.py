"""Every name that programs of LLaVA's and LLaVA-NeXT's users import does what the table of names says."""

import json
from pathlib import Path

import pytest

from tests.compatibility import table
from tests.compatibility.world import World

ROWS = table.rows()
FILE = Path(__file__).parents[2] / "docs" / "compatibility_names.json"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_name(row, world):
    row.check(table.found(row.name), world)


def test_the_published_table_is_this_one():
    text = FILE.read_text(encoding="utf-8")
    assert text == table.as_json(), "write it with: python -m tests.compatibility.table docs/compatibility_names.json"
    entries = json.loads(text)
    assert len({entry["name"] for entry in entries}) == len(entries) and len(entries) > 100
    for entry in entries:
        assert list(entry) == ["name", "used_in", "status", "note"] and entry["status"] in table.STATUSES
        assert entry["used_in"] and (entry["note"] or entry["status"] == "same")


def test_a_name_that_is_not_there_is_found():
    for missing in ("llava.utils.no_such_name", "llava.no_such_module.x", "llava.conversation.Conversation.nothing"):
        with pytest.raises(AttributeError):
            table.found(missing)
