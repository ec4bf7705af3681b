"""The suite's checks by name, and what a check is given and leaves; imports nothing heavy."""

import argparse
import importlib
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gpu_checks


@dataclass(frozen=True)
class Context:
    """What a check is given: `device` is "cuda" or "cpu", `small` asks for shapes that a CPU manages in seconds."""

    device: str
    small: bool
    options: argparse.Namespace
    root: Path
    workdir: Path


@dataclass
class Result:
    """What a check leaves: tests (with a verdict) and figures (without one), printed as they come."""

    name: str
    tests: list[dict] = field(default_factory=list)
    figures: dict[str, dict] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """A check that tested nothing has not passed."""
        return bool(self.tests) and all(test["passed"] for test in self.tests)

    def test(self, label: str, passed: bool, text: str) -> None:
        """Record a verdict; `text` holds the figures and what was expected."""
        self.tests.append({"label": label, "passed": bool(passed), "text": text})
        print(f"{'PASS' if passed else 'FAIL'} {self.name}: {label}: {text}", flush=True)

    def below(self, label: str, **pairs: tuple[float, float]) -> None:
        """One verdict over `name=(value, limit)` pairs, each value at most its limit; NaN fails."""
        text = ", ".join(f"{name} {value:.2e} (limit {limit:.0e})" for name, (value, limit) in pairs.items())
        self.test(label, all(value <= limit for value, limit in pairs.values()), text)
        self.figures.setdefault(label, {}).update({name: value for name, (value, _) in pairs.items()})

    def figure(self, label: str, **values: Any) -> None:
        """Record measured values under a label that names the shapes; None: could not be measured."""
        self.figures.setdefault(label, {}).update(values)
        shown = ", ".join(f"{name} {show(value)}" for name, value in values.items() if value is not None)
        print(f"     {self.name}: {label}: {shown}", flush=True)


def show(value: Any) -> str:
    """A figure as text: four digits, all of those before the point."""
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


@dataclass(frozen=True)
class Check:
    name: str
    run: Callable[[Context, Result], None]

    @property
    def summary(self) -> str:
        return (self.run.__doc__ or "").strip().split("\n")[0]


CHECKS: dict[str, Check] = {}


def check(name: str):
    """Decorator: register `function(context, result)` under a name; the first line of its docstring is its summary."""

    def register(function):
        if name in CHECKS:
            raise ValueError(f"check {name!r} is registered twice")
        CHECKS[name] = Check(name, function)
        return function

    return register


def load_checks() -> dict[str, Check]:
    """All checks, those of `gpu_checks.MODULES` imported, in the order of the modules."""
    place = {importlib.import_module(f"gpu_checks.{name}").__name__: at for at, name in enumerate(gpu_checks.MODULES)}
    # a module that another one imports registers its checks before its turn
    return dict(sorted(CHECKS.items(), key=lambda item: place.get(item[1].run.__module__, -1)))


def run_check(entry: Check, context: Context) -> Result:
    """Run one check; an exception is a FAIL, and the next check still runs."""
    result = Result(entry.name)
    start = time.monotonic()
    try:
        entry.run(context, result)
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        result.test("ran to its end", False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    if not result.tests:
        result.test("tested something", False, "it recorded no verdict")
    result.seconds = round(time.monotonic() - start, 2)
    return result
