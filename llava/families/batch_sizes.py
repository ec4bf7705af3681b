"""How large a collated batch is, by what the host knows of it: nothing is read from the device."""

from dataclasses import dataclass, field


@dataclass
class BatchSizes:
    """Of one micro-batch of one rank; `+` joins several.

    Attributes:
        tokens: of each sample, in the language model.
        slots: places that the language model computes, padding included.
        visual: those of the tokens that come from pictures.
        patches: of each vision sequence, or its grid (t, h, w); see `llava.train.flops.step_flops`.
        projected: tokens that the projector makes of them.
        supervised: positions with a label.
    """

    tokens: list[int] = field(default_factory=list)
    slots: int = 0
    visual: int = 0
    patches: list[int | tuple[int, int, int]] = field(default_factory=list)
    projected: int = 0
    supervised: int = 0

    def __add__(self, other: "BatchSizes") -> "BatchSizes":
        return BatchSizes(**{name: value + getattr(other, name) for name, value in vars(self).items()})


def merged_sizes(batch: dict, model) -> BatchSizes:
    """Of a model that merges pictures into the text in its forward (LLaVA's); see `Family.batch_sizes`."""
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.model.sequence_merge import match_images

    host, tower = batch["host"], model.get_vision_tower()
    segments, keep = _segments(host)
    sizes = BatchSizes(supervised=_supervised(host))
    visual = []
    if tower is not None and batch.get("images") is not None:
        given = batch["images"], batch.get("modalities"), batch.get("image_sizes")
        images, kinds, shown, _, levels = match_images(host.input_ids, keep, *given, None, host.patch_levels)
        count = model.visual_token_counter()
        for number, image in enumerate(images):
            shape, kind = tuple(image.shape), kinds[number]
            size = (shape[-1], shape[-2]) if shown is None else shown[number]
            chosen = None if levels is None else levels[number]
            visual.append(count.of_levels(shape, chosen, size, kind))
            _add_vision(sizes, tower, count, shape, chosen, kind)
    limit, at = getattr(model.config, "tokenizer_model_max_length", None), iter(visual)
    for ids in segments:
        grown = 0  # by the pictures so far
        for place in (ids == IMAGE_TOKEN_INDEX).nonzero()[:, 0].tolist() if visual else ():
            begin, count = place + grown, next(at)
            sizes.visual += count if limit is None else max(0, min(begin + count, limit) - begin)
            grown += count - 1
        length = len(ids) + grown if limit is None else min(len(ids) + grown, limit)
        if length > 1:  # a batch of which nothing is left is one token
            sizes.tokens.append(length)
    sizes.slots = sum(sizes.tokens) if host.packed else len(segments) * max(sizes.tokens, default=0)
    return sizes


def _add_vision(sizes: BatchSizes, tower, count, shape: tuple, levels, kind: str) -> None:
    """What encoder and projector have to do for pixels of a shape [3, H, W] or [K, 3, H, W]."""
    if levels is not None:
        from llava.model.multimodal_encoder.patch_choice import count_tokens

        sizes.patches.append(count_tokens(levels[None], merging=False))
        sizes.projected += count_tokens(levels[None], merging=count.token_grid.merges)
        return
    pictures = shape[0] if len(shape) == 4 else 1
    sizes.projected += pictures * count.token_grid(*shape[-2:])[0]
    grids = tower.grids(*shape[-2:])
    if kind == "video" and tower.sees_time:
        sizes.patches += [(pictures, *grid) for grid in grids]
    else:
        sizes.patches += [rows * columns for rows, columns in grids] * pictures


def expanded_sizes(batch: dict, image_token_type: int = 1) -> BatchSizes:
    """Of a batch that has a place for each token of its pictures already (Qwen-VL's); see `Family.batch_sizes`."""
    from llava.model.qwen2_vl.layout import token_counts

    host = batch["host"]
    segments, keep = _segments(host)
    sizes = BatchSizes(supervised=_supervised(host), slots=host.input_ids.numel())
    sizes.tokens = [len(ids) for ids in segments if len(ids) > 1]
    sizes.visual = int(((host.mm_token_type_ids == image_token_type) & keep).sum())
    if not sizes.visual:  # a picture that stands for none has no part in the loss
        return sizes
    sizes.projected, grids = sizes.visual, host.image_grid_thw
    if host.image_patch_levels is None:
        sizes.patches = [tuple(grid) for grid in grids.tolist()]
    else:
        sizes.patches = [kept for kept, _ in token_counts(host.image_patch_levels, grids)]
    return sizes


def _segments(host) -> tuple[list, object]:
    """The token ids of each sample, and bool [B, L] of where any are; rows are padded, or one is packed of samples.

    LLaVA's samples are packed by the merge, in its model; until then they are rows, with a mask.
    """
    import torch

    ids = host.input_ids
    if host.packed and host.attention_mask is None:
        keep = torch.arange(ids.shape[1])[None] < sum(host.packed)
        return list(ids[0, : sum(host.packed)].split(host.packed)), keep
    keep = torch.ones_like(ids, dtype=torch.bool) if host.attention_mask is None else host.attention_mask.bool()
    return [row[kept] for row, kept in zip(ids, keep, strict=True)], keep


def _supervised(host) -> int:
    from llava.constants import IGNORE_INDEX

    return int((host.labels[:, 1:] != IGNORE_INDEX).sum())
