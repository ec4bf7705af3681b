"""How things moved from one frame to the next: vectors out of a decoder or by block matching, and what they leave over.

All maps are small luma maps [h, w] of uint8, both sides multiples of the block side. A field is float32 [h/block,
w/block, 2] of (dx, dy), in pixels of the map: by how much the content of a block moved since the earlier map.
"""

import numpy as np

_COARSE = 4  # the camera's motion is looked for in maps of a quarter of the size ...
_REACH = 4  # ... over so many of their pixels to each side
_CLEAR, _SPREAD = 4, 0.4  # grey levels; share of the columns, times that of the rows, in which the picture moves
_AS_GOOD = 1.05  # times the least mismatch
_NOISE = 2  # grey levels of mismatch above which it counts how little a block's own motion helps
_OWN, _LEAST = 0.6, 0.5  # a block moves by itself if that leaves less than this share of the mismatch, and grey level


def exported_field(vectors: np.ndarray, rows: int, columns: int, unit: int) -> tuple[np.ndarray, np.ndarray]:
    """Vectors as FFmpeg exports them, those that point into the past, on a grid of `unit` pixels of the picture.

    Args:
        vectors: structured array with FFmpeg's names: source, w, h, dst_x, dst_y, motion_x, motion_y, motion_scale.
        rows, columns: of the grid.

    Returns:
        field [rows, columns, 2] of (dx, dy) in pixels of the picture, over the distance to whichever frame the codec
        took for reference, and [rows, columns], whether a block has one.
    """
    past = vectors[vectors["source"] < 0]
    scale = -np.maximum(past["motion_scale"], 1).astype(np.float32)  # the codec points to where it came from
    moved = np.empty(len(past), np.complex64)  # a pair that is put in its place at once
    moved.real, moved.imag = past["motion_x"] / scale, past["motion_y"] / scale
    widths, heights = past["w"].astype(np.int64), past["h"].astype(np.int64)
    left, top = (past["dst_x"] - widths // 2) // unit, (past["dst_y"] - heights // 2) // unit
    field = np.zeros((rows + 1, columns + 1), np.complex64)  # the last ones are for what lies outside
    known = np.zeros(field.shape, bool)
    sizes = heights * 1024 + widths
    for size in np.flatnonzero(np.bincount(sizes)) if len(sizes) else ():
        members = np.flatnonzero(sizes == size)
        down, across = (np.arange(max(side // unit, 1)) for side in divmod(size, 1024))
        y, x = top[members, None, None] + down[:, None], left[members, None, None] + across
        y, x = np.where((y < 0) | (y > rows), rows, y), np.where((x < 0) | (x > columns), columns, x)
        field[y, x], known[y, x] = moved[members, None, None], True
    return field[:rows, :columns, None].view(np.float32), known[:rows, :columns]


def matched_fields(now, before, block: int, radius: int) -> tuple[list, list]:
    """Vectors by full search over +-`radius` pixels around the motion of the whole picture.

    The picture moves if most of what is not flat in it moves alike, and that is not in one place alone; else it
    stands still. A block has the picture's motion unless another leaves a clearly smaller difference, so that flat
    ones and noise do not move.

    Returns:
        The motion (dx, dy) of most of the picture in whole pixels and in parts of them, and so the fields.
    """
    height, width = now.shape
    guess = (0, 0)
    if min(now.shape) >= 4 * _COARSE:
        guess = tuple(_COARSE * shift for shift in _first_guess(_small(now), _small(before)))
    rows, columns = (
        np.clip(np.arange(-radius, side + radius) - shift, 0, side - 1)
        for side, shift in zip((height, width), guess, strict=True)
    )
    wide, side = before[rows[:, None], columns], 2 * radius + 1
    costs = np.empty((side, side, height // block, width // block), np.uint32)
    windows = np.lib.stride_tricks.sliding_window_view(wide, (height, width))
    for i in range(side):
        costs[i] = _block_sums(_absolute(now, windows[i]), block)
    at = costs.reshape(side * side, *costs.shape[2:])
    totals = at.sum((1, 2)).astype(np.float64)
    common, still = int(totals.argmin()), (guess[0] + radius, guess[1] + radius)
    if max(still) < side and min(still) >= 0:
        still = still[0] * side + still[1]
        margin = _LEAST * block * block
        if not _everywhere(at[common] + margin < at[still], at[still] + margin < at[common]):
            common = still
    i, j = np.divmod(np.arange(side * side), side)
    nearest = np.argsort((i - common // side) ** 2 + (j - common % side) ** 2, kind="stable")
    ranks = np.argsort(nearest).astype(np.uint32)[:, None, None]
    least = ((at << 8) | ranks).min(0)  # of equal costs the motion nearest the picture's; there are less than 256
    moves = (least >> 8) + _LEAST * block * block < _OWN * at[common]
    chosen = np.where(moves, nearest[least & 255], common)
    i, j = np.divmod(chosen, side)
    part_i, part_j = _parts(costs, i, j)
    whole = [[common]] // np.int64(side), [[common]] % np.int64(side)
    most_i, most_j = (part[0, 0] for part in _parts(totals.reshape(side, side, 1, 1), *whole))

    def vectors(i, j):
        return np.stack([guess[1] + radius - j, guess[0] + radius - i], -1).astype(np.float32)

    i, j = i.astype(np.float32), j.astype(np.float32)
    parts = vectors(i + np.where(moves, part_i, most_i), j + np.where(moves, part_j, most_j))
    most = np.array(divmod(common, side), np.float32)
    return [vectors(*most), vectors(most[0] + most_i, most[1] + most_j)], [vectors(i, j), parts]


def leftover(now, before, camera, fields: list, block: int, still=None) -> tuple[np.ndarray, np.ndarray]:
    """|now - before moved| as uint8 [h, w], and the field by which it is moved.

    A block that does not move with the camera (dx, dy) in the first of `fields` takes the first of them that leaves
    about as little as any, but the camera's motion where its own helps little against much: noise. `still` is what
    blocks that move with the camera have in that field, where it is not the camera's motion itself.
    """
    rest = _absolute(now, _shifted(before, *camera))
    chosen = np.empty(fields[0].shape, np.float32)
    chosen[:] = camera
    at_rest = camera if still is None else still
    own_x, own_y = (np.abs(fields[0][..., axis] - at_rest[axis]) > 1e-3 for axis in (0, 1))
    rows, columns = np.nonzero(own_x | own_y)
    if not len(rows):
        return rest, chosen
    offsets = np.arange(block, dtype=np.int32)
    y, x = ((blocks[:, None] * block + offsets).astype(np.int32) for blocks in (rows, columns))
    places = y[:, :, None], x[:, None, :]
    here = now[places]
    best = vectors = least = None
    for field in fields:
        candidate = field[rows, columns]
        other = _absolute(here, _gathered(before, y, x, candidate))
        sums = other.sum((1, 2), dtype=np.float32)
        if best is None:
            best, vectors, least = other, candidate, sums
        else:
            better = sums + _LEAST * block * block < least
            best[better], vectors[better], least[better] = other[better], candidate[better], sums[better]
    others = rest[places]
    sums = others.sum((1, 2), dtype=np.float32)
    back = (sums > _NOISE * block * block) & (least + _LEAST * block * block > _OWN * sums)
    best[back], vectors[back] = others[back], camera
    rest[places], chosen[rows, columns] = best, vectors
    return rest, chosen


def camera_motion(now: np.ndarray, before: np.ndarray, candidates: list) -> np.ndarray:
    """The (dx, dy) of these under which the whole picture fits best; the first if it is about as good."""
    if len(candidates) == 1 or not np.ptp(candidates, 0).any():
        return candidates[0]
    off = [int(_absolute(now, _shifted(before, *each)).sum(dtype=np.int64)) for each in candidates]
    return candidates[0 if off[0] <= _AS_GOOD * min(off) else int(np.argmin(off))]


def _gathered(before: np.ndarray, y: np.ndarray, x: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """uint8 [n, block, block]: the pixels of n blocks, of rows y and columns x [n, block], each moved by (dx, dy):
    between their four neighbours, those of the edge going on outside."""
    height, width = before.shape
    from_y, part_y = _between(y - moved[:, 1, None], height)
    from_x, part_x = _between(x - moved[:, 0, None], width)
    flat, part_x = before.reshape(-1), part_x[:, None, :]
    beside = (from_x < width - 1).astype(np.int32)[:, None, :]
    lines = []
    for line in (from_y * width, np.minimum(from_y + 1, height - 1) * width):
        first = line[:, :, None] + from_x[:, None, :]
        left = flat[first].astype(np.float32)
        lines.append(left + (flat[first + beside] - left) * part_x)
    return (lines[0] + (lines[1] - lines[0]) * part_y[:, :, None] + np.float32(0.5)).astype(np.uint8)


def _shifted(before: np.ndarray, dx: float, dy: float) -> np.ndarray:
    """The map moved as a whole, likewise."""
    if dx == 0 and dy == 0:
        return before
    height, width = before.shape
    y, part_y = _between(np.arange(height) - np.float32(dy), height)
    x, part_x = _between(np.arange(width) - np.float32(dx), width)
    if not part_y.any() and not part_x.any():
        return before[y[:, None], x]
    moved = before[y].astype(np.float32)
    if part_y.any():
        moved += (before[np.minimum(y + 1, height - 1)] - moved) * part_y[:, None]
    if part_x.any():
        left = moved.take(x, 1)
        moved = left + (moved.take(np.minimum(x + 1, width - 1), 1) - left) * part_x
    return (moved + np.float32(0.5)).astype(np.uint8)


def _between(places: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """(the pixel before each place, how far it lies towards the next), places outside being those of the edge."""
    places = np.clip(places, 0, side - 1).astype(np.float32)
    first = places.astype(np.int32)
    return first, places - first


def _first_guess(now: np.ndarray, before: np.ndarray) -> tuple[int, int]:
    """(down, across) of a coarse picture as a whole, int16 maps."""
    guess = whole_shift(now, before, _REACH)
    stands, moves = np.abs(now - before), np.abs(now - np.roll(before, guess, (0, 1)))
    return guess if _everywhere(moves + _CLEAR < stands, stands + _CLEAR < moves) else (0, 0)


def _everywhere(better: np.ndarray, worse: np.ndarray) -> bool:
    """Whether the blocks for which a motion is better than none are the most of those that tell, and are spread over
    the picture: something that moves before a flat wall is not the camera."""
    across, down = ((better.mean(axis) > 0.1).mean() for axis in (0, 1))
    return bool(better.sum() > worse.sum() and across * down > _SPREAD)


def whole_shift(now: np.ndarray, before: np.ndarray, reach: int) -> tuple[int, int]:
    """(down, across), by how many pixels, up to `reach`, the content of a map of signed numbers moved as a whole."""
    reach = min(reach, (min(now.shape) - 2) // 2)
    inner = now[reach : now.shape[0] - reach, reach : now.shape[1] - reach]
    windows = np.lib.stride_tricks.sliding_window_view(before, inner.shape)
    off = np.abs(windows - inner).mean((2, 3))
    off[reach, reach] -= 0.1  # a picture that is flat, or noise, stands still
    down, across = np.unravel_index(off.argmin(), off.shape)
    return int(reach - down), int(reach - across)


def median_vector(vectors: np.ndarray, where=None) -> np.ndarray:
    """float32 (dx, dy), each the median of [rows, columns, 2], of those in the mask `where`."""
    pairs = vectors.view(np.complex64)[..., 0]
    pairs = pairs if where is None else pairs[where]
    return np.array([np.median(pairs.real), np.median(pairs.imag)], np.float32)


def _parts(costs: np.ndarray, i: np.ndarray, j: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far beside the least of [side, side, ...] costs, found at (i, j), the true minimum lies: lines of one slope
    through the three values (equiangular fit, for sums of absolute differences)."""
    side = costs.shape[0]
    rows, columns = np.ogrid[: i.shape[0], : i.shape[1]]
    middle = costs[i, j, rows, columns].astype(np.float32)

    def part(before, after, inside):
        slope = np.maximum(before, after) - middle
        beside = np.where(inside & (slope > 0), (before - after) / (2 * np.where(slope > 0, slope, 1)), 0)
        return np.clip(beside, -0.5, 0.5)

    def cost(y, x):
        return costs[np.clip(y, 0, side - 1), np.clip(x, 0, side - 1), rows, columns].astype(np.float32)

    down = part(cost(i - 1, j), cost(i + 1, j), (i > 0) & (i < side - 1))
    across = part(cost(i, j - 1), cost(i, j + 1), (j > 0) & (j < side - 1))
    return down, across


def _absolute(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.maximum(a, b) - np.minimum(a, b)


def _block_sums(values: np.ndarray, block: int) -> np.ndarray:
    """uint32 [..., h/block, w/block] of uint8 [..., h, w], `block` 4 or 8: four pixels at once, as two 16-bit halves
    of a word."""
    words = np.ascontiguousarray(values).view(np.uint32)
    halves = words & 0x00FF00FF
    words = words >> 8
    words &= 0x00FF00FF
    halves += words
    total = halves[..., ::block, :].copy()
    for at in range(1, block):
        total += halves[..., at::block, :]
    sums = (total & 0xFFFF) + (total >> 16)
    return sums if block == 4 else sums[..., ::2] + sums[..., 1::2]


def _small(values: np.ndarray) -> np.ndarray:
    """A quarter of the size, int16."""
    height, width = (side - side % _COARSE for side in values.shape)
    return (_block_sums(values[:height, :width], _COARSE) // _COARSE**2).astype(np.int16)
