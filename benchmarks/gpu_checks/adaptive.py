"""Adaptive patches on this device: the same selection as on the host, stock outputs, and what a request gains."""

import contextlib
import statistics

import torch

from gpu_checks import qwen2_vl
from gpu_checks.adaptive_bench import CASES, SAME, SAME_BF16, Bench, aims, case_name, flat, shape_text, verdicts
from gpu_checks.measure import ceilings, step_seconds
from gpu_checks.numerics import relative
from gpu_checks.registry import Context, Result, check

IMPORTANCES = ("entropy", "laplacian", "reconstruction")
SELECTIONS = (("v1", 1.0), ("v2", 0.7), ("v2", 1.0), ("budget", 0.2), ("budget", 0.5), ("budget", 0.8))


def selection_pictures(small: bool) -> list[torch.Tensor]:
    """uint8 [B, 3, H, W] of many sizes: noise, flat areas, few colours and ramps, so that importances tie."""
    random = torch.Generator().manual_seed(0)
    sizes = [(56, 56), (84, 140), (224, 196), (70, 322)]
    sizes += [] if small else [(448, 448), (644, 420), (1008, 756), (2044, 1988), (14, 2800), (1530, 1001)]
    found = []
    for height, width in sizes:
        noise = torch.randint(0, 256, (2, 3, height, width), generator=random)
        few = torch.randint(0, 3, (2, 3, height, width), generator=random) * 90
        ramp = (torch.arange(width) * 255 // width).expand(2, 3, height, width)
        pieces = torch.stack([noise, few, ramp, torch.full_like(ramp, 77)])
        which = torch.randint(0, 4, (2, 1, -(-height // 28), -(-width // 28)), generator=random)
        which = which.repeat_interleave(28, 2).repeat_interleave(28, 3)[:, :, :height, :width]
        found.append(pieces.gather(0, which.expand(2, 3, -1, -1)[None])[0].byte())
    return found


def selected(images: torch.Tensor, importance: str) -> tuple[dict, dict]:
    """Importance maps, and labels of every selection that goes with them, all on the CPU."""
    from llava.model.adaptive_patches import PatchTokenizer

    labels, maps = {}, None
    for selection, alpha in SELECTIONS:
        if selection == "budget" and importance == "reconstruction":
            continue  # which has no importance of base patches
        thresholds = [3.0, 2.0] if importance == "entropy" else [0.3, 0.2]
        tokenizer = PatchTokenizer(3, 14, thresholds, (0.0,) * 3, (1.0,) * 3, importance, selection, alpha)
        maps = tokenizer.compute_importance_maps(images) if maps is None else maps
        labels[case_name(selection, alpha)] = tokenizer.construct_masks(maps)[1].cpu()
    return {size: values.cpu() for size, values in maps.items()}, labels


@contextlib.contextmanager
def small_pieces():
    """On a CPU: importances of a few patches at a time, so that sums are made in another order."""
    from llava.model.adaptive_patches import importance

    plain = importance.CPU_ENTRIES
    importance.CPU_ENTRIES = 1 << 14
    try:
        yield
    finally:
        importance.CPU_ENTRIES = plain


@check("adaptive_selection")
def adaptive_selection(context: Context, result: Result):
    """Adaptive patches: importance maps and selections of host and device identical, over sizes and methods."""
    pictures, cuda = selection_pictures(context.small), context.device == "cuda"
    for importance in IMPORTANCES:
        unequal_maps, unequal_labels, compared = [], [], 0
        for images in pictures:
            maps, labels = selected(images, importance)
            with contextlib.nullcontext() if cuda else small_pieces():
                other_maps, other_labels = selected(images.to(context.device), importance)
            shape = "x".join(map(str, images.shape[2:]))
            unequal_maps += [f"{shape}, {size} px" for size in maps if not torch.equal(maps[size], other_maps[size])]
            unequal_labels += [
                f"{shape}, {name}" for name in labels if not torch.equal(labels[name], other_labels[name])
            ]
            compared += len(labels)
        where = "host against device" if cuda else "large against small pieces"
        text = f"{len(pictures)} sizes; different: {', '.join(unequal_maps) or 'none'}"
        result.test(f"{importance} maps, {where}", not unequal_maps, text)
        text = f"{compared} selections of two pictures; different: {', '.join(unequal_labels) or 'none'}"
        result.test(f"{importance}, levels, {where}", compared > 0 and not unequal_labels, text)
    for images in pictures[-2:]:
        result.figure(f"entropy and budget 0.5, two images of {images.shape[3]}x{images.shape[2]}", **select_ms(images))


def select_ms(images: torch.Tensor) -> dict[str, float]:
    """ms of importance and selection on the host and, where there is one, the device, the way there and back too."""
    from llava.model.adaptive_patches import PatchTokenizer

    tokenizer = PatchTokenizer(3, 14, None, (0.0,) * 3, (1.0,) * 3, "entropy", "budget", 0.5)
    found = {}
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):

        def step(_, device=device):
            maps = tokenizer.compute_importance_maps(images.to(device))
            return tokenizer.construct_masks(maps)[1].cpu()

        found[f"{device}_ms"] = round(statistics.median(step_seconds(step, "cpu", 2, 5)) * 1000, 3)
    return found


@check("adaptive_equals_stock")
def adaptive_equals_stock(context: Context, result: Result):
    """Adaptive Qwen2-VL with all base patches gives transformers' own logits; fewer patches in bf16 as in float32."""
    from transformers import Qwen2VLForConditionalGeneration

    bench = Bench(context.device, "small", None, torch.float32)
    with torch.no_grad():  # weights large enough that pixels and places tell in the logits
        for value in bench.model.parameters():
            if value.ndim > 1:
                value.normal_(std=0.1)
    stock = Qwen2VLForConditionalGeneration._from_config(bench.config, attn_implementation="sdpa")
    stock.load_state_dict(bench.model.state_dict())
    stock = stock.to(context.device).eval()
    picture = qwen2_vl.text_page((308, 224))

    @torch.no_grad()
    def logits(model, case):
        return model(**bench.inputs(picture, case, rows=2).to(context.device)).logits.float()

    exact = {case: logits(bench.model, case) for case in CASES[:5]}
    expected = logits(stock, CASES[0])
    for case in CASES[:2]:
        difference = (exact[case] - expected).abs().max().item()
        result.below(f"{case_name(*case)} against transformers, float32", logits=(difference, SAME))
    bench.model.bfloat16(), stock.bfloat16()
    expected = logits(stock, CASES[0])
    for case in CASES[:2]:
        limits = {"relative": (relative(logits(bench.model, case), expected), SAME_BF16)}
        result.below(f"{case_name(*case)} against transformers, bf16", **limits)
    for case in CASES[2:5]:
        limits = {"relative": (relative(logits(bench.model, case), exact[case]), 5e-2)}
        result.below(f"{case_name(*case)}, bf16 against float32", **limits)


@check("adaptive_speed")
def adaptive_speed(context: Context, result: Result):
    """Qwen2-VL with adaptive patches against all patches: tokens, time of each phase, memory, allowed speed-up."""
    small, options = context.small, context.options
    preset, dtype = ("small", torch.float32) if small else ("qwen2-vl-7b", torch.bfloat16)
    most_pixels = 224 * 224 if small else None
    bench = Bench(context.device, preset, options.generate_layers, dtype, most_pixels, process_on="device")
    pictures = {"page of text": qwen2_vl.text_page((224, 224))} if small else qwen2_vl.load_pictures()
    result.figure("device", **ceilings(context.device, small))
    for name, picture in pictures.items():
        for rows in (1,) if small else (1, 8):
            found = bench.run(picture, rows, 1 if small else options.generate_repeats)
            shape = f"{shape_text(bench, preset)}; {name}, {rows} in a batch"
            for case, entry in found.items():
                result.figure(f"{shape}; {case}", **flat(entry))
            for aim in [] if small else aims(found, context.device):
                result.figure(f"{shape}; aim, {aim['aim']}", **{key: aim[key] for key in list(aim)[1:]})
            for label, holds, text in verdicts(found, dtype):
                result.test(f"{name}, {rows} in a batch, {label}", holds, text)
