"""What `varlen_attention` does once the lengths are known, and what stands for it in traced graphs.

Shapes as in `varlen_attention`. `torch.ops.llavavit.varlen_attention` is opaque to `torch.compile` and `torch.export`:
only when it runs are the lengths read, so that one graph serves any number of tokens and segments.
"""

import contextlib
import math

import torch

from .varlen_backends import BACKENDS, Rule, attend_equal, choose_backend, log_once
from .varlen_lengths import HostCopy, host_copy, pack_lengths


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype that autocast gives matrix products on this tensor's device, None where it is off.

    PyTorch does not apply it by itself to the CUDA kernels here, nor to the choice between them.
    """
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


# --- on the host ------------------------------------------------------------------------------------------------------


def prepare(q, k, v, causal: bool, window: int | None, softcap: float | None):
    """q, k and v in the one dtype that they are worked with.

    Raises:
        ValueError: shapes, dtypes and rules that do not fit together.
    """
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q, k, v: found shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}, expected [Nq, H, E] and "
            "twice [Nk, G, E] with H a multiple of G"
        )
    if window is not None and not causal:
        raise ValueError(f"window: found {window} without causal=True; it holds the keys before a query")
    if window is not None and window < 1:
        raise ValueError(f"window: found {window}, expected at least 1: a query sees itself")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap: found {softcap}, expected a positive number or None")
    if autocast_dtype(q) is not None:
        q, k, v = (x.to(autocast_dtype(q)) for x in (q, k, v))
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v: found {q.dtype}, {k.dtype}, {v.dtype}, expected one dtype")
    return q, k, v


def _check_total(host: HostCopy, tokens: torch.Tensor, max_seqlen: int | None, cu_name: str, name: str) -> None:
    if host.total != len(tokens):
        raise ValueError(f"{cu_name}: ends at {host.total}, but {name} has {len(tokens)} tokens")
    if max_seqlen is not None and max_seqlen < host.longest:  # kernels would leave out what is beyond it
        raise ValueError(f"max_seqlen: found {max_seqlen}, but a segment of {name} has {host.longest} tokens")


def equal_segments(tokens: torch.Tensor, length: int) -> tuple[torch.Tensor, int]:
    """`pack_lengths` of tokens in segments of this length."""
    return pack_lengths([length] * (len(tokens) // length), tokens.device)


def attend(q, k, v, cu_q, max_q, cu_k, max_k, causal, scale, dropout_p, window, softcap, backend, keep=True):
    """`varlen_attention` of one dtype, its lengths read on the host; `keep` as in `host_copy`."""
    host_q = host_copy(cu_q, "cu_seqlens", keep)
    _check_total(host_q, q, max_q, "cu_seqlens", "q")
    host_k = host_q
    if cu_k is None:
        cu_k = cu_q
        _check_total(host_k, k, max_q, "cu_seqlens", "k")
    else:
        host_k = host_copy(cu_k, "cu_seqlens_k", keep)
        _check_total(host_k, k, max_k, "cu_seqlens_k", "k")
        if len(host_k.lengths) != len(host_q.lengths):
            raise ValueError(
                f"cu_seqlens_k: describes {len(host_k.lengths)} segments, cu_seqlens {len(host_q.lengths)}"
            )
        if causal and any(b < a for a, b in zip(host_q.lengths, host_k.lengths, strict=True)):
            raise ValueError("causal: a segment has fewer keys than queries, so that its first queries see none")
    if window is not None and window >= host_k.longest:
        window = None  # it shuts nothing out, and kernels are faster without
    rule = Rule(causal, scale, dropout_p, window, softcap)
    chosen = choose_backend(backend, q, rule)
    log_once(chosen, q.device.type, q.dtype)
    cu_q, cu_k = (cu.to(device=q.device, dtype=torch.int32) for cu in (cu_q, cu_k))
    return BACKENDS[chosen](q, k, v, host_q, host_k, cu_q, cu_k, rule)


# --- in a traced graph ------------------------------------------------------------------------------------------------


def traced_attention(
    q,
    k,
    v,
    cu_seqlens,
    max_seqlen,
    *,
    cu_seqlens_k=None,
    max_seqlen_k=None,
    causal=False,
    scale=None,
    dropout_p=0.0,
    window=None,
    softcap=None,
    backend=None,
):
    """`varlen_attention` in a graph that `torch.compile` or `torch.export` traces, without a break.

    Segments of equal length (`cu_seqlens` None) are plain batched attention. Others are one operator, which runs the
    same backends; its backward pass computes the attention anew, where `varlen_attention` keeps what it needs.
    """
    q, k, v = prepare(q, k, v, causal, window, softcap)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if cu_seqlens is None and cu_seqlens_k is None:
        keys = max_seqlen if max_seqlen_k is None else max_seqlen_k
        return attend_equal(q, k, v, max_seqlen, keys, Rule(causal, scale, dropout_p, window, softcap), backend)
    # the operator has no random state of its own, and its backward pass must drop the same weights
    seed = torch.randint(2**62, (1,), device="cpu") if dropout_p else None
    lengths = cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k
    return torch.ops.llavavit.varlen_attention(
        q, k, v, *lengths, causal, scale, dropout_p, seed, window, softcap, backend
    )


# --- the operator -----------------------------------------------------------------------------------------------------

# Exported programs know the operators by these names: other arguments want another name.
_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? cu_q, SymInt? max_q, Tensor? cu_k, SymInt? max_k, bool causal, float scale, "
    "float dropout_p, Tensor? seed, int? window, float? softcap, str? backend"
)


def register(name: str, schema: str, kernel, fake, backward=None, setup_context=None) -> None:
    """Make `torch.ops.llavavit.NAME`; once in a process, where a Hub folder's copy of these files is loaded as well.

    Unlike those that `torch.library.custom_op` makes, such a kernel may use autograd.
    """
    if hasattr(torch.ops.llavavit, name):
        return
    full = f"llavavit::{name}"
    torch.library.define(full, schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe))
    torch.library.impl(full, "CompositeExplicitAutograd", kernel)
    torch.library.register_fake(full, fake)
    if backward is not None:
        torch.library.register_autograd(full, backward, setup_context=setup_context)


@contextlib.contextmanager
def _seeded(seed: torch.Tensor | None, device: torch.device):
    """The random numbers of `seed`, those of everyone else left as they are; None: no random numbers are wanted."""
    if seed is None:
        yield
        return
    is_cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if is_cuda else []):
        torch.default_generator.manual_seed(int(seed))
        if is_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(int(seed))
        yield


def _forward(q, k, v, cu_q, max_q, cu_k, max_k, causal, scale, dropout_p, seed, window, softcap, backend):
    if cu_q is None:
        cu_q, max_q = equal_segments(q, max_q)
    rule = causal, scale, dropout_p, window, softcap, backend
    with _seeded(seed, q.device):
        return attend(q, k, v, cu_q, max_q, cu_k, max_k, *rule, keep=False).contiguous()


def _forward_shape(q, *args):
    return q.new_empty(q.shape)


def _backward(gradient, q, k, v, *args):
    """Gradients of q, k and v, through the attention computed anew: no backend's own state is handed on."""
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        found = torch.autograd.grad(_forward(*inputs, *args), inputs, gradient)
    return tuple(x.contiguous() for x in found)


def _backward_shape(gradient, q, k, v, *args):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup(ctx, inputs, output):
    q, k, v, cu_q, max_q, cu_k, max_k, causal, scale, dropout_p, seed, *rest = inputs
    ctx.save_for_backward(q, k, v, cu_q, cu_k, seed)
    ctx.plain = max_q, max_k, causal, scale, dropout_p, rest


def _gradients(ctx, gradient):
    q, k, v, cu_q, cu_k, seed = ctx.saved_tensors
    max_q, max_k, causal, scale, dropout_p, rest = ctx.plain
    found = torch.ops.llavavit.varlen_attention_backward(
        gradient, q, k, v, cu_q, max_q, cu_k, max_k, causal, scale, dropout_p, seed, *rest
    )
    return *found, *[None] * 11


register("varlen_attention", f"({_ARGUMENTS}) -> Tensor", _forward, _forward_shape, _gradients, _setup)
register(
    "varlen_attention_backward",
    f"(Tensor gradient, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_shape,
)
