"""What a report reads from a comparison's results, and how it writes numbers: the same in every file of the report.

Scores between 0 and 1 are written in percent, others as they are, both with one decimal; costs with three digits. What
was not measured, or is not a finite number, is an en dash.
"""

import json
import math
from typing import NamedTuple

NONE = "–"


def finite(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


class Unit(NamedTuple):
    """How an evaluation's scores are written: the factor they are multiplied by, and its sign."""

    factor: float
    sign: str

    def show(self, value) -> str:
        return f"{value * self.factor:.1f}" if finite(value) else NONE

    def difference(self, value) -> str:
        return f"{value * self.factor:+.1f}" if finite(value) else NONE

    def interval(self, row: dict, middle: str) -> str:
        """`row[middle]` with [low, high] where they are known."""
        show = self.difference if middle == "difference" else self.show
        if not (finite(row.get("low")) and finite(row.get("high"))):
            return show(row.get(middle))
        return f"{show(row.get(middle))} [{show(row['low'])}, {show(row['high'])}]"

    def title(self, name: str) -> str:
        return f"{name}, {self.sign}" if self.sign else name


PERCENT = Unit(100, "%")


def unit_of(values) -> Unit:
    """Percent for what lies between 0 and 1, else the numbers as they are (as MME's points)."""
    return PERCENT if all(0 <= value <= 1 for value in values if finite(value)) else Unit(1, "")


def digits(value, least: int = 3) -> str:
    """A number with `least` digits or more, never as a power of ten: 0.0123, 1.23, 12.0, 1,234; counts (int) whole."""
    if not finite(value):
        return NONE
    if value == 0 or isinstance(value, int):
        return f"{value:,.0f}"
    return f"{value:,.{max(0, least - 1 - math.floor(math.log10(abs(value))))}f}"


def count(value) -> str:
    """A count, or a mean of counts."""
    return digits(int(value) if finite(value) and float(value).is_integer() else value)


def spread(value) -> str:
    """Median with its quartiles: 12.3 (11.8 to 13.0)."""
    if not isinstance(value, dict):
        return digits(value)
    if not (finite(value.get("p25")) and finite(value.get("p75"))):
        return digits(value.get("median"))
    return f"{digits(value.get('median'))} ({digits(value['p25'])} to {digits(value['p75'])})"


def probability(value) -> str:
    if not finite(value):
        return NONE
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def plain(value) -> str:
    """Any value of a JSON file as words on one line."""
    if value is None or value == "":
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}" if math.isfinite(value) else NONE
    if isinstance(value, dict):
        return ", ".join(f"{key}: {plain(item)}" for key, item in value.items()) or NONE
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(item) for item in value) or NONE
    return " ".join(value.split()) if isinstance(value, str) else json.dumps(value)


def evaluations(results: dict) -> list[str]:
    """Names of all evaluations that any tower has, in the order of their first appearance."""
    return list(dict.fromkeys(name for tower in results["towers"] for name in tower.get("scores") or ()))


def score(tower: dict, evaluation: str) -> dict:
    """What is known of a tower in an evaluation; empty where there is nothing."""
    return (tower.get("scores") or {}).get(evaluation) or {}


def kinds(results: dict, evaluation: str) -> list[str]:
    """The kinds of questions of an evaluation, in the order of their first appearance."""
    rows = (score(tower, evaluation).get("by_kind") or {} for tower in results["towers"])
    return list(dict.fromkeys(kind for row in rows for kind in row))


def unit(results: dict, evaluation: str) -> Unit:
    """How the scores of an evaluation are written, in every table and picture."""
    values = []
    for tower in results["towers"]:
        found = score(tower, evaluation)
        values += [found.get("mean"), *(found.get("per_seed") or {}).values()]
        values += [row.get("mean") for row in (found.get("by_kind") or {}).values()]
    return unit_of(values)


def amount(numbers) -> str:
    """Numbers of questions: one where all agree, else from the least to the most."""
    known = sorted({number for number in numbers if finite(number)})
    if not known:
        return ""
    return f"n {known[0]:,}" if len(known) == 1 else f"n {known[0]:,} to {known[-1]:,}"


def several_seeds(results: dict) -> bool:
    """Whether any tower has two seeds: without, nothing is known of the noise of seeds, and no difference is marked."""
    return any((tower.get("n_seeds") or 0) > 1 for tower in results["towers"])


def cost(tower: dict, key: str):
    """A cost of a tower, of what was measured several times its median; None: not measured."""
    value = (tower.get("cost") or {}).get(key)
    value = value.get("median") if isinstance(value, dict) else value
    return value if finite(value) else None


def best(results: dict, evaluation: str) -> str | None:
    """The tower with the highest mean, where after Holm's correction it differs from every other one; else None."""
    means = {tower["name"]: score(tower, evaluation).get("mean") for tower in results["towers"]}
    means = {name: mean for name, mean in means.items() if finite(mean)}
    if len(means) < 2 or not several_seeds(results):
        return None
    first = max(means, key=means.get)
    beaten = set()
    for pair in results.get("pairs") or ():
        if pair["evaluation"] == evaluation and pair.get("significant") and finite(pair.get("difference")):
            beaten |= {pair["b"]} if pair["a"] == first and pair["difference"] > 0 else set()
            beaten |= {pair["a"]} if pair["b"] == first and pair["difference"] < 0 else set()
    return first if set(means) - {first} <= beaten else None


def front(points: dict[str, tuple[float, float]]) -> list[str]:
    """Names on the Pareto front of {name: (cost, score)}, by cost: no other is as good in both and better in one."""

    def beaten(name: str) -> bool:
        x, y = points[name]
        return any(a <= x and b >= y and (a, b) != (x, y) for a, b in points.values())

    return sorted((name for name in points if not beaten(name)), key=lambda name: points[name])
