"""One attention for sequences of different lengths, packed one after the other without padding.

Shapes: Nq query tokens and Nk key tokens of all segments together, H query heads, G key/value heads, E channels of a
head, S segments. `cu_seqlens` [S + 1] holds where each segment begins: 0, n_0, n_0 + n_1, ..., Nq.

Backends:
    flash_attn    the flash-attn package (CUDA, half precision)
    torch_varlen  `torch.nn.attention.varlen.varlen_attn` (CUDA, half precision)
    sdpa          segments of equal length batched into one `scaled_dot_product_attention` call (any device and dtype)
    reference     softmax(q k / sqrt(E)) v, segment by segment: slow, for comparison

The first of them that a device and dtype allow is used. Importing this module makes "varlen" a value of
`attn_implementation` for transformers' language models: packed rows with `cu_seq_lens_q`, ordinary batches as in sdpa.
"""

import functools
import inspect
import itertools
import logging
import math

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

logger = logging.getLogger(__name__)


# --- lengths ----------------------------------------------------------------------------------------------------------


class _HostCopy:
    """What the host knows of a `cu_seqlens` tensor, kept on the tensor itself: read once, used by every layer.

    A change of the tensor in place shows in its version; inference tensors have none and must not be changed.
    """

    def __init__(self, lengths: tuple[int, ...], version: int | None):
        self.lengths = lengths
        self.total = sum(lengths)
        self.longest = max(lengths)
        self.version = version
        self.groups: dict[tuple[int, ...], list[list[int]]] = {}  # of the sdpa backend, by the lengths of the keys


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def pack_lengths(lengths, device=None) -> tuple[torch.Tensor, int]:
    """Segment lengths on the host -> (`cu_seqlens` int32 [S + 1] on `device`, longest length); no later device read.

    Raises:
        ValueError: no segment, or an empty one.
    """
    lengths = tuple(int(length) for length in lengths)
    _check_lengths(lengths, "lengths")
    cu_seqlens = torch.tensor((0, *itertools.accumulate(lengths)), dtype=torch.int32)
    cu_seqlens = cu_seqlens.to(device, non_blocking=True)  # a blocking copy waits for all that the device has to do
    cu_seqlens._host_copy = _HostCopy(lengths, _version(cu_seqlens))
    return cu_seqlens, cu_seqlens._host_copy.longest


def _check_lengths(lengths: tuple[int, ...], name: str) -> None:
    if not lengths:
        raise ValueError(f"{name}: describes no segment, expected at least one")
    if min(lengths) < 1:
        at = next(i for i, length in enumerate(lengths) if length < 1)
        raise ValueError(f"{name}: segment {at} has length {lengths[at]}, expected at least 1")


def _host_copy(cu_seqlens: torch.Tensor, name: str) -> _HostCopy:
    """Lengths of the segments on the host; read from the device the first time this tensor is seen."""
    known = getattr(cu_seqlens, "_host_copy", None)
    if known is not None and known.version == _version(cu_seqlens):
        return known
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name}: found {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}, expected integers of shape [S + 1]"
        )
    starts = cu_seqlens.tolist()
    lengths = tuple(b - a for a, b in itertools.pairwise(starts))
    _check_lengths(lengths, name)
    if starts[0] != 0:
        raise ValueError(f"{name}: begins with {starts[0]}, expected 0")
    cu_seqlens._host_copy = _HostCopy(lengths, _version(cu_seqlens))
    return cu_seqlens._host_copy


# --- backends: each (q, k, v, host_q, host_k, cu_q, cu_k, causal, scale, dropout_p) -> [Nq, H, E] ---------------------


def _repeat_heads(x_NGE: torch.Tensor, heads: int) -> torch.Tensor:
    """[N, G, E] -> [N, H, E], each key/value head once for every query head that shares it."""
    groups = x_NGE.shape[1]
    return x_NGE if groups == heads else x_NGE.repeat_interleave(heads // groups, dim=1)


def _reference(q, k, v, host_q, host_k, cu_q, cu_k, causal, scale, dropout_p):
    k, v = _repeat_heads(k, q.shape[1]), _repeat_heads(v, q.shape[1])
    out = []
    segments = zip(q.split(host_q.lengths), k.split(host_k.lengths), v.split(host_k.lengths), strict=True)
    for q_LHE, k_MHE, v_MHE in segments:
        scores = torch.einsum("lhe,mhe->hlm", q_LHE, k_MHE) * scale
        if causal:
            scores = scores.masked_fill(~_causal_mask(len(q_LHE), len(k_MHE), q.device), -math.inf)
        weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
        weights = F.dropout(weights, dropout_p).to(q.dtype)
        out.append(torch.einsum("hlm,mhe->lhe", weights, v_MHE))
    return torch.cat(out)


def _causal_mask(queries: int, keys: int, device) -> torch.Tensor:
    """bool [queries, keys]; the last query sees the last key, as in flash-attn."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def _group_equal(lengths_q, lengths_k) -> list[list[int]]:
    """Indices of the segments, those of equal lengths together."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, pair in enumerate(zip(lengths_q, lengths_k, strict=True)):
        groups.setdefault(pair, []).append(i)
    return list(groups.values())


def _sdpa(q, k, v, host_q, host_k, cu_q, cu_k, causal, scale, dropout_p):
    groups = host_q.groups.get(host_k.lengths)
    if groups is None:
        groups = host_q.groups[host_k.lengths] = _group_equal(host_q.lengths, host_k.lengths)
    k, v = _repeat_heads(k, q.shape[1]), _repeat_heads(v, q.shape[1])
    if len(groups) == 1:
        segments = len(host_q.lengths)
        o_BLHE = _sdpa_batch(*(x.unflatten(0, (segments, -1)) for x in (q, k, v)), causal, scale, dropout_p)
        return o_BLHE.flatten(0, 1)
    # split and cat rather than an index: one pass less each way, and none for a length that occurs once
    parts = q.split(host_q.lengths), k.split(host_k.lengths), v.split(host_k.lengths)
    out = [None] * len(host_q.lengths)
    for group in groups:
        batch = (part[group[0]][None] if len(group) == 1 else torch.stack([part[i] for i in group]) for part in parts)
        for i, o_LHE in zip(group, _sdpa_batch(*batch, causal, scale, dropout_p).unbind(0), strict=True):
            out[i] = o_LHE
    return torch.cat(out)


def _sdpa_batch(q_BLHE, k_BMHE, v_BMHE, causal, scale, dropout_p):
    queries, keys = q_BLHE.shape[1], k_BMHE.shape[1]
    # is_causal aligns at the first key where the lengths differ, a mask at the last
    mask = _causal_mask(queries, keys, q_BLHE.device) if causal and queries != keys else None
    q_BHLE, k_BHME, v_BHME = (x.transpose(1, 2) for x in (q_BLHE, k_BMHE, v_BMHE))
    o_BHLE = F.scaled_dot_product_attention(
        q_BHLE, k_BHME, v_BHME, mask, dropout_p, is_causal=causal and mask is None, scale=scale
    )
    return o_BHLE.transpose(1, 2)


def _flash_attn(q, k, v, host_q, host_k, cu_q, cu_k, causal, scale, dropout_p):
    return _flash_attn_function()(
        q,
        k,
        v,
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        max_seqlen_q=host_q.longest,
        max_seqlen_k=host_k.longest,
        dropout_p=dropout_p,
        softmax_scale=scale,
        causal=causal,
    )


@functools.cache
def _flash_attn_function():
    """flash-attn's packed attention, None where the package is not installed or does not load, which is told."""
    try:
        from flash_attn import flash_attn_varlen_func
    except Exception as error:  # built for another PyTorch or CUDA, its extension fails in several ways
        if isinstance(error, ModuleNotFoundError) and error.name == "flash_attn":
            return None
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        logger.warning("flash-attn is installed and cannot be imported (%s); going on without it", reason)
        return None
    return flash_attn_varlen_func


def flash_attn_loads() -> bool:
    """Whether the flash-attn package is here and can be imported, which its metadata alone do not say."""
    return _flash_attn_function() is not None


def _torch_varlen(q, k, v, host_q, host_k, cu_q, cu_k, causal, scale, dropout_p):
    from torch.nn.attention.varlen import varlen_attn

    options = {}
    if q.shape[1] != k.shape[1]:
        if _has_parameter(varlen_attn, "enable_gqa"):  # not in torch 2.11
            options["enable_gqa"] = True
        else:
            k, v = _repeat_heads(k, q.shape[1]), _repeat_heads(v, q.shape[1])
    window = (-1, 0) if causal else (-1, -1)
    return varlen_attn(q, k, v, cu_q, cu_k, host_q.longest, host_k.longest, scale=scale, window_size=window, **options)


@functools.cache
def _has_parameter(function, name: str) -> bool:
    return name in inspect.signature(function).parameters


BACKENDS = {"flash_attn": _flash_attn, "torch_varlen": _torch_varlen, "sdpa": _sdpa, "reference": _reference}
_HALF = (torch.float16, torch.bfloat16)


@functools.cache
def _runs_flash(device: torch.device) -> bool:
    """The kernels want an Ampere or later."""
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (8, 0)


def usable_backends(q: torch.Tensor, dropout_p: float = 0.0) -> list[str]:
    """Backends that can run on this tensor's device and dtype, the fastest first."""
    found = ["sdpa", "reference"]
    if q.is_cuda and q.dtype in _HALF and q.shape[-1] <= 256 and q.shape[-1] % 8 == 0 and _runs_flash(q.device):
        if dropout_p == 0.0:
            found.insert(0, "torch_varlen")
        if _flash_attn_function() is not None:
            found.insert(0, "flash_attn")
    return found


@functools.cache
def _log_once(backend: str, device: str, dtype: torch.dtype) -> None:
    logger.info("variable-length attention on %s in %s: %s", device, dtype, backend)


def _choose(backend: str | None, q: torch.Tensor, dropout_p: float) -> str:
    usable = usable_backends(q, dropout_p)
    if backend is None:
        return usable[0]
    if backend == "torch":  # the best without another package
        return next(name for name in usable if name != "flash_attn")
    if backend not in BACKENDS:
        raise ValueError(f"backend: found {backend!r}, expected one of {', '.join(BACKENDS)}")
    if backend == "torch_varlen" and dropout_p:
        raise ValueError(f"dropout_p: found {dropout_p}, but backend torch_varlen has no dropout; expected 0.0")
    if backend not in usable:
        raise ValueError(
            f"backend {backend!r} cannot run on {q.device.type} in {q.dtype} with heads of {q.shape[-1]} channels; "
            f"expected one of {', '.join(usable)}"
        )
    return backend


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype that autocast gives matrix products on this tensor's device, None where it is off.

    PyTorch does not apply it by itself to the CUDA kernels here, nor to the choice between them.
    """
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


# --- the function -----------------------------------------------------------------------------------------------------


@torch.compiler.disable  # it works with lengths on the host; a compiled block is cut here once rather than many times
def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    *,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> torch.Tensor:
    """Attention within each segment of a packed sequence, differentiable.

    Args:
        q: [Nq, H, E].
        k, v: [Nk, G, E]; H must be a multiple of G (grouped-query attention).
        cu_seqlens: [S + 1] integers, where the segments of q begin and the last one ends.
        max_seqlen: longest segment of q.
        cu_seqlens_k, max_seqlen_k: the same for k and v where their lengths differ from q's.
        causal: a query sees the keys up to its own place; the last query of a segment sees all of the segment's keys.
        scale: factor on q k; None: E ** -0.5.
        dropout_p: dropout on the attention weights; torch_varlen has none.
        backend: one of `BACKENDS`; "torch" for the best of PyTorch's own; None for the best there is.

    Returns:
        [Nq, H, E].

    Raises:
        ValueError: shapes or lengths that do not fit together, an empty segment, a backend that cannot run here.
    """
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q, k, v: found shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}, expected [Nq, H, E] and "
            "twice [Nk, G, E] with H a multiple of G"
        )
    if autocast_dtype(q) is not None:
        q, k, v = (x.to(autocast_dtype(q)) for x in (q, k, v))
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v: found {q.dtype}, {k.dtype}, {v.dtype}, expected one dtype")
    host_q = _host_copy(cu_seqlens, "cu_seqlens")
    _check_total(host_q, q, max_seqlen, "cu_seqlens", "q")
    host_k = host_q
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens
        _check_total(host_k, k, max_seqlen, "cu_seqlens", "k")
    else:
        host_k = _host_copy(cu_seqlens_k, "cu_seqlens_k")
        _check_total(host_k, k, max_seqlen_k, "cu_seqlens_k", "k")
        if len(host_k.lengths) != len(host_q.lengths):
            raise ValueError(
                f"cu_seqlens_k: describes {len(host_k.lengths)} segments, cu_seqlens {len(host_q.lengths)}"
            )
        if causal and any(b < a for a, b in zip(host_q.lengths, host_k.lengths, strict=True)):
            raise ValueError("causal: a segment has fewer keys than queries, so that its first queries see none")
    chosen = _choose(backend, q, dropout_p)
    _log_once(chosen, q.device.type, q.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    cu_q, cu_k = (cu.to(device=q.device, dtype=torch.int32) for cu in (cu_seqlens, cu_seqlens_k))
    return BACKENDS[chosen](q, k, v, host_q, host_k, cu_q, cu_k, causal, scale, dropout_p)


def _check_total(host: _HostCopy, tokens: torch.Tensor, max_seqlen: int | None, cu_name: str, name: str) -> None:
    if host.total != len(tokens):
        raise ValueError(f"{cu_name}: ends at {host.total}, but {name} has {len(tokens)} tokens")
    if max_seqlen is not None and max_seqlen < host.longest:  # kernels would leave out what is beyond it
        raise ValueError(f"max_seqlen: found {max_seqlen}, but a segment of {name} has {host.longest} tokens")


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

    Rows packed into one, described by `cu_seq_lens_q/k` and `max_length_q/k`, go through `varlen_attention`; every
    other call is transformers' sdpa.

    Args:
        query: [B, H, L, E]; key, value: [B, G, M, E]; B is 1 for packed rows.

    Returns:
        ([B, L, H, E], None).

    Raises:
        ValueError: packed rows in several batch rows, with padding, without `cu_seq_lens_q`, or of a model that changes
            the scores (a sliding window, soft capping, a bias, sinks).
    """
    if cu_seq_lens_q is None:
        if _marks_packing(attention_mask):
            raise ValueError(
                "attn_implementation varlen: position_ids start anew within a row, which means packed sequences; "
                "give cu_seq_lens_q, cu_seq_lens_k, max_length_q and max_length_k too"
            )
        # a sliding window is in the mask already
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    if query.shape[0] != 1:
        raise ValueError(f"cu_seq_lens_q: came with a batch of {query.shape[0]} rows, expected one packed row")
    if attention_mask is not None and not _marks_packing(attention_mask):
        raise ValueError("cu_seq_lens_q: came with an attention_mask that masks tokens; packed rows have no padding")
    for name in ("softcap", "position_bias", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}: attn_implementation varlen has none for packed rows; expected None")
    longest = int(max_length_q) if max_length_q is not None else _host_copy(cu_seq_lens_q, "cu_seq_lens_q").longest
    if sliding_window is not None and sliding_window < longest:
        raise ValueError(f"sliding_window {sliding_window}: attn_implementation varlen has none; expected sdpa")
    out = varlen_attention(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        cu_seq_lens_q,
        longest,
        cu_seqlens_k=cu_seq_lens_k,
        max_seqlen_k=None if max_length_k is None else int(max_length_k),
        causal=getattr(module, "is_causal", True) if is_causal is None else is_causal,
        scale=scaling,
        dropout_p=dropout,
    )
    return out[None], None


def _marks_packing(attention_mask) -> bool:
    return attention_mask is not None and attention_mask.numel() == 0


def varlen_mask(
    batch_size,
    q_length,
    kv_length,
    *args,
    attention_mask=None,
    allow_is_causal_skip=True,
    allow_is_bidirectional_skip=None,
    use_vmap=False,
    **kwargs,
):
    """transformers' mask function for `attn_implementation="varlen"`: sdpa's, but an empty tensor for packed rows.

    Their mask would be quadratic in their length, and `varlen_attention` does without.
    """
    # Causal, without padding, cache or a rule of the model's own, and yet the skip is forbidden: transformers found
    # positions that start anew.
    bidirectional = allow_is_bidirectional_skip is not None
    plain = attention_mask is None and q_length == kv_length > 1 and not use_vmap and not bidirectional
    if plain and not allow_is_causal_skip:
        return torch.empty(0, dtype=torch.bool, device=kwargs.get("device"))
    if bidirectional:
        kwargs["allow_is_bidirectional_skip"] = allow_is_bidirectional_skip
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        *args,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        use_vmap=use_vmap,
        **kwargs,
    )


AttentionInterface.register("varlen", varlen_attention_forward)
AttentionMaskInterface.register("varlen", varlen_mask)
