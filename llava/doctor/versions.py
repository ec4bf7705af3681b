"""Which packages this project wants, from pyproject.toml or its installed metadata, and what is installed of them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from importlib import metadata

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
IMPORTED_AS = {  # where it is not the package's name with _ for -
    "pillow": "PIL",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
    "protobuf": "google.protobuf",
}


@dataclass
class Wanted:
    """Requirements of this project.

    Attributes:
        python: of Python itself, as ">=3.11".
        needed: {package: version specifier}.
        extras: {extra: {package: version specifier}}.
        tested: {package: version} of the tested set; empty without a checkout.
        checkout: whether this is a checkout that can be installed from.
    """

    python: str = ">=3.11"
    needed: dict = field(default_factory=dict)
    extras: dict = field(default_factory=dict)
    tested: dict = field(default_factory=dict)
    checkout: bool = False


def wanted() -> Wanted:
    """From the checkout that this file lies in, else from the metadata of the installed package."""
    found = Wanted()
    path = os.path.join(ROOT, "pyproject.toml")
    project = _project(path)
    if project:
        found.checkout = True
        found.python = project.get("requires-python", found.python)
        found.needed = dict(map(split, project.get("dependencies", ())))
        for extra, lines in project.get("optional-dependencies", {}).items():
            found.extras[extra] = dict(split(line) for line in lines if not line.startswith("llava["))
    else:
        for line in _installed_requirements():
            name, specifier = split(line)
            extra = re.search(r"extra\s*==\s*['\"]([\w-]+)", line)
            (found.extras.setdefault(extra.group(1), {}) if extra else found.needed)[name] = specifier
    found.tested = _constraints(os.path.join(ROOT, "constraints.txt"))
    return found


def _project(path: str) -> dict:
    try:
        import tomllib  # Python 3.11
    except ImportError:
        return {}
    try:
        with open(path, "rb") as file:
            return tomllib.load(file).get("project", {})
    except (OSError, ValueError):
        return {}


def _installed_requirements() -> list[str]:
    try:
        return metadata.requires("llava") or []
    except metadata.PackageNotFoundError:
        return []


def _constraints(path: str) -> dict:
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.split("#")[0].strip() for line in file]
    except OSError:
        return {}
    return {normal(name): version for name, _, version in (line.partition("==") for line in lines) if version}


def split(requirement: str) -> tuple[str, str]:
    """(package, version specifier) of a requirement, whose markers and extras are left out."""
    match = re.match(r"\s*([\w.-]+)\s*(?:\[[^\]]*\])?\s*\(?([^;)]*)", requirement)
    return normal(match.group(1)), match.group(2).strip().replace(" ", "")


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def module_of(package: str) -> str:
    return IMPORTED_AS.get(package, package.replace("-", "_"))


def installed(package: str) -> str | None:
    """The version of a package; None where it is not installed, "unknown" where its metadata are broken."""
    try:
        return metadata.version(package) or "unknown"
    except metadata.PackageNotFoundError:
        return None
    except Exception:  # whatever a broken folder of metadata gives
        return "unknown"


def fits(version: str, specifier: str) -> bool:
    """Whether a version is within ">=5.17,<6"; pre-releases and local parts (+cpu) count as their release."""
    for part in filter(None, specifier.split(",")):
        operator, wanted_version = re.match(r"(~=|[<>=!]=?=?)\s*(.*)", part).groups()
        found, expected = _release(version), _release(wanted_version)
        width = max(len(found), len(expected))
        found += (0,) * (width - len(found))
        padded = expected + (0,) * (width - len(expected))
        right = {
            ">=": found >= padded,
            ">": found > padded,
            "<=": found <= padded,
            "<": found < padded,
            "==": found == padded or (wanted_version.endswith(".*") and found[: len(expected)] == expected),
            "!=": found != padded,
            "~=": found >= padded and found[: len(expected) - 1] == expected[:-1],
        }.get(operator, True)
        if not right:
            return False
    return True


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", re.match(r"[\d.]*", version.split("!")[-1]).group()))
