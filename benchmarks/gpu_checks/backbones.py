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

DEPTH = {True: 2, False: 12}  # small or not: blocks at most, so that no type takes minutes
FLOAT32, BF16 = 1e-4, 5e-2  # relative: the device against the CPU in float32, bf16 against float32
SAME_GRADIENT = 1e-3  # relative, of all gradients as one


def make_tower(kind: str, folder: Path, depth: int):
    """A tower with random weights; None where the installed transformers lacks the type."""
    import transformers

    from llava.model.multimodal_encoder.builder import build_vision_tower
    from llava.model.multimodal_encoder.hf_facts import FACTS

    classes = [getattr(transformers, FACTS[kind].name + end, None) for end in ("Config", "Model")]
    if None in classes:
        return None
    blocks = classes[0]().to_dict().get("num_hidden_layers", 0)
    config = classes[0](**({"num_hidden_layers": depth} if blocks > depth and not FACTS[kind].strides else {}))
    torch.manual_seed(0)
    classes[1](config).save_pretrained(folder)
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


@check("backbones")
def backbones(context: Context, result: Result):
    """Each type of transformers' vision backbones: features and gradients as on the CPU, bf16, no wait, images/s."""
    from llava.model.multimodal_encoder.hf_facts import FACTS

    seen = set()
    for kind, facts in FACTS.items():
        if facts.name in seen:  # under the name of the larger model that it is half of
            continue
        seen.add(facts.name)
        with tempfile.TemporaryDirectory() as folder:
            tower = make_tower(kind, Path(folder), DEPTH[context.small])
        if tower is None:
            result.figure(kind, lacking="not in the installed transformers")
            continue
        side = tower.image_size
        if context.small and parameters(tower) > 50e6:
            result.figure(kind, left_out="too large for a CPU")
            continue
        images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
        result.below(kind, **compare(tower, images, context.device))
        if context.device == "cuda":
            here = images.to("cuda")
            waited = waits_of(lambda tower=tower, here=here: tower(here).square().mean().backward())
            result.test(f"{kind}, no wait for the device", not waited, waited or "forward and backward")
            tower.zero_grad(set_to_none=True)
            shape = {"pixels": side, "tokens": tower.num_patches}
            result.figure(f"{kind}, bf16, 32 images", **shape, **measure(tower, "cuda", 32))
        del tower
        free_memory(context.device)
