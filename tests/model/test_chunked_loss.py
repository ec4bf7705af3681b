"""The loss in chunks: the same numbers as without, and no tensor of logits above the bound."""

import contextlib
import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from llava.model import chunked_loss
from llava.model.loss import output_logits, supervised_loss
from tests.model.test_loss import FAMILIES, SIZES

ROWS, LENGTH = 2, 14
BOUND = 5 * SIZES["vocab_size"] * 4  # five rows in a chunk


class Adapted(nn.Module):
    """An output layer with a low-rank adapter, which is more than its weight."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.out_features = layer, layer.out_features
        self.down = nn.Linear(layer.in_features, 3, bias=False)
        self.up = nn.Linear(3, layer.out_features, bias=False)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.layer(x) + self.up(self.down(x))


class Scaled(nn.Linear):
    """Another forward than nn.Linear's on the same weight, as of quantised layers."""

    def forward(self, x):
        return super().forward(x) * 0.5


def causal(name="Qwen2", head=None, **changes):
    text = "Text" if name == "Gemma3" else ""
    config = getattr(transformers, f"{name}{text}Config")(**SIZES | FAMILIES[name] | changes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    if head is not None:
        model.lm_head = head(model.lm_head)
    return model


def biased(layer):
    made = nn.Linear(layer.in_features, layer.out_features)
    made.weight = layer.weight
    return made


def scaled(layer):
    made = Scaled(layer.in_features, layer.out_features, bias=False)
    made.weight = layer.weight
    return made


def batch(every=1, dtype=torch.float32):
    """Hidden states, and labels at every so many tokens."""
    torch.manual_seed(1)
    hidden = torch.randn(ROWS, LENGTH, SIZES["hidden_size"]).to(dtype)
    labels = torch.randint(0, SIZES["vocab_size"], (ROWS, LENGTH))
    labels[torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) % every != 0] = -100
    return hidden, labels


def run(model, hidden, labels, loss=supervised_loss, count=None):
    """The loss, and gradients by name."""
    model.zero_grad()
    hidden = hidden.clone().requires_grad_()
    value = loss(model, hidden, labels, count)
    value.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return value.detach(), found | {"hidden": hidden.grad}


def whole_loss(model, hidden, labels, count=None):
    """The formula, on the logits of all positions."""
    logits = output_logits(model, hidden)[:, :-1].float()
    targets = labels[:, 1:]
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    return total / ((targets != -100).sum() if count is None else count)


def assert_close(found, expected, tolerance=1e-6):
    assert found[0].item() == pytest.approx(expected[0].item(), rel=tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).abs().max() < tolerance, name
        assert gradient.any()


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that has the vocabulary as its last dimension, and how many were made."""

    bytes = made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.ndim and tensor.shape[-1] == SIZES["vocab_size"]:
                if len(tensor) == SIZES["hidden_size"]:  # the weight, which has no part in this
                    continue
                self.made += 1
                self.bytes = max(self.bytes, tensor.nbytes)
        return result


@pytest.fixture
def bound(monkeypatch):
    monkeypatch.setattr(chunked_loss, "LOGITS_BYTES", BOUND)


@pytest.mark.parametrize("count", [None, 7, torch.tensor(11)])
@pytest.mark.parametrize("name", FAMILIES)
def test_chunks_change_no_number(bound, name, count):
    model, given = causal(name), batch(every=2)
    assert_close(run(model, *given, count=count), run(model, *given, whole_loss, count))


@pytest.mark.parametrize("head", [biased, Adapted, scaled])
def test_other_output_layers(bound, head):
    model = causal("Gemma2", head)
    assert chunked_loss.is_plain(model.lm_head) == (head is biased)
    found, expected = (run(model, *batch(), loss) for loss in (supervised_loss, whole_loss))
    assert_close(found, expected)
    if head is Adapted:
        assert model.lm_head.calls == 6 * 2 + 1  # a chunk each way, and the formula


def test_tied_embeddings_have_one_gradient(bound):
    model = causal(tie_word_embeddings=True)
    ids = torch.randint(1, SIZES["vocab_size"], (ROWS, LENGTH))

    def tied(loss):
        return lambda model, hidden, labels, count: loss(model, model.model(ids)[0] + hidden * 0, labels, count)

    found, expected = (run(model, *batch(), tied(loss)) for loss in (supervised_loss, whole_loss))
    assert "lm_head.weight" not in found[1]
    for each in (found, expected):
        each[1].pop("hidden")
    assert_close(found, expected, 1e-5)


@pytest.mark.parametrize("layers", [{"lm_head.weight"}, set()])
def test_a_frozen_part_gets_nothing(bound, layers):
    model = causal()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in layers)
    found = run(model, *batch())[1]
    assert found.keys() == layers | {"hidden"}
    with torch.no_grad():
        assert supervised_loss(model, *batch()).item() == pytest.approx(whole_loss(model, *batch()).item(), rel=1e-6)


@pytest.mark.parametrize("way", ["weights", "autocast"])
def test_bfloat16_stays_close(bound, way):
    model = causal()
    hidden, labels = batch(every=1)
    exact = run(model, hidden, labels, whole_loss)
    if way == "weights":
        model, hidden = model.to(torch.bfloat16), hidden.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16) if way == "autocast" else contextlib.nullcontext():
        found = run(model, hidden, labels)
        plain = run(model, hidden, labels, whole_loss)
    assert found[0].dtype == torch.float32 and abs(found[0] - plain[0]) < 1e-3
    for name, gradient in exact[1].items():
        scale = gradient.abs().max()
        errors = [(each[1][name].float() - gradient).abs().max() / scale for each in (found, plain)]
        assert errors[0] < 0.02 and errors[0] < 2 * errors[1] + 1e-3  # no worse than without chunks
        assert found[1][name].dtype == plain[1][name].dtype


def test_half_precision_keeps_small_gradients(bound):
    """A scaled loss keeps the gradients of float16 in its range, as without chunks."""
    model, (hidden, labels) = causal().half(), batch(dtype=torch.float16)
    found, plain = (
        run(model, hidden, labels, lambda *given, loss=loss: loss(*given) * 1024)
        for loss in (supervised_loss, whole_loss)
    )
    for name, gradient in plain[1].items():
        assert (found[1][name] - gradient).abs().max() < 5e-3 * gradient.abs().max()


@pytest.mark.parametrize("head", [None, Adapted])
@pytest.mark.parametrize("name", ["Qwen2", "Gemma2"])
def test_no_logits_above_the_bound(monkeypatch, name, head):
    model, given, sizes = causal(name, head), batch(), []
    for limit in (chunked_loss.LOGITS_BYTES, BOUND):
        monkeypatch.setattr(chunked_loss, "LOGITS_BYTES", limit)
        with Largest() as seen:
            run(model, *given)
        sizes.append(seen.bytes)
        assert seen.made > 4
    rows = ROWS * (LENGTH - 1)
    assert sizes == [rows * SIZES["vocab_size"] * 4, BOUND]


def test_bound_of_known_vocabularies():
    assert chunked_loss.LOGITS_BYTES == 256 * 2**20
    assert [chunked_loss.rows_per_chunk(words) for words in (32_000, 152_064, 2**40)] == [2097, 441, 1]


def test_one_chunk_is_the_layer_as_it_was():
    model, (hidden, labels) = causal("Gemma2"), batch(every=3)
    places = (labels[:, 1:] != -100).nonzero()
    targets = labels[:, 1:][places[:, 0], places[:, 1]]

    def before(model, hidden, labels, count=None):
        rows = hidden[:, :-1][places[:, 0], places[:, 1]]
        return F.cross_entropy(output_logits(model, rows).float(), targets, reduction="sum") / len(targets)

    found, expected = run(model, hidden, labels), run(model, hidden, labels, before)
    assert found[0].equal(expected[0])
    assert all(found[1][name].equal(gradient) for name, gradient in expected[1].items())


def test_nothing_supervised(bound):
    for head in (None, Adapted):
        model, (hidden, labels) = causal(head=head), batch()
        value, found = run(model, hidden, torch.full_like(labels, -100))
        assert value == 0 and "hidden" in found and not any(gradient.any() for gradient in found.values())


def test_the_layer_is_called_once_and_left_as_it_was(bound):
    """Between its hooks, as ZeRO-3 and accelerate need it."""
    model, calls = causal(), []
    model.lm_head.register_forward_pre_hook(lambda module, inputs: calls.append(inputs[0].shape))
    before = dict(model.lm_head.__dict__)
    expected = run(model, *batch())
    assert calls == [(ROWS * (LENGTH - 1), SIZES["hidden_size"])] and model.lm_head.__dict__ == before
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(model.lm_head, ModelHook())
    hooked = dict(model.lm_head.__dict__)
    assert chunked_loss.is_plain(model.lm_head)
    assert_close(run(model, *batch()), expected)
    assert model.lm_head.__dict__ == hooked and len(calls) == 2
    with pytest.raises(IndexError):
        supervised_loss(model, batch()[0], batch()[1] + SIZES["vocab_size"])
    assert model.lm_head.__dict__ == hooked


def test_under_torch_compile(bound):
    model, (hidden, labels) = causal(), batch()
    eager = run(model, hidden, labels)
    compiled = torch.compile(supervised_loss, backend="eager")
    assert_close(run(copy.deepcopy(model), hidden, labels, compiled), eager)
