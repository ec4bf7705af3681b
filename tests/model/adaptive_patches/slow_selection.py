"""The three selections in plain Python, one image and one patch at a time.

A patch is (level, row, column), the last two in units of its own size. Maps are lists of numpy arrays, level 1 first.
"""

from fractions import Fraction

import numpy as np

OUTSIDE = 1e6


def cells(patch, height, width):
    """Base cells of a patch that are in the grid."""
    level, row, col = patch
    side = 2 ** (level - 1)
    rows, cols = range(row * side, (row + 1) * side), range(col * side, (col + 1) * side)
    return [(r, c) for r in rows for c in cols if r < height and c < width]


def children(patch, height, width):
    level, row, col = patch
    four = [(level - 1, 2 * row + i, 2 * col + j) for i in (0, 1) for j in (0, 1)]
    return [child for child in four if cells(child, height, width)]


def fits(patch, maps):
    level, row, col = patch
    inside = cells(patch, *maps[0].shape)
    whole = len(inside) == 4 ** (level - 1) and maps[level - 1][row, col] < OUTSIDE
    return whole and all(maps[0][cell] < OUTSIDE for cell in inside)


def cover(maps, is_split):
    """Patches that are left when those of `is_split` are split, from the largest on."""
    top = len(maps)
    waiting = [(top, row, col) for row, col in np.ndindex(maps[-1].shape)]
    kept = []
    while waiting:
        patch = waiting.pop()
        if patch[0] > 1 and is_split(patch):
            waiting += children(patch, *maps[0].shape)
        else:
            kept.append(patch)
    return set(kept)


def by_threshold(maps, thresholds):
    def is_split(patch):
        level, row, col = patch
        return not fits(patch, maps) or not maps[level - 1][row, col] < thresholds[level - 2]

    return cover(maps, is_split)


def billionths(value):
    return round(float(value) * 10**9)


def by_mean(maps, alpha):
    """In whole billionths: a mean of equal numbers is that number, which floats do not promise."""
    inside = [billionths(value) for value in maps[-1].flatten() if value < OUTSIDE]
    limit = alpha * float(Fraction(sum(inside), len(inside))) if inside else -np.inf
    whole = [np.vectorize(billionths)(grid) for grid in maps]

    def is_split(patch):
        level, row, col = patch
        return not fits(patch, maps) or not whole[level - 1][row, col] < limit

    return cover(maps, is_split)


def by_budget(maps, budget):
    """(patches, tokens before the first split by choice)."""
    height, width = maps[0].shape
    kept = cover(maps, lambda patch: not fits(patch, maps))
    base = len(kept)

    def score(patch):
        values = [Fraction(float(maps[0][cell])) for cell in cells(patch, height, width)]
        mean = sum(values) / len(values)
        if patch[0] == 2:
            return mean
        return max([mean] + [score(child) for child in children(patch, height, width)])

    everywhere = [
        (level, row, col) for level in range(2, len(maps) + 1) for row, col in np.ndindex(maps[level - 1].shape)
    ]
    order = sorted((patch for patch in everywhere if fits(patch, maps)), key=lambda p: (-score(p), -p[0], p[1], p[2]))
    for patch in order[: max(0, (budget - base) // 3)]:
        kept.remove(patch)  # a KeyError where it comes before its parent
        kept |= set(children(patch, height, width))
    return kept, base


def labels_of(patches, height, width):
    labels = np.zeros((height, width), dtype=np.uint8)
    for patch in patches:
        for cell in cells(patch, height, width):
            assert labels[cell] == 0, "covered twice"
            labels[cell] = patch[0]
    return labels
