"""The merge of visual tokens into text, row by row and token by token, as its description reads.

A map is a list of rows, each a list of [D] vectors; sizes are (width, height).
"""

import math

import torch


def best_resolution(size, candidates):
    """Most pixels of the image kept, then least area wasted, then first."""
    best, best_kept, best_waste = None, 0, math.inf
    for w, h in candidates:
        scale = min(w / size[0], h / size[1])
        kept = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        waste = w * h - kept
        if kept > best_kept or (kept == best_kept and waste < best_waste):
            best, best_kept, best_waste = (w, h), kept, waste
    return best


def as_map(tokens, h, w):
    return [[tokens[y * w + x] for x in range(w)] for y in range(h)]


def flat(map_):
    return [vector for row in map_ for vector in row]


def bilinear(map_, new_h, new_w):
    h, w = len(map_), len(map_[0])

    def source(i, old, new):
        at = max((i + 0.5) * old / new - 0.5, 0.0)
        low = min(int(at), old - 1)
        return low, min(low + 1, old - 1), at - low

    out = []
    for i in range(new_h):
        y0, y1, fy = source(i, h, new_h)
        row = []
        for j in range(new_w):
            x0, x1, fx = source(j, w, new_w)
            top = map_[y0][x0] * (1 - fx) + map_[y0][x1] * fx
            bottom = map_[y1][x0] * (1 - fx) + map_[y1][x1] * fx
            row.append(top * (1 - fy) + bottom * fy)
        out.append(row)
    return out


def pool2(map_, mode):
    """2x2 windows with stride 2; what does not fill a window is left out."""
    out = []
    for y in range(0, len(map_) - 1, 2):
        row = []
        for x in range(0, len(map_[0]) - 1, 2):
            window = torch.stack([map_[y][x], map_[y][x + 1], map_[y + 1][x], map_[y + 1][x + 1]])
            row.append(window.mean(0) if mode == "average" else window.max(0).values)
        out.append(row)
    return out


def unpad(map_, size):
    h, w = len(map_), len(map_[0])
    if size[0] / size[1] > w / h:
        cut = (h - int(size[1] * (w / size[0]))) // 2
        return map_[cut : h - cut]
    cut = (w - int(size[0] * (h / size[1]))) // 2
    return [row[cut : w - cut] for row in map_]


def video_tokens(frames, grid, newline, rules):
    kind, position, out = rules["mm_patch_merge_type"], rules["mm_newline_position"], []
    for frame in frames:
        map_ = as_map(frame, *grid)
        if rules["mm_spatial_pool_mode"] == "bilinear":
            map_ = bilinear(map_, math.ceil(grid[0] / 2), math.ceil(grid[1] / 2))
        else:
            map_ = pool2(map_, rules["mm_spatial_pool_mode"])
        for row in map_:
            out += row
            if kind != "flat" and position == "grid":
                out.append(newline)
        if kind != "flat" and position == "frame":
            out.append(newline)
    if "unpad" in kind and position == "one_token":
        out.append(newline)
    return out


def image_tokens(crops, grid, size, crop_side, newline, rules, candidates):
    """`crops`: list of lists of [D]; the whole image first, where there are several."""
    kind, aspect = rules["mm_patch_merge_type"], rules["image_aspect_ratio"]
    if kind == "flat":
        return [vector for crop in crops for vector in crop]
    if len(crops) == 1:
        return crops[0] + ([newline] if "unpad" in kind else [])
    across, down = 2, 2
    if "anyres" in aspect:
        width, height = best_resolution(size, candidates)
        across, down = width // crop_side, height // crop_side
    assert len(crops) == 1 + across * down
    h, w = grid
    whole = [[None] * (w * across) for _ in range(h * down)]
    for i, crop in enumerate(crops[1:]):
        top, left = i // across * h, i % across * w
        for k, vector in enumerate(crop):
            whole[top + k // w][left + k % w] = vector
    if "maxpool2x2" in kind:
        tokens = flat(pool2(whole, "max"))
    elif "unpad" in kind:
        whole = unpad(whole, size)
        if aspect.startswith("anyres_max_"):
            most = int(aspect.removeprefix("anyres_max_")) * h**2
            times = math.sqrt(sum(len(row) for row in whole) / most)
            if times > 1.1:
                whole = bilinear(whole, int(len(whole) // times), int(len(whole[0]) // times))
        tokens = [vector for row in whole for vector in [*row, newline]]
    else:
        tokens = flat(whole)
    return tokens if "nobase" in kind else crops[0] + tokens


def merge_rows(ids, mask, labels, visual_of_rows, embed, limit, side):
    """(embeds [B, S, D], labels [B, S], mask bool [B, S], positions [B, S]).

    Args:
        ids, mask, labels: nested lists [B][L].
        visual_of_rows: per row, per image token, a list of [D].
        embed: token id -> [D].
        limit: most tokens of a merged row, or None.
        side: "left" or "right".
    """
    rows = []
    for row_ids, row_mask, row_labels, visual in zip(ids, mask, labels, visual_of_rows, strict=True):
        vectors, targets, images = [], [], iter(visual)
        for token, keep, label in zip(row_ids, row_mask, row_labels, strict=True):
            if not keep:
                continue
            if token == -200:
                image = next(images)
                vectors += image
                targets += [-100] * len(image)
            else:
                vectors.append(embed(token))
                targets.append(label)
        assert next(images, None) is None
        rows.append((vectors[:limit], targets[:limit]))
    size = max(len(vectors) for vectors, _ in rows)
    dim = len(embed(0))
    embeds = torch.zeros(len(rows), size, dim)
    out_labels = torch.full((len(rows), size), -100)
    out_mask = torch.zeros(len(rows), size, dtype=torch.bool)
    positions = torch.zeros(len(rows), size, dtype=torch.long)
    for i, (vectors, targets) in enumerate(rows):
        first = size - len(vectors) if side == "left" else 0
        for k, (vector, target) in enumerate(zip(vectors, targets, strict=True)):
            embeds[i, first + k], out_labels[i, first + k] = vector, target
            out_mask[i, first + k], positions[i, first + k] = True, k
    return embeds, out_labels, out_mask, positions
