"""The operator that stands for variable-length attention in traced graphs: the formula's numbers, and what it reads."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import llavavit
from llavavit.varlen_attention import traced_attention, varlen_attention
from tests.llavavit.varlen_formula import CASES, formula, make

RULE = ("causal", "scale", "window", "softcap")


def starts(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


def traced(q, k, v, lengths_q, lengths_k=None, **rule):
    keys = {} if lengths_k is None else {"cu_seqlens_k": starts(lengths_k)}
    return traced_attention(q, k, v, starts(lengths_q), None, **keys, **rule)


def relative(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("case", CASES)
def test_operator_is_the_formula(case):
    values = dict(CASES[case])
    q, k, v, gradient = make(**{name: x for name, x in values.items() if name not in RULE})
    values = {name: x for name, x in values.items() if name not in ("heads", "kv_heads")}
    out, expected = traced(q, k, v, **values), formula(q, k, v, **values)
    assert out.is_contiguous() and relative(out, expected) < 2e-6
    wanted = torch.autograd.grad(expected, (q, k, v), gradient.double())
    for found, other in zip(torch.autograd.grad(out, (q, k, v), gradient), wanted, strict=True):
        assert ((found.double() - other).norm() / wanted[2].norm()).item() < 2e-6


@pytest.mark.parametrize("rule", [{}, {"causal": True, "window": 4}, {"dropout_p": 0.3}], ids=str)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_operator_is_well_formed(rule):
    """Schema, shapes without values, autograd and tracing with dynamic shapes, by PyTorch's own checks."""
    q, k, v, _ = make([4, 6])
    rule = {"causal": False, "dropout_p": 0.0, "window": None} | rule
    seed = torch.tensor([5]) if rule["dropout_p"] else None
    lengths = starts([4, 6]), None, None, None
    arguments = q, k, v, *lengths, rule["causal"], 0.3, rule["dropout_p"], seed, rule["window"], None, None
    torch.library.opcheck(torch.ops.llavavit.varlen_attention.default, arguments)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("keys", [None, 7])
def test_segments_of_one_length(backend, keys):
    """Without `cu_seqlens`: eagerly and as a graph would have it."""
    lengths = [5] * 3
    q, k, v, _ = make(lengths, keys and [keys] * 3, heads=4)
    expected = formula(q, k, v, lengths, keys and [keys] * 3)
    for function in (varlen_attention, traced_attention):
        found = function(q, k, v, None, 5, max_seqlen_k=keys, backend=backend)
        assert relative(found, expected) < 2e-6, function
    with pytest.raises(ValueError, match=r"ends at 12, but [qk] has 15"):
        varlen_attention(q, k, v, None, 4)


@pytest.mark.parametrize("function", [varlen_attention, traced_attention])
def test_one_probe_a_segment(function):
    q, k, v, _ = make([1] * 3, [4, 9, 2])
    found = function(q, k, v, None, 1, cu_seqlens_k=starts([4, 9, 2]))
    assert relative(found, formula(q, k, v, [1] * 3, [4, 9, 2])) < 2e-6


def test_dropout_drops_the_same_weights_backwards():
    q, k, v, gradient = make([30, 20])
    torch.manual_seed(0)
    out = traced(q, k, v, [30, 20], dropout_p=0.5)
    after = torch.rand(1)
    (by_v,) = torch.autograd.grad(out, v, gradient)
    assert torch.allclose((by_v * v).sum(), (out * gradient).sum(), rtol=1e-5)  # the output is linear in v
    assert relative(out, formula(q, k, v, [30, 20])) > 0.1
    torch.manual_seed(0)
    assert torch.equal(traced(q, k, v, [30, 20], dropout_p=0.5), out) and torch.equal(torch.rand(1), after)
    assert not torch.equal(traced(q, k, v, [30, 20], dropout_p=0.5), out)


def test_lengths_are_read_anew():
    """A graph may write other lengths to the memory of a tensor, which then has no new version."""
    q, k, v, _ = make([4, 6])
    lengths = starts([4, 6])
    varlen_attention(q, k, v, lengths, 6)  # keeps what it read
    traced_attention(q, k, v, lengths, None)
    version = lengths._version
    lengths.numpy()[1] = 7
    assert lengths._version == version
    assert relative(traced_attention(q, k, v, lengths, None), formula(q, k, v, [7, 3])) < 2e-6


@pytest.mark.parametrize(
    "lengths, message",
    [
        (starts([4, 5]), "cu_seqlens: ends at 9, but q has 10 tokens"),
        (starts([4, 0, 6]), "cu_seqlens: segment 1 has length 0"),
        (torch.tensor([1, 10]), "cu_seqlens: begins with 1, expected 0"),
        (torch.tensor([0.0, 10.0]), r"cu_seqlens: found torch.float32 .* expected integers"),
    ],
)
def test_refused(lengths, message):
    q, k, v, _ = make([4, 6])
    with pytest.raises(ValueError, match=message):
        traced_attention(q, k, v, lengths, None)


def test_files_that_are_loaded_twice(monkeypatch):
    """A Hub folder made of these files, beside the package in one process: the operators are there once."""
    folder = Path(llavavit.__file__).parent
    spec = importlib.util.spec_from_loader("other_llavavit", loader=None, is_package=True)
    package = importlib.util.module_from_spec(spec)
    package.__path__ = [str(folder)]
    monkeypatch.setitem(sys.modules, "other_llavavit", package)
    for name in ("varlen_backends", "varlen_lengths", "varlen_op"):
        monkeypatch.setitem(sys.modules, f"other_llavavit.{name}", None)  # so that it is gone after the test
        del sys.modules[f"other_llavavit.{name}"]
    other = importlib.import_module("other_llavavit.varlen_op")
    assert other.__name__ == "other_llavavit.varlen_op"
    q, k, v, _ = make([4, 6])
    found = other.traced_attention(q, k, v, starts([4, 6]), None)
    assert relative(found, formula(q, k, v, [4, 6])) < 2e-6
