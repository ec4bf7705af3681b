"""Vision backbones of transformers as towers on this device: each type of `FACTS`, of its config class's own size.

Weights are random: hubs are out of a benchmark's reach.
"""

import statistics
import tempfile
from pathlib import Path

import torch

from gpu_checks.measure import free_memory, step_seconds, waits_of
from gpu_checks.models import parameters
from gpu_checks.numerics import relative
from gpu_checks.registry import Context, Result, check

DEPTH = {True: 2, False: 3}  # small or not: blocks at most, since the CPU computes each type too
STOCK_WAITS = ("sam_vision_model", "sam_hq_vision_model", "swinv2")  # whose stock modules read from the device
SMALL = 5e9  # weights times tokens that a CPU computes with in seconds
FLOAT32, BF16 = 1e-4, 5e-2  # relative: the device against the CPU in float32, bf16 against float32
SAME_GRADIENT = 1e-3  # relative, of all gradients as one


def make_tower(kind: str, folder: Path, depth: int):
    """A tower with random weights; None where the installed transformers lacks the type."""
    import transformers

    from llava.model.multimodal_encoder.builder import build_vision_tower
    from llava.model.multimodal_encoder.hf_facts import FACTS, PACKED

    if kind in PACKED:
        from llava.model.multimodal_encoder.packed_encoders import ENCODERS

        model_class = ENCODERS[PACKED[kind].name]
        config_class = model_class.config_class
    else:
        config_class, model_class = (getattr(transformers, FACTS[kind].name + end, None) for end in ("Config", "Model"))
        if config_class is None or model_class is None:
            return None
    own = config_class().to_dict()
    blocks = next((name for name in ("num_hidden_layers", "depth") if isinstance(own.get(name), int)), None)
    config = config_class(**({blocks: depth} if blocks and own[blocks] > depth and "depths" not in own else {}))
    torch.manual_seed(0)
    model_class(config).save_pretrained(folder)
    return build_vision_tower({"mm_vision_tower": str(folder), "mm_vision_select_layer": -1}).eval()


def gradients(tower, images) -> torch.Tensor:
    """Of the features' mean square, all in one [N]."""
    tower.zero_grad(set_to_none=True)
    tower(images).float().square().mean().backward()
    found = [p.grad.float().flatten().cpu() for p in tower.vision_tower.parameters() if p.grad is not None]
    tower.zero_grad(set_to_none=True)
    return torch.cat(found)


def train_all(tower) -> None:
    tower.vision_tower.requires_grad_(True)
    for module in tower.unused_modules():
        module.requires_grad_(False)


def compare(tower, images: torch.Tensor, device: str) -> dict:
    """Leaves the tower on the device in float32."""
    train_all(tower)
    with torch.no_grad():
        expected = tower(images)
    wanted = gradients(tower, images)
    tower.to(device)
    here = images.to(device)
    with torch.no_grad():
        found = tower(here)
    differ = relative(found.cpu(), expected), relative(gradients(tower, here), wanted)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        low = relative(tower(here).float().cpu(), expected)
    return {"float32": (differ[0], FLOAT32), "gradients": (differ[1], SAME_GRADIENT), "bf16": (low, BF16)}


def measure(tower, device: str, count: int) -> dict:
    tower.to(torch.bfloat16)
    images = torch.randn(count, 3, tower.image_size, tower.image_size, device=device, dtype=torch.bfloat16)

    def forward(_):
        with torch.no_grad():
            tower(images)

    def both(_):
        tower(images).float().square().mean().backward()

    rates = {
        name: round(count / statistics.median(step_seconds(step, device, 2, 5)), 1)
        for name, step in (("forward", forward), ("forward_backward", both))
    }
    return {f"{name}_images_per_s": rate for name, rate in rates.items()}


def own_names() -> list[str]:
    """Every type by its own name: some go by that of the larger model too that they are half of, which comes first."""
    from llava.model.multimodal_encoder.hf_facts import FACTS, PACKED

    return list({facts.name: kind for kind, facts in (FACTS | PACKED).items()}.values())


def check_type(kind: str, context: Context, result: Result) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tower = make_tower(kind, Path(folder), DEPTH[context.small])
    if tower is None:
        result.figure(kind, lacking="not in the installed transformers")
        return
    if context.small and parameters(tower) * tower.num_patches > SMALL:
        result.figure(kind, left_out="too large for a CPU")
        return
    side = tower.image_size
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    result.below(kind, **compare(tower, images, context.device))
    if context.device != "cuda":
        return
    here = images.to("cuda")
    if kind not in STOCK_WAITS:
        waited = waits_of(lambda: tower(here).square().mean().backward())
        result.test(f"{kind}, no wait for the device", not waited, waited or "forward and backward")
    tower.zero_grad(set_to_none=True)
    count = max(2, 32 * min(576, tower.num_patches) // tower.num_patches)  # fewer of large ones
    shape = {"pixels": side, "tokens": tower.num_patches}
    result.figure(f"{kind}, bf16, {count} images", **shape, **measure(tower, "cuda", count))


@check("backbones")
def backbones(context: Context, result: Result):
    """Each type of transformers' vision backbones: features and gradients as on the CPU, bf16, no wait, images/s."""
    for kind in own_names():
        try:
            check_type(kind, context, result)
        except Exception as error:  # the others are still tried
            result.test(kind, False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        free_memory(context.device)
