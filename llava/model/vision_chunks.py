"""`vision_micro_batch`: the tower sees a step's images in chunks of so many, where memory asks for it.

The numbers are those of one call. With a frozen tower only the chunk at hand has activations; with one that is trained,
those of all chunks are kept, unless gradient checkpointing drops them. Under ZeRO-3 every rank must call the tower
equally often: the ranks agree on the number of chunks, and one that has fewer sees blank images for the rest, of which
nothing but zero comes into its features.
"""

from collections.abc import Callable
from itertools import pairwise

import torch

from llava.errors import LlavaError
from llava.model.ranks import most_over_ranks


class ChunkedVision:
    """Mixin of the modules that call a vision encoder on all images of a step."""

    vision_micro_batch: int | None = None  # most images (crops, frames) in one call of the encoder; None: all

    def in_chunks(self, frames: list[int], encode: Callable, blank: Callable, join: Callable, device):
        """`encode` of the images from one number to another, in chunks, joined.

        Args:
            frames: of each image, how many it counts for.
            encode: (first, last) -> features of these images.
            blank: () -> a scalar of the features of a blank image.
            join: (list of features, zero that a gradient goes through or None) -> all features.
            device: where a number that the ranks share is kept.
        """
        if self.vision_micro_batch is None:
            return encode(0, len(frames))
        ends = chunk_ends(frames, self.vision_micro_batch)
        lacking = most_over_ranks(len(ends), self, device) - len(ends)
        parts = [encode(*span) for span in pairwise([0, *ends])]
        zero = None
        for _ in range(lacking):
            zero = blank() * 0.0 if zero is None else zero + blank() * 0.0
        return parts[0] if len(parts) == 1 and zero is None else join(parts, zero)


def chunk_ends(frames: list[int], most: int) -> list[int]:
    """Where the chunks of images end that count for `frames` each: at most `most` in a chunk, or one larger image."""
    ends, held = [], 0
    for number, count in enumerate(frames):
        if held and held + count > most:
            ends.append(number)
            held = 0
        held += count
    return [*ends, len(frames)]


def set_micro_batch(model, most: int | None) -> None:
    """Let the model's vision encoder see at most so many images in one call; None: all of a step.

    Raises:
        LlavaError: a model that cannot.
    """
    modules = [module for module in model.modules() if isinstance(module, ChunkedVision)]
    if most is not None and not modules:
        raise LlavaError(f"vision_micro_batch is {most}, but {type(model).__name__} has no vision encoder of its own")
    for module in modules:
        module.vision_micro_batch = most


def plus(parts: list, zero: torch.Tensor | None) -> list:
    """Tensors, with zero added to the first."""
    return parts if zero is None else [parts[0] + zero.to(parts[0]), *parts[1:]]
