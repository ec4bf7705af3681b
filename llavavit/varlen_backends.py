"""The backends of `varlen_attention`, and which of them a device, a dtype and a rule allow.

Shapes as in `varlen_attention`; B segments of equal length, L queries and M keys of one segment.
"""

import functools
import inspect
import logging
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

logger = logging.getLogger(__name__)


class Rule(NamedTuple):
    """What happens between q k and the weights: cap(scale q k), of the keys that are seen, softmax, dropout.

    The last query of a segment stands at its last key, as in flash-attn. `window` needs `causal`: a query sees itself
    and the `window` - 1 keys before it.
    """

    causal: bool
    scale: float
    dropout_p: float = 0.0
    window: int | None = None
    softcap: float | None = None


# --- each backend: (q, k, v, host_q, host_k, cu_q, cu_k, rule) -> [Nq, H, E] ------------------------------------------


def _repeat_heads(x_NGE: torch.Tensor, heads: int) -> torch.Tensor:
    """[N, G, E] -> [N, H, E], each key/value head once for every query head that shares it."""
    groups = x_NGE.shape[1]
    return x_NGE if groups == heads else x_NGE.repeat_interleave(heads // groups, dim=1)


def _reference(q, k, v, host_q, host_k, cu_q, cu_k, rule: Rule):
    k, v = _repeat_heads(k, q.shape[1]), _repeat_heads(v, q.shape[1])
    segments = zip(q.split(host_q.lengths), k.split(host_k.lengths), v.split(host_k.lengths), strict=True)
    return torch.cat([_formula(*segment, rule) for segment in segments])


def _formula(q_LHE, k_MHE, v_MHE, rule: Rule):
    """softmax(q k) v of one segment, or with a dimension in front of several."""
    scores = torch.einsum("...lhe,...mhe->...hlm", q_LHE, k_MHE) * rule.scale
    if rule.softcap is not None:
        scores = _cap(scores, rule.softcap)
    if rule.causal:
        seen = _seen(q_LHE.shape[-3], k_MHE.shape[-3], rule.window, q_LHE.device)
        scores = scores.masked_fill(~seen, -math.inf)
    weights = scores.softmax(-1, dtype=torch.promote_types(q_LHE.dtype, torch.float32))
    weights = F.dropout(weights, rule.dropout_p).to(q_LHE.dtype)
    return torch.einsum("...hlm,...mhe->...lhe", weights, v_MHE)


def _cap(scores: torch.Tensor, softcap: float) -> torch.Tensor:
    """tanh(scores / softcap) softcap, in float32 at least."""
    return (scores.to(torch.promote_types(scores.dtype, torch.float32)) / softcap).tanh() * softcap


def _seen(queries: int, keys: int, window: int | None, device) -> torch.Tensor:
    """bool [queries, keys]: the keys up to a query's own place, of these the last `window`."""
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return seen if window is None else seen.triu(keys - queries - window + 1)


def _flash_attn(q, k, v, host_q, host_k, cu_q, cu_k, rule: Rule):
    options = {}
    if rule.window is not None:
        options["window_size"] = (rule.window - 1, 0)
    if rule.softcap is not None:
        options["softcap"] = rule.softcap
    return _flash_attn_function()(
        q,
        k,
        v,
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        max_seqlen_q=host_q.longest,
        max_seqlen_k=host_k.longest,
        dropout_p=rule.dropout_p,
        softmax_scale=rule.scale,
        causal=rule.causal,
        **options,
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


def _torch_varlen(q, k, v, host_q, host_k, cu_q, cu_k, rule: Rule):
    from torch.nn.attention.varlen import varlen_attn

    options = {}
    if q.shape[1] != k.shape[1]:
        if _has_parameter(varlen_attn, "enable_gqa"):  # not in torch 2.11
            options["enable_gqa"] = True
        else:
            k, v = _repeat_heads(k, q.shape[1]), _repeat_heads(v, q.shape[1])
    # keys before and after a query's own place; -1: all of them
    window = (-1 if rule.window is None else rule.window - 1, 0 if rule.causal else -1)
    options |= {"scale": rule.scale, "window_size": window}
    return varlen_attn(q, k, v, cu_q, cu_k, host_q.longest, host_k.longest, **options)


@functools.cache
def _has_parameter(function, name: str) -> bool:
    return name in inspect.signature(function).parameters


# --- sdpa -------------------------------------------------------------------------------------------------------------

# Queries of a segment that are computed at once where scores are capped or a window shuts keys out: such a block
# looks at the keys that it sees alone, and its mask or its scores are all that is held.
QUERIES_AT_ONCE = 1024


def _group_equal(lengths_q, lengths_k) -> list[list[int]]:
    """Indices of the segments, those of equal lengths together."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, pair in enumerate(zip(lengths_q, lengths_k, strict=True)):
        groups.setdefault(pair, []).append(i)
    return list(groups.values())


def _sdpa(q, k, v, host_q, host_k, cu_q, cu_k, rule: Rule):
    groups = host_q.groups.get(host_k.lengths)
    if groups is None:
        groups = host_q.groups[host_k.lengths] = _group_equal(host_q.lengths, host_k.lengths)
    k, v = _repeat_heads(k, q.shape[1]), _repeat_heads(v, q.shape[1])
    if len(groups) == 1:
        segments = len(host_q.lengths)
        o_BLHE = _sdpa_batch(*(x.unflatten(0, (segments, -1)) for x in (q, k, v)), rule)
        return o_BLHE.flatten(0, 1)
    # split and cat rather than an index: one pass less each way, and none for a length that occurs once
    parts = q.split(host_q.lengths), k.split(host_k.lengths), v.split(host_k.lengths)
    out = [None] * len(host_q.lengths)
    for group in groups:
        batch = (part[group[0]][None] if len(group) == 1 else torch.stack([part[i] for i in group]) for part in parts)
        for i, o_LHE in zip(group, _sdpa_batch(*batch, rule).unbind(0), strict=True):
            out[i] = o_LHE
    return torch.cat(out)


def attend_equal(q, k, v, queries: int, keys: int, rule: Rule, backend: str | None):
    """Segments of `queries` and `keys` tokens each, without anything that a traced graph could not hold.

    On CUDA PyTorch's own attention takes its flash kernels where they run; "reference" is the formula, and all else one
    call of sdpa.
    """
    k, v = _repeat_heads(k, q.shape[1]), _repeat_heads(v, q.shape[1])
    batch = q.unflatten(0, (-1, queries)), k.unflatten(0, (-1, keys)), v.unflatten(0, (-1, keys))
    return (_formula if backend == "reference" else _sdpa_batch)(*batch, rule).flatten(0, 1)


def _sdpa_batch(q_BLHE, k_BMHE, v_BMHE, rule: Rule):
    """Segments of equal length: in one kernel, or in blocks of queries."""
    queries, keys = q_BLHE.shape[1], k_BMHE.shape[1]
    if rule.softcap is None and (rule.window is None or rule.window >= keys):
        return _kernel(q_BLHE, k_BMHE, v_BMHE, rule)
    compute = _kernel if rule.softcap is None else _capped
    out, end = [], 0
    for q_block in q_BLHE.split(QUERIES_AT_ONCE, 1):
        start, end = end, end + q_block.shape[1]
        # the block is a segment of its own: its last query stands at the last key that it sees
        first, last = 0, keys
        if rule.causal:
            last = end + keys - queries
            first = 0 if rule.window is None else max(0, start + keys - queries - rule.window + 1)
        out.append(compute(q_block, k_BMHE[:, first:last], v_BMHE[:, first:last], rule))
    return out[0] if len(out) == 1 else torch.cat(out, 1)


def _kernel(q_BLHE, k_BMHE, v_BMHE, rule: Rule):
    queries, keys = q_BLHE.shape[1], k_BMHE.shape[1]
    mask = None
    # is_causal aligns at the first key where the lengths differ, a mask at the last
    if rule.causal and (queries != keys or (rule.window is not None and rule.window < keys)):
        mask = _seen(queries, keys, rule.window, q_BLHE.device)
    q_BHLE, k_BHME, v_BHME = (x.transpose(1, 2) for x in (q_BLHE, k_BMHE, v_BMHE))
    o_BHLE = F.scaled_dot_product_attention(
        q_BHLE, k_BHME, v_BHME, mask, rule.dropout_p, is_causal=rule.causal and mask is None, scale=rule.scale
    )
    return o_BHLE.transpose(1, 2)


def _capped(q_BLHE, k_BMHE, v_BMHE, rule: Rule):
    """The kernels behind sdpa have no cap: scores written out, computed anew in the backward pass instead of kept."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q_BLHE, k_BMHE, v_BMHE)):
        options = {"use_reentrant": False, "preserve_rng_state": rule.dropout_p > 0}
        return checkpoint(_capped_scores, q_BLHE, k_BMHE, v_BMHE, rule, **options)
    return _capped_scores(q_BLHE, k_BMHE, v_BMHE, rule)


def _capped_scores(q_BLHE, k_BMHE, v_BMHE, rule: Rule):
    scores_BHLM = _cap(torch.einsum("blhe,bmhe->bhlm", q_BLHE, k_BMHE) * rule.scale, rule.softcap)
    if rule.causal:
        seen = _seen(q_BLHE.shape[1], k_BMHE.shape[1], rule.window, q_BLHE.device)
        scores_BHLM = scores_BHLM.masked_fill(~seen, -math.inf)
    weights_BHLM = F.dropout(scores_BHLM.softmax(-1), rule.dropout_p).to(q_BLHE.dtype)
    return torch.einsum("bhlm,bmhe->blhe", weights_BHLM, v_BMHE)


# --- the choice -------------------------------------------------------------------------------------------------------

BACKENDS = {"flash_attn": _flash_attn, "torch_varlen": _torch_varlen, "sdpa": _sdpa, "reference": _reference}
_HALF = (torch.float16, torch.bfloat16)


@functools.cache
def _runs_flash(device: torch.device) -> bool:
    """The kernels want an Ampere or later."""
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (8, 0)


def _flash_attn_takes(dropout_p: float, window: int | None, softcap: float | None) -> bool:
    """Whether flash-attn is here in a version that has what is asked for; it drops nothing out of capped scores."""
    function = _flash_attn_function()
    if function is None or (softcap is not None and dropout_p):
        return False
    asked = {"window_size": window, "softcap": softcap}
    return all(value is None or _has_parameter(function, name) for name, value in asked.items())


def usable_backends(
    q: torch.Tensor, dropout_p: float = 0.0, *, window: int | None = None, softcap: float | None = None
) -> list[str]:
    """Backends that can run on this tensor's device and dtype, the fastest first; arguments of `varlen_attention`."""
    found = ["sdpa", "reference"]
    if q.is_cuda and q.dtype in _HALF and q.shape[-1] <= 256 and q.shape[-1] % 8 == 0 and _runs_flash(q.device):
        if dropout_p == 0.0 and softcap is None:
            found.insert(0, "torch_varlen")
        if _flash_attn_takes(dropout_p, window, softcap):
            found.insert(0, "flash_attn")
    return found


@functools.cache
def log_once(backend: str, device: str, dtype: torch.dtype) -> None:
    logger.info("variable-length attention on %s in %s: %s", device, dtype, backend)


def choose_backend(backend: str | None, q: torch.Tensor, rule: Rule) -> str:
    """Name of the backend that was asked for, "torch" and None being the best of their kind.

    Raises:
        ValueError: it is unknown or cannot run here.
    """
    usable = usable_backends(q, rule.dropout_p, window=rule.window, softcap=rule.softcap)
    if backend is None:
        return usable[0]
    if backend == "torch":  # the best without another package
        return next(name for name in usable if name != "flash_attn")
    if backend not in BACKENDS:
        raise ValueError(f"backend: found {backend!r}, expected one of {', '.join(BACKENDS)}")
    if backend == "torch_varlen" and rule.dropout_p:
        raise ValueError(f"dropout_p: found {rule.dropout_p}, but backend torch_varlen has no dropout; expected 0.0")
    if backend == "torch_varlen" and rule.softcap is not None:
        raise ValueError(f"softcap: found {rule.softcap}, but backend torch_varlen has no soft cap; expected None")
    if backend not in usable:
        asked = "".join(f" and {name} {x}" for name, x in (("softcap", rule.softcap), ("window", rule.window)) if x)
        raise ValueError(
            f"backend {backend!r} cannot run on {q.device.type} in {q.dtype} with heads of {q.shape[-1]} channels"
            f"{asked}; expected one of {', '.join(usable)}"
        )
    return backend
