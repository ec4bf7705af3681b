"""What the host knows of a batch, and how it goes to the device, so that the host need not wait for the device.

A read (`.cpu()`, `.item()`, a boolean index) waits for all that the device still has to do, and while the host waits
it prepares nothing. The collator has the tokens, labels and sizes on the host: it leaves copies there.
"""

from dataclasses import dataclass

import torch

from llava.constants import IGNORE_INDEX
from llava.errors import LlavaError


@dataclass(eq=False)
class HostCopies:
    """Entries of a batch that stay on the host, by their names in the batch; None for one that it does not have.

    It is no mapping and has no `.to`: what moves batches to the device (data loader, accelerate, DDP) passes it on as
    it is.
    """

    input_ids: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    patch_levels: list | None = None  # of LLaVA's images, as `PatchChooser.levels_of` finds them
    mm_token_type_ids: torch.Tensor | None = None
    image_grid_thw: torch.Tensor | None = None
    image_patch_levels: torch.Tensor | None = None
    record_ids: list[str] | None = None  # of the rows
    packed: list[int] | None = None  # of samples that share a row: their lengths (LLaVA's: of their texts)

    def __post_init__(self):
        for name in ("input_ids", "labels", "mm_token_type_ids"):  # of 32 bits, too
            if (value := getattr(self, name)) is not None:
                setattr(self, name, value.long())

    @classmethod
    def of(cls, **entries) -> "HostCopies":
        """Read from wherever the tensors are: on a GPU one wait each."""
        return cls(**{name: None if value is None else value.cpu() for name, value in entries.items()})

    @property
    def right_padded(self) -> bool:
        """Whether the attention mask masks nothing but the ends of rows."""
        mask = self.attention_mask.bool()
        return not bool((mask[:, 1:] & ~mask[:, :-1]).any())


def needs_no_mask(attention: str) -> bool:
    """Whether training does without the mask of right-padded rows: causal attention never looks at their padding.

    SDPA then takes its fast kernel; flash-attention would take padding out and put it back in every layer, where the
    host waits each time. The names are those of `attn_implementation`.
    """
    return attention in ("sdpa", "eager", "varlen", "flash_attention_2", "flash_attention_3")


def keeps_samples_apart(attention: str) -> bool:
    """Whether an `attn_implementation` has segments, so that the samples of a packed row do not see each other."""
    return attention == "varlen" or "flash" in attention


def segments(lengths: list[int] | None, attention: str, device) -> dict:
    """What tells a language model's attention where the samples of a packed row begin, as keyword arguments.

    Args:
        lengths: of the samples, in order; None: the row is not packed.
        attention: the language model's `attn_implementation`.

    Raises:
        LlavaError: that attention has no segments.
    """
    if lengths is None:
        return {}
    from llavavit.varlen_attention import pack_lengths  # which imports transformers; the data's workers do without

    if not keeps_samples_apart(attention):
        raise LlavaError(
            f"attn_implementation: found {attention!r}, which lets the samples of a packed row see each other; "
            "expected varlen or flash_attention_2"
        )
    cu_seqlens, longest = pack_lengths([length for length in lengths if length], device)
    return {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": longest, "max_length_k": longest}


def send(tensors: list, device) -> list:
    """Tensors (or None) of the host on `device`, in one copy that the host does not wait for."""
    if torch.device(device).type == "cpu":
        return tensors
    given = [tensor for tensor in tensors if tensor is not None]
    flat = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in given]
    sizes = [-(-len(part) // 8) * 8 for part in flat]  # each begins where any dtype may
    buffer = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=torch.device(device).type == "cuda")
    for room, part in zip(buffer.split(sizes), flat, strict=True):
        room[: len(part)] = part
    rooms = buffer.to(device, non_blocking=True).split(sizes)
    moved = iter(
        room[: len(part)].view(tensor.dtype).view(tensor.shape)
        for room, part, tensor in zip(rooms, flat, given, strict=True)
    )
    return [None if tensor is None else next(moved) for tensor in tensors]


def supervised_places(labels_BL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of labels on the host: the places [N] in B * L of the hidden states that predict one, and those labels [N]."""
    places = (labels_BL[:, 1:] != IGNORE_INDEX).nonzero()
    at = places[:, 0] * labels_BL.shape[1] + places[:, 1]
    return at, labels_BL.flatten()[at + 1]


class ReadLater:
    """Numbers on their way to the host; `tolist` waits for their own copy alone."""

    def __init__(self, numbers: torch.Tensor):
        self.numbers, self.copied = numbers.to("cpu", non_blocking=True), None
        if numbers.is_cuda:
            self.copied = torch.cuda.Event()
            self.copied.record()

    def tolist(self) -> list[int]:
        if self.copied is not None:
            self.copied.synchronize()
        return self.numbers.tolist()
