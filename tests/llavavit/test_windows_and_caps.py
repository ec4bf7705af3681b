"""Sliding windows and soft caps of packed rows: any lengths, what one segment owes another, and what is held."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llavavit import varlen_backends
from llavavit.varlen_attention import usable_backends
from tests.llavavit.varlen_formula import call, formula, make

BACKENDS = usable_backends(torch.empty(0, 2, 8))
RULES = {
    "window": dict(causal=True, window=3),
    "cap": dict(softcap=0.7),
    "cap, window": dict(causal=True, window=3, softcap=0.7),
}


@st.composite
def any_call(draw):
    """Lengths of queries and keys, heads of each, and a rule; windows from one key to more than there are."""
    lengths_q = draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    more = [draw(st.integers(0, 3)) for _ in lengths_q] if draw(st.booleans()) else [0] * len(lengths_q)
    kv_heads, share = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    rule = dict(causal=draw(st.booleans()), softcap=draw(st.one_of(st.none(), st.floats(0.2, 5))))
    if rule["causal"]:
        rule["window"] = draw(st.one_of(st.none(), st.integers(1, 13)))
    lengths_k = [a + b for a, b in zip(lengths_q, more, strict=True)]
    return lengths_q, lengths_k, dict(heads=kv_heads * share, kv_heads=kv_heads), rule


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(any_call(), st.sampled_from(BACKENDS), st.sampled_from([1, 2, 4, 1024]))
def test_any_lengths_are_the_formula(given_call, backend, at_once):
    """Outputs and gradients, the queries of a segment in blocks of any size."""
    lengths_q, lengths_k, heads, rule = given_call
    q, k, v, gradient = make(lengths_q, lengths_k, dtype=torch.float64, channels=4, **heads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen_backends, "QUERIES_AT_ONCE", at_once)
        out = call(q, k, v, lengths_q, lengths_k, backend=backend, **rule)
        found = torch.autograd.grad(out, (q, k, v), gradient)
    expected = formula(q, k, v, lengths_q, lengths_k, **rule)
    assert torch.allclose(out, expected, atol=1e-12)
    wanted = torch.autograd.grad(expected, (q, k, v), gradient)
    assert all(torch.allclose(a, b, atol=1e-11) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
def test_segments_owe_each_other_nothing(rule, backend, monkeypatch):
    """The gradient of one segment's output is zero, not small, with respect to every other's queries, keys, values."""
    monkeypatch.setattr(varlen_backends, "QUERIES_AT_ONCE", 4)
    lengths = [5, 2, 9, 5]
    q, k, v, gradient = make(lengths, heads=4)
    out = call(q, k, v, lengths, backend=backend, **RULES[rule])
    for segment, (start, end) in enumerate(itertools.pairwise([0, *itertools.accumulate(lengths)])):
        grads = torch.autograd.grad(out[start:end], (q, k, v), gradient[start:end], retain_graph=True)
        for grad in grads:
            assert grad[start:end].abs().amax() > 0.01, segment
            assert not grad[:start].any() and not grad[end:].any(), segment


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_before_the_window_get_no_gradient(backend, monkeypatch):
    monkeypatch.setattr(varlen_backends, "QUERIES_AT_ONCE", 4)
    q, k, v, _ = make([12])
    out = call(q, k, v, [12], backend=backend, causal=True, window=3)
    grads = torch.autograd.grad(out[9].sum(), (k, v))
    assert all(grad[7:10].any((1, 2)).all() and not grad[:7].any() and not grad[10:].any() for grad in grads)


def test_blocks_look_at_the_keys_that_they_see(monkeypatch):
    """A long segment costs its length times the window, and a segment that the window covers has no mask."""
    monkeypatch.setattr(varlen_backends, "QUERIES_AT_ONCE", 4)
    calls = []
    kernel = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v, mask, *a, **kw: (
            calls.append((q.shape[0], q.shape[2], k.shape[2], mask is None)) or kernel(q, k, v, mask, *a, **kw)
        ),
    )
    q, k, v, _ = make([12, 3, 3])
    call(q, k, v, [12, 3, 3], causal=True, window=3)
    # segments, queries, keys, without a mask
    assert calls == [(1, 4, 4, False), (1, 4, 6, False), (1, 4, 6, False), (2, 3, 3, True)]


@pytest.mark.parametrize("grad", [False, True])
def test_capped_scores_are_not_held(grad, monkeypatch):
    """Neither at once nor for the backward pass: what is kept grows with the tokens."""
    monkeypatch.setattr(varlen_backends, "QUERIES_AT_ONCE", 16)
    largest, kept = [], []
    plain = varlen_backends._cap
    monkeypatch.setattr(varlen_backends, "_cap", lambda x, cap: largest.append(x.numel()) or plain(x, cap))
    lengths = [128, 100, 60, 60]
    q, k, v, gradient = make(lengths, channels=8)
    with (
        torch.set_grad_enabled(grad),
        torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x),
    ):
        out = call(q, k, v, lengths, causal=True, softcap=2.0)
    assert max(largest) == 2 * 16 * 128  # heads, queries at once, keys
    assert not kept or max(kept) <= q.numel()
    assert torch.allclose(out.double(), formula(q, k, v, lengths, causal=True, softcap=2.0), atol=1e-6)
    if grad:
        blocks = len(largest)
        out.backward(gradient)
        assert len(largest) == 2 * blocks  # anew


def test_dropout_beside_a_cap_is_the_same_backward():
    """The weights dropped in the forward pass are those that the backward pass, computed anew, leaves out."""
    lengths = [6, 4]
    q, k, v, _ = make(lengths, channels=4)
    torch.manual_seed(3)
    out = call(q, k, v, lengths, softcap=2.0, dropout_p=0.5)
    # the output is linear in v: what v's gradient says is what the forward pass did
    grads = [torch.autograd.grad(out[i, 0, 0], v, retain_graph=True)[0] for i in range(6)]
    found = torch.stack([(grad * v).sum() for grad in grads])
    assert torch.allclose(found, out[:6, 0, 0], atol=1e-6)
    weights = torch.stack([grad[:6, 0, 0] for grad in grads])
    assert (weights == 0).any() and (weights > 0).any()
