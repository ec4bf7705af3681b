"""Pictures with published entropy maps and masks."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

GOLDEN = Path(__file__).parents[2] / "golden" / "adaptive_patches"
NUMBERS = (0, 1, 2)
SIZES = (14, 28, 56)


def published() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "io.safetensors")


def picture(number: int) -> torch.Tensor:
    """uint8 [1, 3, H, W]."""
    pixels = np.array(Image.open(GOLDEN / f"image_{number}.png"))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()


def noise(*shape, seed=0) -> torch.Tensor:
    """uint8, blank in the upper left quarter, so that patches differ."""
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    pixels[..., : shape[-2] // 2, : shape[-1] // 2] = 77
    return pixels
