"""What one image costs in a vision tower, counted without any weights."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from llava.errors import LlavaError


def image_flops(tower) -> int:
    """Floating-point operations of one image through a tower on the meta device, as PyTorch counts its kernels.

    Raises:
        LlavaError: a tower that does not run without values.
    """
    tower.reset_buffers()
    chooser, tower.patch_chooser = tower.patch_chooser, None  # all patches: there are no pixels to choose by
    pixels = torch.zeros(1, 3, tower.image_size, tower.image_size, device="meta", dtype=tower.dtype)
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            tower.eval()(pixels)
    except (RuntimeError, NotImplementedError) as error:
        raise LlavaError(
            f"{tower.vision_tower_name}: its operations cannot be counted ({str(error).splitlines()[0]})"
        ) from None
    finally:
        tower.patch_chooser = chooser
    return counter.get_total_flops()
