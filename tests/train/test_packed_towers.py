"""Training with encoders that take any size: pictures of their own size, squares and crops."""

import json
from pathlib import Path

import pytest
from PIL import Image

from tests import tiny
from tests.model.packed_stock import stock
from tests.train.test_variants import ALL

CASES = {
    "siglip2_vision_model": {"mm_projector_type": "mlp2x_gelu", "mm_patch_merge_type": "flat"},
    "qwen2_5_vl_vision": {"mm_projector_type": "spatial_merge", "mm_patch_merge_type": "spatial_unpad"},
}


@pytest.mark.parametrize("kind", CASES)
def test_native(kit, tmp_path, spy, kind):
    """All parts learn, gradient checkpointing and packed samples change nothing, and the folder that results makes the
    same pixels."""
    from llava.mm_utils import process_images
    from llava.model.builder import load_pretrained_model

    unit = 28 if kind.startswith("qwen") else 14
    stock(kind).save_pretrained(tmp_path / "encoder")
    losses = []
    for saving in (False, True):
        out = kit.run(
            tmp_path / f"out_{saving}",
            "imti",
            vision_tower=tmp_path / "encoder",
            image_aspect_ratio="native",
            image_grid_pinpoints=None,
            min_pixels=2 * unit**2,
            max_pixels=6 * unit**2,
            max_steps=2,
            gradient_checkpointing=saving,
            pack_sequences=saving,
            **CASES[kind],
        )
        assert spy.moved_parts() == ALL
        losses.append([step["loss"] for step in tiny.history(out)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and losses[0][1] < losses[0][0]

    samples = [spy.trainer.train_dataset[i] for i in (0, 1, 3)]
    images = [image for sample in samples for image in sample["images"]]
    sizes = [size for sample in samples for size in sample["image_sizes"]]
    assert len(images) == 4 and len({image.shape for image in images}) > 1
    counter = spy.trainer.model.visual_token_counter()
    counts = [counter(tuple(image.shape), size) for image, size in zip(images, sizes, strict=True)]
    tokens = spy.trainer.model.eval()._visual_tokens(images, ["image"] * 4, sizes)
    assert [len(t) for t in tokens] == counts
    grids = [(image.shape[1] // unit, image.shape[2] // unit) for image in images]
    assert counts == [h * (w + (unit == 28)) for h, w in grids]  # a newline ends a row of spatial_unpad

    config = json.loads((out / "config.json").read_text())
    assert config["mm_vision_tower_type"] == "packed_vision" and config["mm_vision_config"]["model_type"] == kind
    _, model, processor, _ = load_pretrained_model(str(out), None, "x", device_map="cpu", torch_dtype="float32")
    picture = Image.open(Path(kit.records("imti")).parent / "images/0_0.png")
    assert process_images([picture], processor, model.config)[0].equal(images[0])


@pytest.mark.parametrize("aspect", ["pad", "anyres"])
def test_at_one_size(kit, tmp_path, spy, aspect):
    stock("pixtral").save_pretrained(tmp_path / "encoder")
    grid = {"image_grid_pinpoints": "(1x1),...,(2x2)" if aspect == "anyres" else None}
    kit.run(
        tmp_path / "out",
        "imti",
        vision_tower=tmp_path / "encoder",
        image_aspect_ratio=aspect,
        image_size=28,
        max_steps=2,
        **grid,
    )
    assert spy.moved_parts() == ALL
    shape = spy.trainer.train_dataset[0]["images"][0].shape
    assert shape[-2:] == (28, 28) and (aspect == "pad" or shape[0] > 1)
