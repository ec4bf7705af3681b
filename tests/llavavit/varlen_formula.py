"""Variable-length attention as a formula in float64, and inputs for it."""

import torch

from llavavit.varlen_attention import pack_lengths, varlen_attention


def formula(q, k, v, lengths_q, lengths_k=None, causal=False, scale=None, window=None, softcap=None):
    """softmax(scale q k) v of every query alone, in float64; the last query of a segment sees its last key.

    With `softcap` the softmax of tanh(scale q k / softcap) softcap, with `window` of the last so many keys alone.
    """
    q, k, v = q.double(), k.double(), v.double()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    shared = q.shape[1] // k.shape[1]
    out, at_q, at_k = [], 0, 0
    for queries, keys in zip(lengths_q, lengths_k or lengths_q, strict=True):
        heads = []
        for head in range(q.shape[1]):
            own = k[at_k : at_k + keys, head // shared]
            scores = q[at_q : at_q + queries, head] @ own.T * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if causal:
                back = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)[None]
                seen = (back >= 0) & (back < (window or keys))
                scores = torch.where(seen, scores, -torch.inf)
            weights = (scores - scores.amax(1, keepdim=True)).exp()
            heads.append(weights / weights.sum(1, keepdim=True) @ v[at_k : at_k + keys, head // shared])
        out.append(torch.stack(heads, 1))
        at_q, at_k = at_q + queries, at_k + keys
    return torch.cat(out)


def make(lengths_q, lengths_k=None, heads=2, kv_heads=2, channels=8, dtype=torch.float32):
    """Random q, k, v and the gradient of the output."""
    torch.manual_seed(sum(lengths_q) + heads)
    shapes = [(sum(lengths_q), heads, channels)] + [(sum(lengths_k or lengths_q), kv_heads, channels)] * 2
    q, k, v = (torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes)
    return q, k, v, torch.randn(shapes[0], dtype=torch.float64).to(dtype)


def call(q, k, v, lengths_q, lengths_k=None, **options):
    cu, longest = pack_lengths(lengths_q)
    if lengths_k is not None:
        options["cu_seqlens_k"], options["max_seqlen_k"] = pack_lengths(lengths_k)
    return varlen_attention(q, k, v, cu, longest, **options)


CASES = {
    "one token": dict(lengths_q=[1]),
    "one segment": dict(lengths_q=[9]),
    "single tokens": dict(lengths_q=[1, 1, 1]),
    "equal": dict(lengths_q=[7] * 5),
    "sorted": dict(lengths_q=[1, 2, 2, 9, 33]),
    "unsorted": dict(lengths_q=[5, 1, 17, 5, 64, 1]),
    "many of few lengths": dict(lengths_q=[3, 8] * 20 + [8] * 10),
    "thousands": dict(lengths_q=[700, 2500, 1], heads=1, kv_heads=1),
    "two to a key head": dict(lengths_q=[4, 11, 4], heads=4),
    "one key head": dict(lengths_q=[4, 11, 4], heads=4, kv_heads=1),
    "probes": dict(lengths_q=[1] * 4, lengths_k=[9, 1, 30, 9]),
    "other keys": dict(lengths_q=[6, 2, 6, 1], lengths_k=[3, 8, 4, 1], heads=4),
    "causal": dict(lengths_q=[6, 1, 13, 6], causal=True),
    "causal, equal, one key head": dict(lengths_q=[6, 6], heads=4, kv_heads=1, causal=True),
    "causal, more keys": dict(lengths_q=[4, 2, 4, 3], lengths_k=[6, 7, 6, 3], causal=True),
    "scale": dict(lengths_q=[5, 12], scale=0.9),
    "window": dict(lengths_q=[6, 1, 13, 3, 6], causal=True, window=4, heads=4),
    "window of one": dict(lengths_q=[6, 2], causal=True, window=1),
    "window, equal": dict(lengths_q=[9] * 3, causal=True, window=5, heads=4, kv_heads=1),
    "window, more keys": dict(lengths_q=[4, 2, 4, 3], lengths_k=[6, 7, 6, 3], causal=True, window=3),
    "window over all": dict(lengths_q=[6, 13], causal=True, window=13),
    "cap": dict(lengths_q=[6, 1, 13, 6], heads=4, softcap=0.7),
    "cap, causal, scale": dict(lengths_q=[6, 1, 13, 6], causal=True, softcap=1.5, scale=0.9),
    "cap, window": dict(lengths_q=[6, 1, 13, 6, 6], causal=True, window=4, softcap=0.7, heads=4),
    "cap, window, more keys": dict(lengths_q=[4, 2, 4], lengths_k=[6, 9, 6], causal=True, window=5, softcap=0.7),
}
