"""What pyproject.toml, constraints.txt, the scripts and the texts say of Python is one thing."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
(BOUND,) = SpecifierSet(PYPROJECT["project"]["requires-python"])
LEAST = BOUND.version  # "3.N"
COMMON = (ROOT / "scripts/common.sh").read_text()
SAID = r"Python (3\.\d+)|version_info < \((3, \d+)\)"  # in words, and in programs


def said(text: str) -> set[str]:
    return {(words or numbers.replace(", ", ".")) for words, numbers in re.findall(SAID, text)}


def minor(version: str) -> int:
    return int(version.removeprefix("3."))


def test_the_linter_knows_the_least_python():
    assert BOUND.operator == ">=" and re.fullmatch(r"3\.\d+", LEAST)
    assert PYPROJECT["tool"]["ruff"]["target-version"] == "py" + LEAST.replace(".", "")


@pytest.mark.parametrize("name", ["README.md", "scripts/common.sh", "scripts/test_lmms_eval.sh"])
def test_the_least_python_is_told_here(name):
    assert said((ROOT / name).read_text()) == {LEAST}


def test_no_other_python_is_told_elsewhere():
    for path in [*(ROOT / "docs").glob("*.md"), *(ROOT / "scripts").glob("*.sh")]:
        assert said(path.read_text()) <= {LEAST}, path


def test_the_scripts_look_for_the_least_python_and_later_ones_newest_first():
    (line,) = re.findall(r"for candidate in (python3\..*?);", COMMON)
    *named, plain, plainest = line.split()
    assert (plain, plainest) == ("python3", "python")
    minors = [minor(name.removeprefix("python")) for name in named]
    assert minors == list(range(minors[0], minor(LEAST) - 1, -1))


def test_every_python_gets_the_same_pins():
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            assert pin.marker is None and [part.operator for part in pin.specifier] == ["=="], line
