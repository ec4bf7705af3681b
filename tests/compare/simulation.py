"""Simulated comparisons whose truth is known: towers trained with several seeds answer questions about images.

An answer is right where a sum of normal parts is above zero: the tower's skill, the run's luck (seed), how hard the
image is (for all towers, and for this one), how hard the question is, and noise of its own.
"""

import math

import numpy as np

from llava.compare.statistics import estimate, share_interval, summarise

# standard deviations: of the image for all towers, the image for one tower, the question, the single answer
IMAGE, IMAGE_AND_TOWER, QUESTION, NOISE = 0.8, 0.5, 0.5, 0.6
_LATENT = math.sqrt(IMAGE**2 + IMAGE_AND_TOWER**2 + QUESTION**2 + NOISE**2)


def sizes_of_images(rng, questions: int, most: int = 5) -> np.ndarray:
    """Numbers of questions on each image, 1 to `most`, `questions` in all."""
    sizes = []
    while sum(sizes) < questions:
        sizes.append(min(int(rng.integers(1, most + 1)), questions - sum(sizes)))
    return np.array(sizes)


def answers(rng, studies: int, skills: list[float], seed_spreads: list[float], seeds: list[int], sizes) -> list:
    """[studies, seeds, images] numbers of right answers, of each tower; images and questions are the same for all.

    Args:
        skills, seed_spreads, seeds: of each tower, its skill, the standard deviation over seeds, the number of seeds.
    """
    images, questions = len(sizes), int(sizes.sum())
    of_image, starts = np.repeat(np.arange(images), sizes), np.concatenate([[0], np.cumsum(sizes)[:-1]])

    def normal(spread, *shape):
        return spread * rng.standard_normal(shape, dtype=np.float32)

    hard = normal(IMAGE, studies, images)[:, of_image] + normal(QUESTION, studies, questions)
    towers = []
    for skill, spread, count in zip(skills, seed_spreads, seeds, strict=True):
        fits = hard + normal(IMAGE_AND_TOWER, studies, images)[:, of_image] + skill
        runs = [
            np.add.reduceat(
                fits + normal(spread, studies, 1) + normal(NOISE, studies, questions) > 0, starts, 1, dtype=int
            )
            for _ in range(count)
        ]
        towers.append(np.stack(runs, 1))
    return towers


def true_accuracy(skill: float, seed_spread: float) -> float:
    """Over all seeds, images and questions there could be."""
    return 0.5 * math.erfc(-skill / math.hypot(_LATENT, seed_spread) / math.sqrt(2))


def skill_for(accuracy: float, seed_spread: float) -> float:
    low, high = -20.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if true_accuracy(middle, seed_spread) < accuracy else (low, middle)
    return low


def seed_spread_for(rng, ratio: float, accuracy: float, seeds: int, sizes) -> float:
    """The standard deviation over seeds that makes the seeds' part of a difference's variance `ratio` times the rest of
    it, for two towers of this accuracy."""
    skill = skill_for(accuracy, 0.0)
    pilot = answers(rng, 300, [skill] * 2, [0.0] * 2, [seeds] * 2, sizes)
    rest = np.var(summarise(pilot[0], sizes).mean - summarise(pilot[1], sizes).mean)
    slope = math.exp(-((skill / _LATENT) ** 2) / 2) / math.sqrt(2 * math.pi) / _LATENT
    return math.sqrt(ratio * rest * seeds / 2) / slope


def coverage(rng, studies: int, seeds: int, questions: int, ratio: float, accuracies: tuple, uneven: float = 1) -> dict:
    """How often 95% intervals hold the truth: {"difference": share, "one_tower": share (of the first)}.

    Args:
        ratio: of a difference's variance, the seeds' part over the rest.
        accuracies: true ones, of two towers.
        uneven: standard deviation over seeds of the first tower, over that of the second.
    """
    sizes = sizes_of_images(rng, questions)
    spread = seed_spread_for(rng, ratio, sum(accuracies) / 2, seeds, sizes)
    spreads = [spread * factor * math.sqrt(2 / (1 + uneven**2)) for factor in (uneven, 1)]
    skills = [skill_for(accuracy, spread) for accuracy, spread in zip(accuracies, spreads, strict=True)]
    held = {"difference": 0, "one_tower": 0}
    for done in range(0, studies, 1000):
        runs = answers(rng, min(1000, studies - done), skills, spreads, [seeds] * 2, sizes)
        a, b = (summarise(sums, sizes) for sums in runs)
        for name, other, truth in (
            ("difference", b, accuracies[0] - accuracies[1]),
            ("one_tower", None, accuracies[0]),
        ):
            found = estimate(a, other, sizes)
            low, high = (found.low, found.high) if other is not None else share_interval(found, len(sizes))
            held[name] += ((low <= truth) & (truth <= high)).sum()
    return {name: float(count / studies) for name, count in held.items()}
