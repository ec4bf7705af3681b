"""The HEVC-ViT encoders as one graph (`torch.compile(fullgraph=True)`) against themselves run eagerly."""

import gc
import statistics

import torch
from torch._dynamo.utils import counters

from gpu_checks import sides
from gpu_checks.measure import spread, step_seconds
from gpu_checks.numerics import relative
from gpu_checks.registry import Context, Result, check
from llavavit import LlavaViTConfig, LlavaViTModel
from llavavit.conversion import convert_config, convert_state_dict

KINDS = ("padded", "packed")
# relative, of a tensor as a whole: (outputs, all gradients)
SAME = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (3e-2, 5e-2)}


def make_encoder(kind: str, preset: str, device: str, dtype: torch.dtype, **changes):
    """One of `KINDS`, the same weights in both; preset and changes as in `sides.make_model`."""
    packed = sides.make_model(preset, device, dtype, **changes)
    if kind == "packed":
        return packed
    with torch.device(device):
        padded = LlavaViTModel._from_config(convert_config(packed.config.to_dict(), LlavaViTConfig), dtype=dtype)
    padded.load_state_dict(convert_state_dict(packed.state_dict(), "padded"))
    return padded.eval()


def make_inputs(kind: str, model, images: int, pixels: tuple[int, int], seed: int) -> list[dict]:
    """Three batches of other numbers of images: of one size (the largest) padded, of mixed sizes packed."""
    batches = []
    for i, count in enumerate((images, images // 2 + 2, images - 1)):
        sizes = sides.draw_sizes(count, *pixels, model.config.patch_size, seed + i)
        if kind == "padded":
            side = pixels[1] // model.config.patch_size * model.config.patch_size
            sizes = [(side, side)] * count
        drawn = sides.draw_images(sizes, model.device.type, model.dtype, seed + i)
        if kind == "padded":
            batches.append({"pixel_values": torch.stack(drawn)})
        else:
            rows, grid = sides.pack(drawn, model.config.patch_size)
            batches.append({"hidden_states": rows, "grid_thw": torch.tensor(grid)})
    return batches


def run(function, model, inputs: dict, backward: bool):
    """(states, pooled), and with `backward` the gradient of all weights in one row."""
    with torch.set_grad_enabled(backward):
        out = function(**inputs)
        found = [out.last_hidden_state, out.pooler_output]
        if not backward:
            return found
        model.zero_grad(set_to_none=True)
        sum(value.float().square().mean() for value in found).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return [*(value.detach() for value in found), gradient]


def compare(model, backend: str, batches: list[dict]) -> tuple[object, dict]:
    """The compiled model, and how far it is from the eager one over all batches.

    Returns:
        torch.compile's function, {"outputs", "gradients": (relative difference, limit), "graphs": how many were made}.
    """
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    outputs = gradients = 0.0
    for inputs in batches:
        pairs = zip(run(compiled, model, inputs, True), run(model, model, inputs, True), strict=True)
        *apart, gradient = (relative(a.float(), b.float()) for a, b in pairs)
        outputs, gradients = max(outputs, *apart), max(gradients, gradient)
    limits = SAME[model.dtype]
    return compiled, {
        "outputs": (outputs, limits[0]),
        "gradients": (gradients, limits[1]),
        "graphs": counters["stats"]["unique_graphs"],
    }


def time_both(model, compiled, batches: list[dict], device: str, backward: bool, repeats: int) -> dict[str, dict]:
    """{"eager" | "compiled": milliseconds}, the two in turn, and how much faster the second is by the medians."""
    seconds = {"eager": [], "compiled": []}
    functions = {"eager": model, "compiled": compiled}
    for function in functions.values():  # without gradients the graph is another
        run(function, model, batches[0], backward)
        run(function, model, batches[1], backward)
    gc.collect()
    for i in range(repeats):
        for name, function in functions.items():
            step = lambda _, f=function, i=i: run(f, model, batches[i % len(batches)], backward)  # noqa: E731
            seconds[name] += step_seconds(step, device, 0, 1)
    faster = statistics.median(seconds["eager"]) / statistics.median(seconds["compiled"])
    return {
        "eager": spread(seconds["eager"]),
        "compiled": spread(seconds["compiled"]) | {"faster_by": round(faster, 3)},
    }


@check("encoder_compiled")
def encoder_compiled(context: Context, result: Result):
    """Padded and packed encoders as one graph for three batches: numbers of the eager ones; times of both."""
    # (preset, images, least and most pixels, repeats)
    preset, images, pixels, repeats = ("demo", 5, (28, 56), 1) if context.small else ("vit-l", 16, (224, 672), 12)
    changes = {"num_hidden_layers": 1} if context.small else {}
    dtypes = (torch.float32,) if context.device == "cpu" else (torch.float32, torch.bfloat16)
    backend = "eager" if context.small else "inductor"  # which on a CPU wants a C++ compiler and takes minutes
    for kind in KINDS:
        for dtype in dtypes:
            model = make_encoder(kind, preset, context.device, dtype, **changes)
            batches = make_inputs(kind, model, images, pixels, seed=0)
            label = f"{kind}, {preset}, {str(dtype).removeprefix('torch.')}, {backend}, {images} images at most"
            compiled, found = compare(model, backend, batches)
            graphs = found.pop("graphs")
            result.below(label, **found)
            result.test(f"{label}, graphs", graphs == 1, f"{graphs} for three batches, expected 1")
            if dtype != dtypes[-1]:
                continue
            for mode, backward in (("forward", False), ("forward + backward", True)):
                timed = time_both(model, compiled, batches, context.device, backward, repeats)
                for name, values in timed.items():
                    result.figure(f"{label}, {mode}, {name}", **values)
