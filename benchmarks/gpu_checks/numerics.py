"""Attention paths and precisions of one model against each other."""

import torch

from gpu_checks.models import make_batch, make_config, make_model, merged_inputs
from gpu_checks.registry import Context, Result, check

# float32 against float32: relative differences of loss and gradient norm, and of the logits as a whole
SAME_LOSS, SAME_GRADIENT, SAME_LOGITS = 1e-5, 1e-4, 1e-5
# bf16 (8 bits of mantissa) against float32
BF16_LOSS, BF16_LOGITS = 1e-2, 5e-2
# weights large enough that the logits, and with them the loss, depend on the input
INITIALIZER_RANGE = 0.08


def small_model(context: Context, dtype=torch.float32, attention="sdpa", state=None):
    config = make_config("demo", "demo", initializer_range=INITIALIZER_RANGE)
    model = make_model(config, context.device, dtype, attention)
    if state is not None:
        model.load_state_dict(state)
    return model


def outputs(model, batch, autocast: str | None = None) -> tuple[float, float, torch.Tensor]:
    """(training loss, gradient norm, logits at real positions [N, V] in float32)."""
    batch = {**batch, "images": [image.to(model.dtype) for image in batch["images"]]}
    low = torch.autocast(model.device.type, torch.bfloat16, enabled=autocast is not None)
    model.train().zero_grad()
    with low:
        loss = model(**batch).loss
    loss.backward()
    norm = torch.stack([p.grad.float().norm() for p in model.parameters() if p.grad is not None]).norm()
    model.eval()
    with torch.no_grad(), low:
        mask = merged_inputs(model, batch)[2].bool()
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    return loss.item(), norm.item(), logits[mask].float()


def relative(value, reference) -> float:
    if isinstance(value, torch.Tensor):
        return ((value - reference).norm() / reference.norm()).item()
    return abs(value - reference) / abs(reference)


def batch_for(model):
    # rows of unequal lengths, images of unequal grids
    return make_batch(model, 4, [(2, 2), (1, 2), (3, 1)], text=(12, 40), answer=(5, 30), seed=3)


@check("attention")
def attention(context: Context, result: Result):
    """SDPA and eager attention in float32 give one loss, gradient norm and logits."""
    reference = small_model(context, attention="eager")
    batch = batch_for(reference)
    loss, norm, logits = outputs(small_model(context, state=reference.state_dict()), batch)
    other_loss, other_norm, other_logits = outputs(reference, batch)
    result.figure("values", loss_sdpa=loss, loss_eager=other_loss, gradient_norm=norm, logits=str(list(logits.shape)))
    result.below(
        "sdpa against eager, relative",
        loss=(relative(loss, other_loss), SAME_LOSS),
        gradient_norm=(relative(norm, other_norm), SAME_GRADIENT),
        logits=(relative(logits, other_logits), SAME_LOGITS),
    )


@check("precision")
def precision(context: Context, result: Result):
    """bf16 weights, and bf16 autocast over float32 weights, stay close to float32."""
    reference = small_model(context)
    batch = batch_for(reference)
    loss, _, logits = outputs(reference, batch)
    variants = {
        "bf16 weights": outputs(small_model(context, torch.bfloat16, state=reference.state_dict()), batch),
        "bf16 autocast": outputs(reference, batch, autocast="bf16"),
    }
    for name, (low_loss, _, low_logits) in variants.items():
        result.figure(f"{name}, values", loss=low_loss, loss_float32=loss)
        result.below(
            f"{name} against float32, relative",
            loss=(relative(low_loss, loss), BF16_LOSS),
            logits=(relative(low_logits, logits), BF16_LOGITS),
        )
