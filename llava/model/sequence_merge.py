"""Where text and visual tokens go when images take their place in the text.

Shapes: B rows, L text tokens (an image is one of them), S tokens after the merge, M images. The index arithmetic runs
on the CPU: it is small, and on a GPU every step of it would wait for the device.
"""

from dataclasses import dataclass

import torch

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.errors import LlavaError


@dataclass
class MergePlan:
    """Result of `plan_merge`; every tensor is on the CPU.

    Attributes:
        text_ids: [T] ids of the text tokens of all rows, one row after the other.
        rows, columns: where each token goes, [T + V]: the text tokens, then the visual tokens of all images in order.
        fits: bool [T + V], False for what the limit cuts off (rows and columns leave it out), None if nothing is cut.
        shape: (B, S); of packed rows (1, S).
        labels: [B, S]; IGNORE_INDEX on visual tokens and padding; None without labels.
        mask: bool [B, S], False on padding.
        positions: [B, S] position ids, 0 on padding; in a packed row they begin anew with each sample.
        lengths: merged tokens of each row that was given.
    """

    text_ids: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    fits: torch.Tensor | None
    shape: tuple[int, int]
    labels: torch.Tensor | None
    mask: torch.Tensor
    positions: torch.Tensor
    lengths: list[int]


def plan_merge(input_ids, keep, labels, visual_lengths, limit=None, padding_side="right", packed=False) -> MergePlan:
    """Lay out rows in which every image token is replaced by the visual tokens of its image.

    Args:
        input_ids: [B, L]; IMAGE_TOKEN_INDEX marks an image.
        keep: bool [B, L], False for tokens that are dropped.
        labels: [B, L] or None.
        visual_lengths: visual tokens of each image, in order of the image tokens.
        limit: longest row, in merged tokens; longer ones are cut.
        padding_side: "right" or "left".
        packed: lay the rows one after the other in a single one, without padding. Nothing predicts a sample's first
            token there: it has no label.
    """
    batch = len(input_ids)
    row, column = keep.nonzero(as_tuple=True)  # the kept tokens of all rows, one after the other
    ids = input_ids[row, column]
    is_image = ids == IMAGE_TOKEN_INDEX
    counts = torch.tensor(visual_lengths, dtype=torch.long)
    lengths = torch.ones_like(ids)
    lengths[is_image] = counts
    row_lengths = torch.zeros(batch, dtype=torch.long).index_add_(0, row, lengths)
    row_starts = row_lengths.cumsum(0) - row_lengths
    starts = lengths.cumsum(0) - lengths - row_starts[row]  # of each kept token, in its merged row
    if limit is not None:
        row_lengths = row_lengths.clamp(max=limit)
    size = int(row_lengths.sum() if packed else row_lengths.max())
    if packed:
        shift = row_lengths.cumsum(0) - row_lengths
    else:
        shift = size - row_lengths if padding_side == "left" else torch.zeros_like(row_lengths)

    text = ~is_image
    within = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    rows = torch.cat([row[text], row[is_image].repeat_interleave(counts)])
    columns = torch.cat([starts[text], starts[is_image].repeat_interleave(counts) + within])
    inside = columns < row_lengths[rows]
    columns, lengths = columns + shift[rows], row_lengths.tolist()
    if packed:
        batch, rows = 1, torch.zeros_like(rows)

    new_labels = None
    if labels is not None:
        new_labels = labels.new_full((batch, size), IGNORE_INDEX)
        seen = inside[: int(text.sum())]
        values = labels[row, column][text]
        new_labels[rows[: len(seen)][seen], columns[: len(seen)][seen]] = values[seen]
        if packed:
            new_labels[0, shift[row_lengths > 0]] = IGNORE_INDEX
    fits = None
    if not inside.all():
        fits, rows, columns = inside, rows[inside], columns[inside]
    if packed:
        positions = torch.arange(size)[None] - shift.repeat_interleave(row_lengths)
        mask = torch.ones_like(positions, dtype=torch.bool)
    else:
        positions = torch.arange(size)[None] - shift[:, None]
        mask = (positions >= 0) & (positions < row_lengths[:, None])
    return MergePlan(ids[text], rows, columns, fits, (batch, size), new_labels, mask, positions * mask, lengths)


def match_images(input_ids, keep, images, modalities, image_sizes, patch_alphas=None, patch_levels=None):
    """One image per image token, in order: drop the dummies that rows without an image token may bring.

    Args:
        input_ids: [B, L].
        keep: bool [B, L], tokens that count.
        images: sequence of tensors, or a batched tensor.
        modalities: per image, possibly short.
        image_sizes: per image, or or per picture and per frame of each video; or None.
        patch_alphas, patch_levels: per image, or None.

    Returns:
        (images, modalities, image_sizes, patch_alphas, patch_levels), all as long as there are image tokens.

    Raises:
        LlavaError: the numbers do not match.
    """
    per_row = ((input_ids == IMAGE_TOKEN_INDEX) & keep).sum(1).tolist()
    tokens, count = sum(per_row), len(images)
    modalities = [modalities] if isinstance(modalities, str) else list(modalities or [])
    modalities += ["image"] * (count - len(modalities))
    chosen = [i for i in range(count) if modalities[i] != "text"]
    if len(chosen) != tokens and count == tokens + per_row.count(0):
        # LLaVA-NeXT's batches: every row without an image token brings one dummy in its place
        chosen, at = [], 0
        for n in per_row:
            chosen += range(at, at + n)
            at += max(n, 1)
    if len(chosen) != tokens:
        raise LlavaError(
            f"the batch has {tokens} <image> tokens in {len(per_row)} rows, but {count} images came with it"
        )
    plain = isinstance(images, torch.Tensor) and images.ndim == 4
    if image_sizes is not None and not plain:
        image_sizes = _size_of_each(image_sizes, images, modalities)
    for name, values in (("patch_alphas", patch_alphas), ("patch_levels", patch_levels)):
        if values is not None and len(values) != count:
            raise LlavaError(f"{name}: found {len(values)}, expected one for each of {count} images")
    if len(chosen) == count:
        return images, modalities, image_sizes, patch_alphas, patch_levels
    if isinstance(images, torch.Tensor):
        images = images[chosen]
    else:
        images = [images[i] for i in chosen]
    sizes = None if image_sizes is None or plain else [image_sizes[i] for i in chosen]
    of_patches = [None if values is None else [values[i] for i in chosen] for values in (patch_alphas, patch_levels)]
    return images, [modalities[i] for i in chosen], sizes, *of_patches


def _size_of_each(sizes, images, modalities: list[str]):
    """One size for each image; that of a video plays no part, since its frames are not unpadded.

    LLaVA-NeXT's callers give a video one size, or one for each of its frames (of a numpy frame a bare number); beside
    pictures these take up as many places.
    """
    if len(sizes) == len(images):
        return sizes
    kinds = modalities[: len(images)]
    if "image" not in kinds:
        return [None] * len(images)
    clips = [kind == "video" and image.ndim == 4 for image, kind in zip(images, kinds, strict=True)]
    places = [len(image) if clip else 1 for image, clip in zip(images, clips, strict=True)]
    if len(sizes) != sum(places):
        or_frames = f", or {sum(places)} with one for each frame" if any(clips) else ""
        raise LlavaError(
            f"image_sizes: found {len(sizes)}, expected one (width, height) for each of {len(images)} images{or_frames}"
        )
    return [sizes[sum(places[:at])] for at in range(len(images))]
