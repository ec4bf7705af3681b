"""Prefill and decode speed of a large LLaVA with random weights."""

import time

import torch

from gpu_checks.measure import PeakMemory, free_memory, spread, step_seconds, synchronize
from gpu_checks.models import left_padded, make_batch, make_config, make_model, merged_inputs, parameters, row_lengths
from gpu_checks.registry import Context, Result, check

INPUT_SETS = 2  # prompts in turn, so that a repeat does not find its own data in a cache


class Generator:
    """Runs one model on prepared prompts; `run(new_tokens)` is a step for `step_seconds`."""

    def __init__(self, model, rows: int):
        self.model = model
        batches = [make_batch(model, rows, [(2, 2)], (30, 60), (0, 0), seed=10 * i) for i in range(INPUT_SETS)]
        self.lengths = row_lengths(model, batches[0])
        self.prompts = [left_padded(batch) for batch in batches]

    def run(self, new_tokens: int):
        def step(i: int):
            with torch.inference_mode():
                new = self.model.generate(
                    **self.prompts[i % INPUT_SETS],
                    do_sample=False,
                    max_new_tokens=new_tokens,
                    min_new_tokens=new_tokens,
                    pad_token_id=0,
                )
            self.new_shape = tuple(new.shape)

        return step

    def encode(self, i: int):
        """Tower, projector and merge alone."""
        with torch.inference_mode():
            merged_inputs(self.model, self.prompts[i % INPUT_SETS])

    def output_layer_positions(self) -> int:
        """Positions per row for which the prefill computes logits; one is needed."""
        seen = []
        hook = self.model.lm_head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
        self.run(1)(0)
        hook.remove()
        return seen[0]


def measure(generator: Generator, context: Context, rows: int, new_tokens: int) -> dict:
    """Figures of one batch size."""
    device, repeats = context.device, context.options.generate_repeats
    positions = generator.output_layer_positions()
    with PeakMemory(device) as prefill_peak:
        prefill = step_seconds(generator.run(1), device, 1, repeats)
    with PeakMemory(device) as peak:
        whole = step_seconds(generator.run(new_tokens), device, 1, repeats)
    encode = step_seconds(generator.encode, device, 1, repeats)
    figures = spread(prefill, "prefill_") | spread(whole, "whole_") | spread(encode, "of_it_vision_")
    decode = (figures["whole_ms"] - figures["prefill_ms"]) / 1000
    return {
        "prompt_tokens": f"{min(generator.lengths)}-{max(generator.lengths)}",
        "new_tokens": new_tokens,
        **figures,
        "decode_tokens_per_s": round(rows * (new_tokens - 1) / decode, 1) if decode > 0 else None,
        "prefill_tokens_per_s": round(sum(generator.lengths) / figures["prefill_ms"] * 1000, 1),
        "prefill_logit_positions_per_row": positions,
        "prefill_peak_gib": prefill_peak.gib,
        "peak_gib": peak.gib,
        "repeats": repeats,
    }


@check("generation_speed")
def generation_speed(context: Context, result: Result):
    """Prefill ms, decode tokens/s and peak memory by batch size, a 5-crop anyres image in every prompt."""
    options = context.options
    llm = options.generate_preset or ("demo" if context.small else "qwen2-7b")
    tower = options.tower_preset or ("demo" if context.small else "clip-l336")
    dtype = torch.float32 if context.device == "cpu" else torch.bfloat16
    new_tokens = options.new_tokens or (16 if context.small else 64)
    start = time.monotonic()
    model = make_model(make_config(llm, tower, options.generate_layers), context.device, dtype)
    model.generation_config.eos_token_id = None  # every row runs to the same length
    synchronize(context.device)
    shape = f"{llm} ({model.config.num_hidden_layers} layers) with {tower}, {str(dtype).removeprefix('torch.')}"
    result.figure(
        shape,
        parameters=parameters(model),
        vision_parameters=parameters(model.get_vision_tower()),
        seconds_to_make=round(time.monotonic() - start, 1),
    )
    for rows in options.batch_sizes:
        generator = Generator(model, rows)
        figures = measure(generator, context, rows, new_tokens)
        result.figure(f"{shape}, batch {rows}, 5-crop image", batch=rows, **figures)
        speed = figures["decode_tokens_per_s"]
        result.test(
            f"batch {rows}",
            generator.new_shape == (rows, new_tokens) and speed is not None,
            f"{rows} x {new_tokens} new tokens asked, {generator.new_shape} made; "
            f"prefill {figures['prefill_ms']:.1f} ms, decode {speed} tokens/s, peak {figures['peak_gib']} GiB",
        )
        del generator
        free_memory(context.device)
