"""What the Qwen-VL models of transformers read from the device, worked out on the host instead, by the same functions.

Where the grids, tokens and masks are on the host already (`HostCopies`), nothing waits for the device; else they are
read once each, rather than in every block and for every image. Shapes: B rows, L tokens, N patches, M image tokens,
D channels, S samples of a packed row.
"""

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from llava.model.host import HostCopies, needs_no_mask, send
from llavavit.varlen_attention import pack_lengths


def of_grids(tower, grid_thw: torch.Tensor, device, packed: bool = True) -> dict:
    """What a vision encoder derives from its images' grids, as keyword arguments of its forward.

    Args:
        tower: the encoder.
        grid_thw: [images, 3] on the host.
        packed: whether its attention is `PackedVisionAttention`; transformers' own splits by lengths that it reads
            from `cu_seqlens` in every block, which is then left on the host, unless it is flash-attention.
    """
    attention = tower.config._attn_implementation
    where = device if "flash" in attention or (packed and attention in ("sdpa", "varlen")) else "cpu"
    frames = [h * w for t, h, w in grid_thw.tolist() for _ in range(t)]
    planned = dict(zip(("cu_seqlens", "max_seqlen"), pack_lengths(frames, where), strict=True))
    moved = {"position_ids": get_vision_position_ids(grid_thw, tower.spatial_merge_size)}
    if hasattr(tower, "window_size"):
        order, starts = get_vision_window_index(grid_thw, tower.spatial_merge_size, tower.window_size, tower.patch_size)
        moved["window_index"] = order
        windows = pack_lengths(starts.diff().tolist(), where)
        planned |= dict(zip(("cu_window_seqlens", "max_window_seqlen"), windows, strict=True))
    return planned | dict(zip(moved, send([*moved.values()], device), strict=True))


def rope_index(compute, input_ids, *tensors, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    """`compute`, a `get_rope_index`, of the same arguments on the host; its results are where `input_ids` is."""
    tensors = [value.cpu() if isinstance(value, torch.Tensor) else value for value in tensors]
    kwargs = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in kwargs.items()}
    return tuple(send([*compute(input_ids.cpu(), *tensors, **kwargs)], input_ids.device))


def positions(model, host: HostCopies, device, **more) -> torch.Tensor:
    """Positions [3, B, L] of a batch with images, on `device`; those of a packed row start anew with every sample.

    Args:
        model: its `get_rope_index` computes them; its `rope_deltas` become the batch's, unless the row is packed.
        **more: to `get_rope_index`.
    """
    if host.packed is None:
        found = model.get_rope_index(
            host.input_ids,
            host.mm_token_type_ids,
            image_grid_thw=host.image_grid_thw,
            attention_mask=host.attention_mask,
            **more,
        )
        placed, model.rope_deltas = send([*found], device)
        return placed
    # each sample as a row of its own, padded, and what is not padding one behind the other again
    rows = [pad_sequence(x[0].split(host.packed), batch_first=True) for x in (host.input_ids, host.mm_token_type_ids)]
    filled_SL = torch.arange(max(host.packed)) < torch.tensor(host.packed)[:, None]
    placed, _ = model.get_rope_index(*rows, image_grid_thw=host.image_grid_thw, attention_mask=filled_SL.long(), **more)
    return send([placed[:, filled_SL][:, None]], device)[0]


def put_images(embeds_BLD, features_MD, input_ids, image_token_id: int):
    """The features in the places of the image tokens, in order.

    Args:
        input_ids: [B, L] on the host.

    Returns:
        embeds [B, L, D] and the places [M] in B * L, both on the device.

    Raises:
        ValueError: another number of features than of image tokens, in transformers' words.
    """
    at = (input_ids == image_token_id).flatten().nonzero()[:, 0]
    if len(at) != len(features_MD):
        raise ValueError(
            f"Image features and image tokens do not match, tokens: {len(at)}, features: {len(features_MD)}"
        )
    (at,) = send([at], embeds_BLD.device)
    features_MD = features_MD.to(embeds_BLD.device, embeds_BLD.dtype)
    return embeds_BLD.flatten(0, 1).index_copy(0, at, features_MD).view_as(embeds_BLD), at


def mask_for(model, attention_mask, host: HostCopies):
    """The attention mask of a forward pass; None of a packed row, and in training where the rows are right-padded and
    need none."""
    if host.packed is not None:
        return None  # flash-attention would take it for padding and leave the segments out of account
    if attention_mask is None or not model.training or not host.right_padded:
        return attention_mask
    return None if needs_no_mask(model.language_model.config._attn_implementation) else attention_mask


def starts_anew(model, past_key_values) -> bool:
    """Whether positions are counted from the first token; else they go on from what the cache holds."""
    return model.rope_deltas is None or past_key_values is None or past_key_values.get_seq_length() == 0
