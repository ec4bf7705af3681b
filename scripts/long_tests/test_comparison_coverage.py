"""How often a comparison's intervals hold the truth, over many simulated studies, as a table (scripts/test_long.sh).

    python scripts/long_tests/test_comparison_coverage.py [STUDIES]       # the table alone, 1,000 studies a cell

A row is a number of seeds, of questions (one to five on an image) and the towers' accuracy; its columns are how much of
a difference's variance comes of seeds, over what comes of images and single answers: none, a tenth, as much, ten times.
"""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from llava.compare.statistics import estimate, summarise
from tests.compare import simulation

RATIOS = (0.0, 0.1, 1.0, 10.0)
SEEDS, QUESTIONS, ACCURACIES = (2, 3, 5, 10), (100, 300, 1400), (0.6, 0.8, 0.93)


def row(studies: int, seeds: int, questions: int, accuracy: float, uneven: float = 1) -> list[dict]:
    return [
        simulation.coverage(np.random.default_rng(1), studies, seeds, questions, ratio, (accuracy,) * 2, uneven)
        for ratio in RATIOS
    ]


def bounds(seeds: int, questions: int, accuracy: float, ratio: float) -> tuple[float, float]:
    """Rare faults and two seeds without noise make intervals too long rather than too short."""
    rare_faults = accuracy > 0.9 and questions < 1000
    hardly_noisy = seeds == 2 and ratio <= 0.1
    return 0.93, 1.0 if rare_faults else 0.985 if hardly_noisy else 0.98  # 0.97, and 1,000 studies' own chance


@pytest.mark.parametrize("accuracy", ACCURACIES)
@pytest.mark.parametrize("seeds", SEEDS)
def test_differences_of_equal_towers(seeds, accuracy):
    outside = []
    for questions in QUESTIONS:
        for ratio, found in zip(RATIOS, row(1000, seeds, questions, accuracy), strict=True):
            low, high = bounds(seeds, questions, accuracy, ratio)
            if not low <= found["difference"] <= high:
                outside.append((questions, ratio, found))
    assert not outside


def test_towers_whose_seeds_vary_threefold_unevenly():
    """With two seeds the intervals are then somewhat too short; with three or more they are not."""
    for seeds, least in ((2, 0.90), (3, 0.925), (5, 0.93)):
        for found in row(2000, seeds, 300, 0.6, uneven=3):
            assert found["difference"] >= least, (seeds, found)


def test_percentile_bootstrap_over_two_seeds_is_too_short():
    """Why there is none: resampling seeds and images together, and taking 2.5 and 97.5% of what comes of it."""
    rng, studies = np.random.default_rng(0), 500
    sizes = np.ones(200, int)
    spread = simulation.seed_spread_for(rng, 10, 0.6, 2, sizes)
    skill = simulation.skill_for(0.6, spread)
    a, b = simulation.answers(rng, studies, [skill] * 2, [spread] * 2, [2, 2], sizes)
    own = estimate(summarise(a, sizes), summarise(b, sizes), sizes)
    held = 0
    for one, other in zip(a, b, strict=True):
        weights = rng.multinomial(200, np.full(200, 1 / 200), 500) / 200
        draws = [(rng.multinomial(2, [0.5, 0.5], 500) / 2 * (weights @ runs.T)).sum(1) for runs in (one, other)]
        low, high = np.quantile(draws[0] - draws[1], [0.025, 0.975])
        held += low <= 0 <= high
    assert held / studies < 0.88
    assert np.mean((own.low <= 0) & (own.high >= 0)) > 0.93


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    print(
        f"share of {count} simulated studies whose 95% interval holds the truth: of a difference, of one tower's mean"
    )
    print("accuracy  seeds  questions  " + "".join(f"seeds / images {ratio:<5g}" for ratio in RATIOS))
    for accuracy in ACCURACIES:
        for seeds in SEEDS:
            for questions in QUESTIONS:
                cells = row(count, seeds, questions, accuracy)
                told = "".join(f"{cell['difference']:8.3f} {cell['one_tower']:6.3f}     " for cell in cells)
                print(f"{accuracy:8}  {seeds:5}  {questions:9}  {told}", flush=True)
