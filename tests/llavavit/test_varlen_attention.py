"""Variable-length attention: every backend against the formula, what is refused, and how often lengths are read."""

import pytest
import torch

from llavavit.varlen_attention import pack_lengths, usable_backends, varlen_attention
from tests.llavavit.varlen_formula import CASES, call, formula, make

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}  # relative, of a tensor as a whole

RULE = ("causal", "scale", "window", "softcap")


def relative(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", usable_backends(torch.empty(0, 2, 8)))
@pytest.mark.parametrize("case", CASES)
def test_backend_is_the_formula(case, backend, dtype):
    values = dict(CASES[case])
    q, k, v, gradient = make(dtype=dtype, **{n: x for n, x in values.items() if n not in RULE})
    values = {name: value for name, value in values.items() if name not in ("heads", "kv_heads")}
    out = call(q, k, v, backend=backend, **values)
    assert out.shape == q.shape and out.dtype == dtype
    found = torch.autograd.grad(out, (q, k, v), gradient)
    expected = formula(q, k, v, **values)
    assert relative(out, expected) < TOLERANCE[dtype]
    # softmax over one key has no gradient; the norm of v's is the measure of what counts as none
    wanted = torch.autograd.grad(expected, (q, k, v), gradient.double())
    scale = wanted[2].norm()
    for name, a, b in zip("qkv", found, wanted, strict=True):
        assert ((a.double() - b).norm() / scale).item() < TOLERANCE[dtype], name
        assert b.norm() < 1e-9 or relative(a, b) < 4 * TOLERANCE[dtype], name


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_strided_inputs(backend):
    """Parts of one projection, as the encoder hands them over, and probes that are one tensor."""
    lengths = [5, 2, 5]
    qkv = torch.randn(12, 3, 2, 8)
    assert not qkv[:, 0].is_contiguous()
    expected = formula(*qkv.unbind(1), lengths)
    assert torch.allclose(call(*qkv.unbind(1), lengths, backend=backend).double(), expected, atol=1e-6)
    probes = torch.randn(2, 8).expand(3, -1, -1)
    expected = formula(probes, qkv[:, 1], qkv[:, 2], [1] * 3, lengths)
    assert torch.allclose(
        call(probes, qkv[:, 1], qkv[:, 2], [1] * 3, lengths, backend=backend).double(), expected, atol=1e-6
    )


def test_sdpa_calls_one_per_length(monkeypatch):
    calls = []
    kernel = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, *a, **kw: calls.append(q.shape) or kernel(q, *a, **kw),
    )
    q, k, v, _ = make([3, 8] * 20)
    call(q, k, v, [3, 8] * 20)
    assert sorted(calls) == [(20, 2, 3, 8), (20, 2, 8, 8)]


# --- dropout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_dropout(backend):
    lengths = [50, 30, 50]
    q, k, v, _ = make(lengths)
    plain = call(q, k, v, lengths, backend=backend)
    assert torch.equal(call(q, k, v, lengths, backend=backend, dropout_p=0.0), plain)
    torch.manual_seed(0)
    dropped = call(q, k, v, lengths, backend=backend, dropout_p=0.5)
    assert (dropped - plain).abs().max() > 0.1
    sums = torch.stack([call(q, k, torch.ones_like(v), lengths, backend=backend, dropout_p=0.5) for _ in range(20)])
    assert sums.std() > 0.05 and abs(sums.mean().item() - 1) < 0.02  # the weights left are scaled up to the same mean


def test_dropout_where_there_is_none():
    q, k, v, _ = make([4])
    with pytest.raises(ValueError, match=r"dropout_p: found 0.1, but backend torch_varlen has no dropout"):
        call(q, k, v, [4], backend="torch_varlen", dropout_p=0.1)


# --- what is refused --------------------------------------------------------------------------------------------------


def cu(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


REFUSED = {
    "empty segment": (dict(cu_seqlens=cu(0, 4, 4, 10)), "cu_seqlens: segment 1 has length 0"),
    "negative segment": (dict(cu_seqlens=cu(0, 6, 4, 10)), "cu_seqlens: segment 1 has length -2"),
    "too short": (dict(cu_seqlens=cu(0, 4, 9)), "cu_seqlens: ends at 9, but q has 10 tokens"),
    "too long": (dict(cu_seqlens=cu(0, 4, 11)), "cu_seqlens: ends at 11, but q has 10 tokens"),
    "no start": (dict(cu_seqlens=cu(4, 10)), "cu_seqlens: begins with 4, expected 0"),
    "no segment": (dict(cu_seqlens=cu(0)), "cu_seqlens: describes no segment"),
    "nothing": (dict(cu_seqlens=cu()), "cu_seqlens: describes no segment"),
    "fractions": (dict(cu_seqlens=torch.tensor([0.0, 10.0])), r"cu_seqlens: found torch.float32 .* expected integers"),
    "yes and no": (dict(cu_seqlens=torch.tensor([False, True])), "cu_seqlens: found torch.bool"),
    "two rows": (dict(cu_seqlens=cu(0, 10)[None]), r"cu_seqlens: found torch.int32 of shape \(1, 2\)"),
    "max_seqlen": (dict(max_seqlen=5), "max_seqlen: found 5, but a segment of q has 6 tokens"),
    "max_seqlen_k": (
        dict(cu_seqlens_k=cu(0, 3, 10), max_seqlen_k=6),
        "max_seqlen: found 6, but a segment of k has 7 tokens",
    ),
    "keys too short": (dict(cu_seqlens_k=cu(0, 3, 9), max_seqlen_k=6), "cu_seqlens_k: ends at 9, but k has 10 tokens"),
    "other number": (
        dict(cu_seqlens_k=cu(0, 1, 2, 10), max_seqlen_k=8),
        "cu_seqlens_k: describes 3 segments, cu_seqlens 2",
    ),
    "empty keys": (dict(cu_seqlens_k=cu(0, 0, 10), max_seqlen_k=10), "cu_seqlens_k: segment 0 has length 0"),
    "causal, fewer keys": (
        dict(cu_seqlens_k=cu(0, 3, 10), max_seqlen_k=7, causal=True),
        "causal: a segment has fewer keys than queries",
    ),
    "unknown backend": (dict(backend="flash"), "backend: found 'flash', expected one of flash_attn, torch_varlen"),
    "not on this device": (
        dict(backend="torch_varlen"),
        "backend 'torch_varlen' cannot run on cpu in torch.float32 .* expected one of sdpa, reference",
    ),
    "window both ways": (dict(window=3), "window: found 3 without causal=True"),
    "empty window": (dict(window=0, causal=True), "window: found 0, expected at least 1"),
    "cap of zero": (dict(softcap=0.0), "softcap: found 0.0, expected a positive number or None"),
    "not a cap": (dict(softcap=float("nan")), "softcap: found nan, expected a positive number or None"),
    "a kernel without cap": (
        dict(backend="torch_varlen", softcap=30.0),
        "softcap: found 30.0, but backend torch_varlen has no soft cap",
    ),
    "not installed": (dict(backend="flash_attn"), "backend 'flash_attn' cannot run on cpu"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    changes, message = REFUSED[case]
    q, k, v, _ = make([4, 6])
    given = dict(cu_seqlens=cu(0, 4, 10), max_seqlen=6) | changes
    with pytest.raises(ValueError, match=message):
        varlen_attention(q, k, v, given.pop("cu_seqlens"), given.pop("max_seqlen"), **given)


@pytest.mark.parametrize(
    "shapes",
    [
        [(10, 8), (10, 2, 8), (10, 2, 8)],
        [(10, 2, 8), (10, 2, 8), (10, 2, 4)],
        [(10, 2, 8), (10, 2, 4), (10, 2, 4)],
        [(10, 3, 8), (10, 2, 8), (10, 2, 8)],
        [(10, 2, 8), (10, 2, 8), (9, 2, 8)],
    ],
)
def test_shapes_refused(shapes):
    with pytest.raises(ValueError, match=r"q, k, v: found shapes .* expected \[Nq, H, E\]"):
        call(*(torch.randn(shape) for shape in shapes), [10])


def test_lengths_refused():
    with pytest.raises(ValueError, match="lengths: segment 1 has length 0, expected at least 1"):
        pack_lengths([3, 0, 2])
    with pytest.raises(ValueError, match="lengths: describes no segment"):
        pack_lengths([])


def test_dtypes_refused():
    q, k, v, _ = make([4])
    with pytest.raises(ValueError, match=r"q, k, v: found torch.float32, torch.float32, torch.bfloat16"):
        call(q, k, v.bfloat16(), [4])


def test_autocast_is_one_dtype():
    """Rotary embedding in float32 leaves q and k so, beside a v from an autocast projection."""
    lengths = [4, 6]
    q, k, v, gradient = make(lengths)
    with torch.autocast("cpu", torch.bfloat16):
        out = call(q, k, v.bfloat16(), lengths, backend="reference")
    assert out.dtype == torch.bfloat16 and relative(out, formula(q, k, v, lengths)) < 2e-2
    out.backward(gradient.bfloat16())
    assert q.grad.dtype == torch.float32 and q.grad.norm() > 0


# --- one read of the lengths ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("made_inside", [True, False])
def test_lengths_are_read_once(reads, mode, made_inside):
    q, k, v, _ = make([4, 6])
    expected = formula(q, k, v, [4, 6]).detach()
    outside = cu(0, 4, 10)
    with mode():
        starts = cu(0, 4, 10) if made_inside else outside
        outs = [varlen_attention(q, k, v, starts, 6) for _ in range(3)]
        assert len(reads) == 1
        packed, longest = pack_lengths([4, 6])
        outs.append(varlen_attention(q, k, v, packed, longest))
        assert len(reads) == 1 and longest == 6 and packed.dtype == torch.int32
    assert all(torch.allclose(out.double(), expected, atol=1e-6) for out in outs)


def test_change_in_place_is_noticed(reads):
    q, k, v, _ = make([4, 6])
    starts, _ = pack_lengths([4, 6])
    assert torch.allclose(varlen_attention(q, k, v, starts, 6).double(), formula(q, k, v, [4, 6]), atol=1e-6)
    starts[1] = 5
    assert torch.allclose(varlen_attention(q, k, v, starts, 6).double(), formula(q, k, v, [5, 5]), atol=1e-6)
    starts[1] = 0
    with pytest.raises(ValueError, match="segment 0 has length 0"):
        varlen_attention(q, k, v, starts, 10)
    assert len(reads) == 2


def test_long_integers_and_lists_of_tensors():
    q, k, v, _ = make([4, 6])
    out = varlen_attention(q, k, v, cu(0, 4, 10, dtype=torch.int64), 6)
    assert torch.allclose(out.double(), formula(q, k, v, [4, 6]), atol=1e-6)
    assert pack_lengths(torch.tensor([4, 6]))[0].tolist() == [0, 4, 10]
