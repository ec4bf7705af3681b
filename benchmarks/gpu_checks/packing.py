"""Packed rows against padded ones on one mixture of samples: the numbers, then speed, memory and utilisation."""

import statistics
from contextlib import nullcontext

import torch

from gpu_checks import train_ways
from gpu_checks.measure import PeakMemory, free_memory, peak_tflops, spread, step_seconds, waits_of
from gpu_checks.models import make_config, make_model, parameters
from gpu_checks.registry import Context, Result, check
from llava.constants import TUNABLE_PARTS

SETS = 3  # batches that the timed steps take in turn
EXACT = 1e-5  # loss, and gradients over the largest one of their tensor; float32
HALF = (1e-2, 5e-2)  # relative; loss and gradients in bf16 autocast


def make_ways(context: Context, llm: str, tower: str) -> dict[str, train_ways.Project]:
    """Two ways to use one model that is trained as a whole."""
    model = make_model(make_config(llm, tower, use_cache=False), context.device, torch.float32).train()
    model.requires_grad_(True)
    model.get_model().describe_vision()
    return {name: train_ways.Project(model, pack=name == "packed") for name in ("padded", "packed")}


def samples_of(model, count: int) -> list[dict]:
    """The first of the committed mixture, its pictures as large beside a crop as they are beside one of 336."""
    mixture = train_ways.read_mixture(model.get_vision_tower().image_size / 336)
    return train_ways.make_samples((mixture * (count // len(mixture) + 1))[:count], model.config.vocab_size - 1)


def low_precision(device: str):
    return torch.autocast("cuda", torch.bfloat16) if device == "cuda" else nullcontext()


def gradients(way, samples: list[dict], precision) -> tuple[float, dict]:
    way.model.zero_grad()
    with precision:
        loss = way.loss(samples)
    loss.backward()
    found = {name: p.grad.float().clone() for name, p in way.model.named_parameters() if p.grad is not None}
    way.model.zero_grad()
    return loss.item(), found


def compare(ways: dict, samples: list[dict], precision) -> tuple[float, float]:
    """How far packed is from padded: the loss, relative; the worst gradient tensor, over its largest value."""
    return distance(*(gradients(ways[name], samples, precision) for name in ("packed", "padded")))


def distance(measured: tuple[float, dict], reference: tuple[float, dict]) -> tuple[float, float]:
    """Of one loss with its gradients from another, as `compare` gives it."""
    (loss, found), (expected_loss, expected) = measured, reference
    assert found.keys() == expected.keys()
    largest = max(value.abs().max().item() for value in expected.values())
    worst = max((found[name] - value).abs().max().item() for name, value in expected.items())
    return abs(loss - expected_loss) / abs(expected_loss), worst / largest


@check("packing")
def packing(context: Context, result: Result):
    """Packed rows against padded ones: loss and gradients, float32 and bf16; the host never waits."""
    ways = make_ways(context, "demo", "demo")
    samples = samples_of(ways["packed"].model, 8)
    loss, worst = compare(ways, samples, nullcontext())
    result.below("float32", loss=(loss, EXACT), gradients=(worst, EXACT))
    if context.device != "cuda":
        return
    loss, worst = compare(ways, samples, low_precision("cuda"))
    result.below("bf16 autocast", loss=(loss, HALF[0]), gradients=(worst, HALF[1]))
    batch = ways["packed"].batch(samples) | {"num_items_in_batch": torch.tensor(40, device="cuda")}

    def step():
        with low_precision("cuda"):
            loss = ways["packed"].loss_of(batch)
        loss.backward()

    waited = waits_of(step)
    result.test("no wait for the device", not waited, waited or "forward and backward of a packed row")


class Steps:
    """Optimizer steps of one way; batches are made before the clock runs."""

    def __init__(self, way, sets: list[list[dict]], device: str):
        self.way, self.device, self.batches = way, device, [way.batch(samples) for samples in sets]
        self.optimizer = torch.optim.AdamW(way.model.parameters(), lr=1e-6, fused=device == "cuda")

    def __call__(self, number: int) -> None:
        with low_precision(self.device):
            loss = self.way.loss_of(self.batches[number % len(self.batches)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.way.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def sizes_of(batches: list[dict], model) -> list:
    from llava.families.batch_sizes import merged_sizes

    return [merged_sizes(batch, model) for batch in batches]


def measure(way, sets: list[list[dict]], context: Context) -> dict:
    """Figures of one way; only `out_of_memory` where it does not fit."""
    from llava.train.flops import step_flops

    try:
        steps = Steps(way, sets, context.device)
        for number in range(SETS):
            steps(number)
        with PeakMemory(context.device) as peak:
            seconds = step_seconds(steps, context.device, 1, context.options.steps)
        sizes = sizes_of(steps.batches, way.model)
    except torch.OutOfMemoryError as error:
        return {"out_of_memory": str(error).split(".")[0]}
    finally:
        way.model.zero_grad(set_to_none=True)
        free_memory(context.device)
    median = statistics.median(seconds)
    each = [
        step_flops(way.model.config, s.tokens, s.patches, set(TUNABLE_PARTS), supervised=s.supervised) for s in sizes
    ]
    tflops = statistics.mean(each) / median / 1e12
    limit = peak_tflops(context.device, context.options.peak_tflops)
    tokens = sum(sum(s.tokens) for s in sizes)
    return {
        **spread(seconds, "step_"),
        "samples_per_s": round(len(sets[0]) / median, 2),
        "tokens_per_s": round(tokens / len(sizes) / median, 1),
        "efficiency": round(tokens / sum(s.slots for s in sizes), 3),
        "model_tflops_per_s": round(tflops, 4),
        "flops_utilisation": None if limit is None else round(tflops / limit, 4),
        "peak_gib": peak.gib,
    }


def set_checkpointing(model, on: bool) -> None:
    if on:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()


def speed_case(context: Context) -> tuple[dict, list[list[dict]], str]:
    """The ways, the samples of each step, and what they are called."""
    options = context.options
    llm = options.train_preset or ("small" if context.small else "qwen2-1.5b")
    tower = options.tower_preset or ("demo" if context.small else "clip-l336")
    ways, count = make_ways(context, llm, tower), 2 * options.train_batch
    samples = samples_of(ways["packed"].model, SETS * count)
    sets = [samples[at : at + count] for at in range(0, len(samples), count)]
    return ways, sets, f"{llm} with {tower}, {count} samples a step"


@check("packing_speed")
def packing_speed(context: Context, result: Result):
    """Samples/s, memory and FLOP utilisation of a training step on a mixture, packed against padded."""
    ways, sets, shape = speed_case(context)
    model = ways["packed"].model
    result.figure(shape, parameters=parameters(model), mixture="train_mixture.json")
    for checkpointing in (True, False):
        set_checkpointing(model, checkpointing)
        found, label = {}, f"{shape}, checkpointing {'on' if checkpointing else 'off'}"
        for name, way in ways.items():
            found[name] = measure(way, sets, context)
            result.figure(f"{label}, {name}", **found[name])
        if checkpointing:
            fits = all("out_of_memory" not in figures for figures in found.values())
            result.test("both ways fit", fits, str({name: figures.get("peak_gib") for name, figures in found.items()}))
        if all("step_ms" in figures for figures in found.values()):
            result.figure(label, packed_is_faster_by=found["padded"]["step_ms"] / found["packed"]["step_ms"])
