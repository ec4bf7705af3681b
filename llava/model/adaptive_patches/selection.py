"""Which patches are kept: a cover of the grid by patches of several sizes, chosen from importance maps.

A level is a patch size: 1 the base patch, 2 twice, 3 four times its side, ... All three selections take `maps`
{size in pixels: [B, h, w]} as `importance` makes them, and return `(masks, levels)`:

- masks: {size: bool [B, h, w]}, True where a patch of this size is kept; together they cover every base cell once
- levels: uint8 [B, H1, W1], the level of the patch that covers a base cell

A patch of a higher level that does not fit (it reaches over the end of the grid, or has or holds importance `OUTSIDE`)
is always split; what of its children lies outside the grid does not exist. A base cell is never split, and so it stays
even where the image ends inside it. Importances are averaged as whole numbers of billionths: the selection does not
depend on the device.
"""

import math

import torch

from llava.config.patch_choice import check_thresholds, number
from llava.errors import LlavaError
from llava.model.adaptive_patches.importance import OUTSIDE

UNITS = 1e9  # of the whole numbers that importances are compared in


def select_patches_by_threshold(maps, thresholds):
    """v1: the largest patch whose importance is below its level's threshold.

    Args:
        maps: {size: [B, h, w]}.
        thresholds: one for each size above the base, the smaller size first: [3.0, 2.0] is for 28 and 56 pixels.

    Returns:
        (masks, levels).

    Raises:
        LlavaError: maps that do not fit together or hold NaN, another number of thresholds, a threshold of NaN.
    """
    scales = _scales(maps)
    thresholds = check_thresholds(thresholds, len(scales))
    fits = _fits(scales)
    split = [~fit | ~(values < limit) for values, fit, limit in zip(scales[1:], fits, thresholds, strict=True)]
    return _cover(maps, split)


def select_patches_by_threshold_v2(maps, alpha):
    """v2: one threshold for all levels of an image, alpha * mean of its importances at the largest size.

    Patches that stick out do not count in the mean; an image that has no other at that size is all base patches. A
    HIGHER alpha merges more, so that fewer tokens are left; at alpha 1 an image of one importance everywhere, a blank
    one too, is not merged at all, since none is below the mean.

    Args:
        maps: {size: [B, h, w]}.
        alpha: a number >= 0, or one for each image.

    Returns:
        (masks, levels).

    Raises:
        LlavaError: maps that do not fit together or hold NaN, alpha below 0 or NaN.
    """
    scales = _scales(maps)
    alpha = scales[0].new_tensor(alphas_of(alpha, len(scales[0])), dtype=torch.float64)
    inside = scales[-1] < OUTSIDE
    total = (_whole(scales[-1]) * inside).sum((1, 2))
    count = inside.sum((1, 2))
    limit = alpha * (total.double() / count.clamp(min=1))
    limit = torch.where(count > 0, limit, -math.inf)[:, None, None]
    split = [~fit | ~(_whole(values) < limit) for values, fit in zip(scales[1:], _fits(scales), strict=True)]
    return _cover(maps, split)


def select_patches_by_budget(maps, alpha=None, budget=None):
    """budget: as many tokens as the budget allows, spent where the base patches are most important.

    Starting from the largest patches that fit, the best are split into four, three tokens more each time, in the order:
    score descending, then larger before smaller, then row-major. A level 2 patch scores the mean of its base patches, a
    larger one the same or the best score of its children if that is more. Never more than the budget, and at most two
    tokens less, unless the cover to start from needs more already: then that is the result.

    Args:
        maps: {size: [B, h, w]}; scores are of the base map alone, the others tell only what sticks out.
        alpha: budget as a share of the base grid, Python's round(alpha * H1 * W1) (halves to even); above 1 acts as 1.
            A number, or one for each image.
        budget: the budget itself in tokens, a whole number or one for each image; more than H1 * W1 acts as that.

    Returns:
        (masks, levels).

    Raises:
        LlavaError: both or neither of alpha and budget, one below 0 or NaN, maps that do not fit together or hold NaN.
    """
    masks, levels, _ = budget_selection(maps, alpha, budget)
    return masks, levels


def select_all_patches(maps):
    """all: every base patch, for comparison.

    Returns:
        (masks, levels).
    """
    return _cover(maps, [torch.ones_like(values, dtype=torch.bool) for values in _scales(maps)[1:]])


def budget_selection(maps, alpha=None, budget=None):
    """As `select_patches_by_budget`, with the figures behind it.

    Returns:
        (masks, levels, info): info holds tensors [B] on the CPU: base_tokens (of the cover to start from),
        base_small_tokens (H1 * W1), budget, k (splits made), used_tokens, and alpha (where a budget was given, its
        share of the grid).
    """
    scales = _scales(maps)
    batch, height, width = scales[0].shape
    alphas, budgets = _budgets(alpha, budget, batch, height, width)
    forced = [~fit for fit in _fits(scales)]
    base = token_counts(_cover(maps, forced)[0])
    splits = ((scales[0].new_tensor(budgets, dtype=torch.int64) - base) // 3).clamp(min=0)
    masks, levels = _cover(maps, _split_best(scales, forced, splits))
    info = {
        "base_tokens": base,
        "base_small_tokens": torch.full((batch,), height * width),
        "budget": torch.tensor(budgets, dtype=torch.int64),
        "k": splits,
        "alpha": torch.tensor(alphas, dtype=torch.float64),
        "used_tokens": token_counts(masks),
    }
    return masks, levels, {name: values.cpu() for name, values in info.items()}


def token_counts(masks):
    """Kept patches of each image, int64 [B]."""
    return sum(mask.sum((1, 2)) for mask in masks.values())


def alphas_of(alpha, batch: int) -> list[float]:
    """alpha of each image; `LlavaError` for one below 0, NaN or infinite, or another number of them."""
    values = _per_image("alpha", alpha, batch)
    if any(not 0 <= value < math.inf for value in values):
        raise LlavaError(f"alpha: found {alpha!r}, expected a number that is 0 or more")
    return [float(value) for value in values]


def _per_image(name: str, value, batch: int) -> list:
    if hasattr(value, "tolist"):  # of torch or numpy
        value = value.tolist()
    values = list(value) if isinstance(value, (list, tuple)) else [value] * batch
    if len(values) != batch or any(number(x) is None for x in values):
        raise LlavaError(f"{name}: found {value!r}, expected a number, or one for each of {batch} images")
    return values


def _budgets(alpha, budget, batch: int, height: int, width: int) -> tuple[list[float], list[int]]:
    if (alpha is None) == (budget is None):
        raise LlavaError(f"alpha, budget: found {alpha!r}, {budget!r}, expected one of the two")
    if alpha is not None:
        alphas = alphas_of(alpha, batch)
        return alphas, [round(min(value, 1) * height * width) for value in alphas]
    budgets = _per_image("budget", budget, batch)
    if any(not 0 <= value < math.inf or int(value) != value for value in budgets):
        raise LlavaError(f"budget: found {budget!r}, expected a whole number of tokens, 0 or more")
    budgets = [min(int(value), height * width) for value in budgets]
    return [value / (height * width) for value in budgets], budgets


def _scales(maps) -> list[torch.Tensor]:
    """The maps, of the base size first, after a look at whether they fit together."""
    if not isinstance(maps, dict) or not maps or any(getattr(values, "ndim", 0) != 3 for values in maps.values()):
        raise LlavaError("maps: expected {patch size in pixels: tensor [B, h, w]}")
    sizes = sorted(maps)
    batch, height, width = maps[sizes[0]].shape
    expected = {sizes[0] << level: (batch, -(-height >> level), -(-width >> level)) for level in range(len(sizes))}
    # (-h >> level) rounds down, so that its negative rounds up
    found = {size: tuple(maps[size].shape) for size in sizes}
    if found != expected:
        raise LlavaError(f"maps: found {found}, expected sizes that double and grids that halve: {expected}")
    if any(bool(values.isnan().any()) for values in maps.values()):
        raise LlavaError("maps: found NaN among the importances")
    return [maps[size] for size in sizes]


def _whole(values):
    """Importances as whole numbers of billionths, int64."""
    return (values.double().clamp(-OUTSIDE, OUTSIDE) * UNITS).round().long()


def _halved(values, reduce, fill):
    """`reduce` over the 2x2 children of [B, h, w] -> [B, ceil(h/2), ceil(w/2)], `fill` where not all four exist."""
    batch, height, width = values.shape
    whole = values[:, : height // 2 * 2, : width // 2 * 2].unflatten(1, (-1, 2)).unflatten(3, (-1, 2))
    out = values.new_full((batch, -(-height // 2), -(-width // 2)), fill)
    out[:, : height // 2, : width // 2] = reduce(whole, (2, 4))
    return out


def _doubled(values, like):
    """[B, h, w] -> the grid of the next lower level, whose shape is that of `like`."""
    _, height, width = like.shape
    return values.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, :height, :width]


def _fits(scales) -> list[torch.Tensor]:
    """For each level above the first, bool [B, h, w]: the patch lies in the grid, and the image reaches that far."""
    fits, below = [], scales[0] < OUTSIDE
    for values in scales[1:]:
        below = _halved(below, torch.all, False) & (values < OUTSIDE)
        fits.append(below)
    return fits


def _cover(maps, split):
    """(masks, levels) of the cover in which exactly the patches of `split` (levels above the first) are split."""
    sizes = sorted(maps, reverse=True)
    masks, levels = {}, None
    for size, divided in zip(sizes, [*reversed(split), None], strict=True):
        level = len(sizes) - len(masks)
        grid = maps[size]
        present = torch.ones_like(grid, dtype=torch.bool) if levels is None else _doubled(levels == 0, grid)
        kept = present if divided is None else present & ~divided
        # 0 where a smaller patch will be
        levels = (kept * level).to(torch.uint8) if levels is None else _doubled(levels, grid) + (kept * level).byte()
        masks[size] = kept
    return {size: masks[size] for size in reversed(sizes)}, levels


def _split_best(scales, forced, splits):
    """`forced`, and besides it the `splits` [B] best of each image in the order of `select_patches_by_budget`."""
    last = torch.iinfo(torch.int64).min  # comes after all patches that can be chosen
    height = len(scales)
    sums, best, scores = _whole(scales[0]), None, []
    for level, must in enumerate(forced, start=2):
        sums = _halved(sums, torch.sum, 0)
        score = sums << 2 * (height - level)  # means, all times the cells of a patch of the highest level
        if best is not None:
            score = torch.maximum(score, _halved(best, torch.amax, last))
        best = score.masked_fill(must, last)
        scores.append(best)
    if not scores:
        return []
    ranked = torch.cat([score.flatten(1) for score in reversed(scores)], 1)
    ranked = ranked.argsort(dim=1, descending=True, stable=True)
    take = torch.arange(ranked.shape[1], device=ranked.device) < splits[:, None]
    chosen = torch.zeros_like(take).scatter_(1, ranked, take)
    chosen = chosen.split([score[0].numel() for score in reversed(scores)], 1)
    return [must | part.view(must.shape) for must, part in zip(forced, reversed(chosen), strict=True)]
