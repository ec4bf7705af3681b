"""Speed, memory and FLOP utilisation of a training step, with and without what is meant to save memory."""

import statistics
from contextlib import nullcontext

import torch

from gpu_checks.measure import PeakMemory, free_memory, peak_tflops, spread, step_seconds
from gpu_checks.models import (
    make_batch,
    make_config,
    make_model,
    merged_inputs,
    parameters,
    row_lengths,
    training_flops,
)
from gpu_checks.registry import Context, Result, check
from llava.constants import IGNORE_INDEX

INPUT_SETS = 3
SAME_LOSS = {torch.float32: 1e-5, torch.bfloat16: 1e-3}  # relative; by the dtype of the output layer
FLOPS_FORMULA = (
    "llava.train.flops: 6 * weights * tokens for the matrices of the LLM's layers, projector and tower (4 where pixels "
    "come in); 6 * L * D * S^2 (LLM, causal) and 12 * L * D * S^2 (tower) for attention; 6 * V * D * supervised tokens "
    "for the output layer; padding and recomputation not counted"
)


def supervised_loss(model, batch):
    """The model's own training loss: output layer at supervised positions only."""
    return model(**batch).loss


def full_logits_loss(model, batch):
    """transformers' loss over the logits of every position, on the same merged batch."""
    from transformers import Qwen2ForCausalLM

    embeds, labels, _ = merged_inputs(model, batch)
    return Qwen2ForCausalLM.forward(model, inputs_embeds=embeds, labels=labels, use_cache=False).loss


LOSSES = {"supervised positions": supervised_loss, "all positions": full_logits_loss}
# (loss, gradient checkpointing); the first is the reference and must fit
VARIANTS = (
    ("supervised positions", True),
    ("all positions", True),
    ("supervised positions", False),
    ("all positions", False),
)


class Stepper:
    """Model, optimizer and batches; a step is what llava.train does without DeepSpeed (bf16 autocast on CUDA)."""

    def __init__(self, context: Context, llm: str, tower: str, rows: int):
        from llava.constants import TUNABLE_PARTS
        from llava.train.parts import set_trainable

        self.device = context.device
        self.model = make_model(make_config(llm, tower, use_cache=False), context.device, torch.float32)
        set_trainable(self.model, set(TUNABLE_PARTS))
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=context.device == "cuda")
        text, answer = ((20, 40), (10, 30)) if context.small else ((60, 200), (60, 250))
        shapes = [(2, 2), (1, 3), (2, 2), (2, 1)]  # 5, 4, 5 and 3 crops with the base
        self.batches = [make_batch(self.model, rows, shapes, text, answer, seed=100 * i) for i in range(INPUT_SETS)]
        self.model.train()

    def low_precision(self):
        return torch.autocast("cuda", torch.bfloat16) if self.device == "cuda" else nullcontext()

    def step(self, loss_of):
        def run(i: int):
            with self.low_precision():
                loss = loss_of(self.model, self.batches[i % INPUT_SETS])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.last_loss = loss.detach()

        return run

    def losses(self) -> dict[str, float]:
        """Every kind of loss on the first batch, nothing stepped in between."""
        with torch.no_grad(), self.low_precision():
            return {name: loss_of(self.model, self.batches[0]).item() for name, loss_of in LOSSES.items()}

    def set_checkpointing(self, on: bool) -> None:
        # transformers 5.20 renamed it
        prefix = "activation" if hasattr(self.model, "activation_checkpointing_enable") else "gradient"
        if on:
            enable = getattr(self.model, f"{prefix}_checkpointing_enable")
            enable(**{f"{prefix}_checkpointing_kwargs": {"use_reentrant": False}})
        else:
            getattr(self.model, f"{prefix}_checkpointing_disable")()


def measure(stepper: Stepper, context: Context, loss_name: str, checkpointing: bool) -> dict:
    """Figures of one variant; only an `out_of_memory` entry where it does not fit."""
    stepper.set_checkpointing(checkpointing)
    step = stepper.step(LOSSES[loss_name])
    steps = context.options.steps
    try:
        for i in range(2):
            step(i)
        with PeakMemory(context.device) as peak:
            seconds = step_seconds(step, context.device, 1, steps)
    except torch.OutOfMemoryError as error:
        stepper.optimizer.zero_grad(set_to_none=True)
        return {"out_of_memory": str(error).split(".")[0]}
    finally:
        free_memory(context.device)
    median = statistics.median(seconds)
    tokens = statistics.mean(sum(row_lengths(stepper.model, batch)) for batch in stepper.batches)
    supervised = statistics.mean(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in stepper.batches)
    tflops = statistics.mean(training_flops(stepper.model, batch) for batch in stepper.batches) / median / 1e12
    limit = peak_tflops(context.device, context.options.peak_tflops)
    return {
        **spread(seconds, "step_"),
        "tokens_per_step": round(tokens, 1),
        "supervised_per_step": round(supervised, 1),
        "tokens_per_s": round(tokens / median, 1),
        "supervised_per_s": round(supervised / median, 1),
        "model_tflops_per_s": round(tflops, 4),
        "peak_bf16_tflops": limit,
        "flops_utilisation": None if limit is None else round(tflops / limit, 4),
        "peak_gib": peak.gib,
        "steps": steps,
    }


@check("training_speed")
def training_speed(context: Context, result: Result):
    """Tokens/s, peak memory and FLOP utilisation of a training step; checkpointing and full logits on and off."""
    options = context.options
    llm = options.train_preset or ("small" if context.small else "qwen2-1.5b")
    tower = options.tower_preset or ("demo" if context.small else "clip-l336")
    stepper = Stepper(context, llm, tower, options.train_batch)
    precision = "bf16 autocast" if context.device == "cuda" else "float32"
    shape = f"{llm} with {tower}, batch {options.train_batch}, {precision}, AdamW, all parts"
    lengths = row_lengths(stepper.model, stepper.batches[0])
    result.figure(shape, parameters=parameters(stepper.model), row_tokens=str(lengths), flops_formula=FLOPS_FORMULA)

    losses = stepper.losses()
    ours, full = losses["supervised positions"], losses["all positions"]
    limit = SAME_LOSS[torch.bfloat16 if context.device == "cuda" else torch.float32]
    result.below("loss at supervised positions against all positions, relative", loss=(abs(ours - full) / full, limit))

    found = {}
    for loss_name, checkpointing in VARIANTS:
        label = f"loss over {loss_name}, checkpointing {'on' if checkpointing else 'off'}"
        found[loss_name, checkpointing] = figures = measure(stepper, context, loss_name, checkpointing)
        result.figure(f"{shape}, {label}", **figures)
        if (loss_name, checkpointing) == VARIANTS[0]:
            fits = "out_of_memory" not in figures
            result.test(label, fits and bool(stepper.last_loss.isfinite()), _in_words(figures))
    ours, full = (found[name, True].get("peak_gib") for name in LOSSES)
    if context.device == "cuda" and ours is not None and full is not None:
        result.test("supervised positions take no more memory", ours <= full, f"{ours} GiB against {full} GiB")


def _in_words(figures: dict) -> str:
    if "out_of_memory" in figures:
        return f"does not fit: {figures['out_of_memory']}"
    return (
        f"{figures['step_ms']:.1f} ms, {figures['tokens_per_s']:,.0f} tokens/s ({figures['tokens_per_step']} a step, "
        f"{figures['supervised_per_step']} supervised), peak {figures['peak_gib']} GiB, "
        f"{figures['model_tflops_per_s']} TFLOP/s, utilisation {figures['flops_utilisation']}"
    )
