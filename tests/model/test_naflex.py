"""NaFlex sizes, and the pixels of encoders that take any size, against the Pillow processors of transformers."""

import numpy as np
import pytest
import torch
from PIL import Image

from llava.errors import LlavaError
from llava.images.geometry import NaflexResolution
from llava.images.processing import process_native_image

BUDGET = 256 * 16 * 16


def picture(width, height):
    pixels = np.random.default_rng(width * height).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def pillow(mean, std, resample):
    from transformers import CLIPImageProcessorPil

    return CLIPImageProcessorPil(do_center_crop=False, image_mean=list(mean), image_std=list(std), resample=resample)


def test_sizes_are_the_published_ones():
    """At equal bounds, for sizes drawn and odd ones; the processor's own function is the reference."""
    from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 3000, (300, 2), generator=generator).tolist()
    for budget, unit in ((256, 16), (784, 14), (64, 32), (1, 16)):
        rule = NaflexResolution(unit, budget * unit**2, budget * unit**2)
        for width, height in [*sizes, (256, 256), (1, 1), (5000, 1), (1, 5000), (3000, 2999), (16, 16)]:
            expected = get_image_size_for_max_num_patches(height, width, unit, budget)[::-1]
            assert rule(width, height) == expected


def test_bounds_apart():
    """Between them a picture keeps its size; beyond one it has as many patches as that one holds."""
    rule = NaflexResolution(16, 64 * 256, BUDGET)
    assert rule(200, 150) == (208, 160)  # 130 patches
    assert rule(160, 160) == (160, 160)
    assert rule(1000, 800) == NaflexResolution(16, BUDGET, BUDGET)(1000, 800) != (1008, 800)
    assert rule(30, 20) == NaflexResolution(16, 64 * 256, 64 * 256)(30, 20) != (32, 32)
    for width, height in [(3, 400), (400, 3), (77, 61), (2000, 10)]:
        w, h = rule(width, height)
        assert w % 16 == h % 16 == 0 and 0 < w * h <= BUDGET


def test_a_budget_below_one_patch_is_refused():
    with pytest.raises(LlavaError, match=r"max_pixels: found 255, 255, expected .* at least 256"):
        NaflexResolution(16, 255, 255)
    assert NaflexResolution(16, 256, 256)(640, 480) == (16, 16)


@pytest.mark.parametrize("size", [(640, 480), (90, 300), (17, 16)])
def test_pixels_of_naflex(size):
    """Resized and normalised by the project's processor and cut into patches: the published rows, to the bit."""
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

    stock = Siglip2ImageProcessorPil()
    given = stock(picture(*size), return_tensors="pt")
    processor = pillow(stock.image_mean, stock.image_std, stock.resample)
    found = process_native_image(picture(*size), processor, NaflexResolution(16, BUDGET, BUDGET)(*size))
    h, w = (side // 16 for side in found.shape[1:])
    assert given["spatial_shapes"].tolist() == [[h, w]] and 200 < h * w <= 256
    rows = [found[:, 16 * y : 16 * y + 16, 16 * x : 16 * x + 16] for y in range(h) for x in range(w)]
    expected = given["pixel_values"][0, : h * w]
    assert torch.stack([row.permute(1, 2, 0).flatten() for row in rows]).equal(expected)


def test_pixels_of_the_qwen_vl_encoders():
    """At the stock processor's own size: its patches, in its order."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    stock = Qwen2VLImageProcessorPil()
    given = stock(picture(200, 120), return_tensors="pt")
    _, h, w = given["image_grid_thw"][0].tolist()
    processor = pillow(stock.image_mean, stock.image_std, stock.resample)
    found = process_native_image(picture(200, 120), processor, (14 * w, 14 * h))
    blocks = found.view(3, h // 2, 2, 14, w // 2, 2, 14).permute(1, 4, 2, 5, 0, 3, 6)  # [h/2, w/2, 2, 2, 3, 14, 14]
    rows = blocks.flatten(0, 3)[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1)  # twice in time
    assert torch.allclose(rows, given["pixel_values"], atol=1e-6)


def test_pixels_of_pixtral():
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

    stock = PixtralImageProcessorPil()
    given = stock(picture(200, 120), return_tensors="pt")["pixel_values"][0]
    assert given.shape == (3, 128, 208)
    processor = pillow(stock.image_mean, stock.image_std, stock.resample)
    assert torch.allclose(process_native_image(picture(200, 120), processor, (208, 128)), given, atol=1e-6)
