"""Cross entropy behind an output layer, in chunks of rows: the logits of all rows are never there together.

The output layer is called once, whatever the number of chunks, and so its hooks run once: under ZeRO-3, where the
hooks fetch the weights, every rank makes the same calls however many rows it has. In place of its own forward that one
call goes through the chunks. Shapes: N rows, D channels, V words of the vocabulary.
"""

import contextlib
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from llava.model.ranks import most_over_ranks

# No tensor of logits is larger, in float32: 2,097 rows of a vocabulary of 32,000, 441 of one of 152,000. A few such
# tensors are there at a time. Smaller chunks would read the layer's weights more often.
LOGITS_BYTES = 256 * 2**20


def rows_per_chunk(words: int) -> int:
    """Rows whose float32 logits over `words` stay within `LOGITS_BYTES`; one at least."""
    return max(1, LOGITS_BYTES // (4 * words))


def is_plain(layer: nn.Module) -> bool:
    """Whether the layer is x @ weight.T + bias and nothing else: no adapter, no quantised weight."""
    own = layer.__dict__.get("_old_forward" if hasattr(layer, "_hf_hook") else "forward")
    return type(layer).forward is nn.Linear.forward and getattr(own, "__func__", nn.Linear.forward) is nn.Linear.forward


def count_chunks(model, hidden_ND: torch.Tensor) -> int:
    """How many chunks the rows go through the model's output layer in; of one, no part of this file is needed.

    A layer that is more than its weight is called on each chunk. Under ZeRO-3 the ranks then agree on how often, and
    each must call this.
    """
    layer = model.get_output_embeddings()
    chunks = max(1, -(-len(hidden_ND) // rows_per_chunk(_words(model, layer))))
    return chunks if is_plain(layer) else most_over_ranks(chunks, model, hidden_ND.device)


def summed_loss(model, behind: Callable, hidden_ND: torch.Tensor, targets_N: torch.Tensor, chunks: int) -> torch.Tensor:
    """Cross entropy of all rows, summed in float32.

    Args:
        model: its output layer is used.
        behind: what comes between the output layer and the loss, of logits [n, V].
        chunks: of `count_chunks`.
    """
    layer = model.get_output_embeddings()
    rows = rows_per_chunk(_words(model, layer))
    if not is_plain(layer):
        return _call_by_call(layer, behind, hidden_ND, targets_N, rows, chunks)

    def forward(hidden, targets):
        return _ChunkedLoss.apply(hidden, targets, layer.weight, layer.bias, behind, rows)

    return call_once(layer, forward, hidden_ND, targets_N)


def _words(model, layer) -> int:
    """V; under ZeRO-3 a weight's own shape does not tell."""
    return getattr(layer, "out_features", None) or model.config.get_text_config().vocab_size


def call_once(layer: nn.Module, forward: Callable, *args):
    """`forward` of these arguments as a call of the layer: between its hooks, in place of its own forward."""
    with _in_place(layer, "_old_forward" if hasattr(layer, "_hf_hook") else "forward", forward):
        return layer(*args)


@contextlib.contextmanager
def _in_place(layer, name: str, forward: Callable):
    own = layer.__dict__.get(name)  # accelerate's hooks put one there
    setattr(layer, name, forward)
    try:
        yield
    finally:
        if own is None:
            delattr(layer, name)
        else:
            setattr(layer, name, own)


def _call_by_call(layer, behind, hidden_ND, targets_N, rows: int, chunks: int):
    """The layer is called on each chunk, and again in the backward pass; where the rows have run out, on none."""

    def loss_of(hidden, targets):
        return F.cross_entropy(behind(layer(hidden)).float(), targets, reduction="sum")

    total = hidden_ND.new_zeros((), dtype=torch.float32)
    for start in range(0, chunks * rows, rows):
        part = hidden_ND[start : start + rows], targets_N[start : start + rows]
        total = total + checkpoint(loss_of, *part, use_reentrant=False)
    return total


class _ChunkedLoss(torch.autograd.Function):
    """Summed cross entropy of `behind(hidden @ weight.T + bias)`; the backward pass computes each chunk's logits anew.

    Under autocast the product is in its dtype, as `nn.Linear`'s. Gradients of float32 weights are summed up in
    float32, others' in the weights' own dtype, by matrix products that add what they find.
    """

    @staticmethod
    def forward(ctx, hidden, targets, weight, bias, behind, rows):
        device = hidden.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        ctx.behind, ctx.rows = behind, rows
        ctx.save_for_backward(hidden, targets, weight, bias)
        total = hidden.new_zeros((), dtype=torch.float32)
        with torch.autocast(device, enabled=False):
            weight, bias = _cast(weight, ctx.dtype), _cast(bias, ctx.dtype)
            for part, labels in zip(hidden.split(rows), targets.split(rows), strict=True):
                logits = behind(F.linear(_cast(part, ctx.dtype), weight, bias))
                total += F.cross_entropy(logits.float(), labels, reduction="sum")
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        hidden, targets, weight, bias = ctx.saved_tensors
        to_hidden, _, to_weight, to_bias = ctx.needs_input_grad[:4]
        grad_hidden = torch.empty_like(hidden) if to_hidden else None
        grad_weight = torch.zeros_like(weight) if to_weight else None
        grad_bias = torch.zeros_like(bias) if to_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            used, shift = _cast(weight, ctx.dtype), _cast(bias, ctx.dtype)
            for start in range(0, len(hidden), ctx.rows):
                rows = slice(start, start + ctx.rows)
                part = _cast(hidden[rows], ctx.dtype)
                change = _logits_gradient(F.linear(part, used, shift), targets[rows], ctx.behind, grad)
                if to_hidden:
                    grad_hidden[rows] = change @ used
                if to_weight and used.dtype == weight.dtype:
                    grad_weight.addmm_(change.T, part)
                elif to_weight:
                    grad_weight += change.T @ part
                if to_bias:
                    grad_bias += change.sum(0)
        return grad_hidden, None, grad_weight, grad_bias, None, None


def _logits_gradient(logits, targets, behind, grad):
    """Of the loss by the output layer's own logits [n, V], times `grad`."""
    with torch.enable_grad():
        logits = logits.detach().requires_grad_()
        loss = F.cross_entropy(behind(logits).float(), targets, reduction="sum")
    return torch.autograd.grad(loss, logits, grad)[0]


def _cast(tensor, dtype):
    return tensor if tensor is None or dtype is None else tensor.to(dtype)
