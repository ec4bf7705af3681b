"""One attention for sequences of different lengths, packed one after the other without padding.

Shapes: Nq query tokens and Nk key tokens of all segments together, H query heads, G key/value heads, E channels of a
head, S segments. `cu_seqlens` [S + 1] holds where each segment begins: 0, n_0, n_0 + n_1, ..., Nq.

Backends (`varlen_backends`):
    flash_attn    the flash-attn package (CUDA, half precision)
    torch_varlen  `torch.nn.attention.varlen.varlen_attn` (CUDA, half precision; neither dropout nor a soft cap)
    sdpa          segments of equal length batched into one `scaled_dot_product_attention` call (any device and dtype)
    reference     softmax(q k / sqrt(E)) v, segment by segment: slow, for comparison

The first of them that a device, a dtype and the arguments allow is used. Importing this module makes "varlen" a value
of `attn_implementation` for transformers' language models: packed rows with `cu_seq_lens_q`, ordinary batches as in
sdpa.
"""

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from .varlen_backends import BACKENDS, flash_attn_loads, usable_backends
from .varlen_lengths import host_copy, pack_lengths
from .varlen_op import attend, autocast_dtype, equal_segments, prepare, traced_attention

__all__ = [
    "BACKENDS",
    "autocast_dtype",
    "flash_attn_loads",
    "pack_lengths",
    "traced_attention",
    "usable_backends",
    "varlen_attention",
    "varlen_attention_forward",
    "varlen_mask",
]


# --- the function -----------------------------------------------------------------------------------------------------


@torch.compiler.disable  # it works with lengths on the host; a compiled block is cut here once rather than many times
def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int | None,
    *,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    window: int | None = None,
    softcap: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Attention within each segment of a packed sequence, differentiable.

    Args:
        q: [Nq, H, E].
        k, v: [Nk, G, E]; H must be a multiple of G (grouped-query attention).
        cu_seqlens: [S + 1] integers, where the segments of q begin and the last one ends; None: all segments of q have
            `max_seqlen` tokens.
        max_seqlen: longest segment of q; None: as `cu_seqlens` says.
        cu_seqlens_k, max_seqlen_k: the same for k and v where their lengths differ from q's.
        causal: a query sees the keys up to its own place; the last query of a segment sees all of the segment's keys.
        scale: factor on q k; None: E ** -0.5.
        dropout_p: dropout on the attention weights; torch_varlen has none.
        window: with `causal`: a query sees itself and the `window` - 1 keys before it (Mistral's sliding window).
        softcap: the softmax is of tanh(scores / softcap) softcap (Gemma 2); torch_varlen has none.
        backend: one of `BACKENDS`; "torch" for the best of PyTorch's own; None for the best there is.

    Returns:
        [Nq, H, E].

    Raises:
        ValueError: shapes or lengths that do not fit together, an empty segment, a backend that cannot run here.
    """
    q, k, v = prepare(q, k, v, causal, window, softcap)
    if cu_seqlens is None:
        if cu_seqlens_k is None and max_seqlen_k is not None:
            cu_seqlens_k, max_seqlen_k = equal_segments(k, max_seqlen_k)
        cu_seqlens, max_seqlen = equal_segments(q, max_seqlen)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    lengths = cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k
    return attend(q, k, v, *lengths, causal, scale, dropout_p, window, softcap, backend)


# --- as an attention of transformers' language models -----------------------------------------------------------------


def varlen_attention_forward(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    sliding_window: int | None = None,
    cu_seq_lens_q=None,
    cu_seq_lens_k=None,
    max_length_q=None,
    max_length_k=None,
    **kwargs,
):
    """transformers' attention function for `attn_implementation="varlen"`.

    Rows packed into one, described by `cu_seq_lens_q/k` and `max_length_q/k`, go through `varlen_attention`, and so do
    rows without padding whose scores sdpa cannot make (a soft cap) or makes with a mask alone (a sliding window). Every
    other call is transformers' sdpa, or its eager attention with a soft cap.

    Args:
        query: [B, H, L, E]; key, value: [B, G, M, E]; B is 1 for packed rows.

    Returns:
        ([B, L, H, E], None).

    Raises:
        ValueError: packed rows in several batch rows, with padding, without `cu_seq_lens_q`, or of a model that adds to
            the scores (a bias, sinks).
    """
    batch, _, length, _ = query.shape
    mark = attention_mask if _is_mark(attention_mask) else None
    softcap = kwargs.get("softcap")
    if cu_seq_lens_q is None:
        _check_not_packed(mark)
        whole = attention_mask is None and softcap is not None and length == key.shape[2]
        if mark is None and not whole:  # a sliding window is in the mask
            return _with_mask(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
        cu_seq_lens_q, max_length_q = pack_lengths([length] * batch, query.device)
    else:
        _check_packed(batch, attention_mask, mark)
    for name in ("position_bias", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}: attn_implementation varlen has none for packed rows; expected None")
    if max_length_q is None:
        max_length_q = host_copy(cu_seq_lens_q, "cu_seq_lens_q").longest
    if sliding_window is None and mark is not None:  # some models give it to their mask alone
        sliding_window = _window_of(mark)
    out_NHE = varlen_attention(
        *(x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)),
        cu_seq_lens_q,
        int(max_length_q),
        cu_seqlens_k=cu_seq_lens_k,
        max_seqlen_k=None if max_length_k is None else int(max_length_k),
        causal=getattr(module, "is_causal", True) if is_causal is None else is_causal,
        scale=scaling,
        dropout_p=dropout,
        window=sliding_window,
        softcap=softcap,
    )
    return out_NHE.unflatten(0, (batch, length)), None


def _check_not_packed(mark: torch.Tensor | None) -> None:
    if mark is not None and _starts_anew(mark):
        raise ValueError(
            "attn_implementation varlen: position_ids start anew within a row, which means packed sequences; "
            "give cu_seq_lens_q, cu_seq_lens_k, max_length_q and max_length_k too"
        )


def _check_packed(batch: int, attention_mask: torch.Tensor | None, mark: torch.Tensor | None) -> None:
    if batch != 1:
        raise ValueError(f"cu_seq_lens_q: came with a batch of {batch} rows, expected one packed row")
    if attention_mask is not None and mark is None:
        raise ValueError("cu_seq_lens_q: came with an attention_mask that masks tokens; packed rows have no padding")


def _with_mask(module, query, key, value, attention_mask, dropout, scaling, is_causal, softcap=None, **kwargs):
    """transformers' own attention: sdpa, or eager with a soft cap, which sdpa leaves out or refuses."""
    if kwargs.get("s_aux") is not None:
        raise ValueError("s_aux: attn_implementation varlen has none, nor has sdpa; expected None")
    if softcap is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    queries, keys = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and causal and queries > 1:  # no mask means to sdpa: from the first key on
        attention_mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        shut_out = torch.zeros_like(attention_mask, dtype=query.dtype)
        attention_mask = shut_out.masked_fill(~attention_mask, torch.finfo(query.dtype).min)
    out, _ = eager_attention_forward(module, query, key, value, attention_mask, dropout, scaling, softcap, **kwargs)
    return out, None


def _mark(window: int | None, starts_anew: bool, device) -> torch.Tensor:
    """What stands for the mask of rows without padding: an empty tensor whose shape tells what it would hold."""
    return torch.empty(0, window or 0, int(starts_anew), dtype=torch.bool, device=device)


def _is_mark(attention_mask) -> bool:
    return attention_mask is not None and attention_mask.ndim == 3 and attention_mask.shape[0] == 0


def _window_of(mark: torch.Tensor) -> int | None:
    return mark.shape[1] or None


def _starts_anew(mark: torch.Tensor) -> bool:
    return mark.shape[2] == 1


def varlen_mask(
    batch_size,
    q_length,
    kv_length,
    *args,
    attention_mask=None,
    local_size=None,
    allow_is_causal_skip=True,
    allow_is_bidirectional_skip=None,
    use_vmap=False,
    **kwargs,
):
    """transformers' mask function for `attn_implementation="varlen"`: sdpa's, but an empty tensor for rows without
    padding that are packed or have a sliding window.

    Their mask would be quadratic in their length, and `varlen_attention` does without.
    """
    bidirectional = allow_is_bidirectional_skip is not None
    plain = attention_mask is None and q_length == kv_length > 1 and not use_vmap and not bidirectional
    if local_size is not None and local_size == getattr(kwargs.get("config"), "attention_chunk_size", None):
        plain = False  # not a window: chunks, of which a query sees its own
    # Causal, without padding, cache or a rule of the model's own, and yet the skip is forbidden: transformers found
    # positions that start anew.
    starts_anew = not allow_is_causal_skip
    cached = kwargs.get("q_offset", 0)  # of a static cache it is a tensor
    windowed = local_size is not None and local_size <= kv_length and isinstance(cached, int) and cached == 0
    if plain and (starts_anew or windowed):
        return _mark(local_size, starts_anew, kwargs.get("device"))
    if bidirectional:
        kwargs["allow_is_bidirectional_skip"] = allow_is_bidirectional_skip
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        *args,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        use_vmap=use_vmap,
        **kwargs,
    )


AttentionInterface.register("varlen", varlen_attention_forward)
AttentionMaskInterface.register("varlen", varlen_mask)
