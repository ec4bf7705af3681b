"""A training run with every type of encoder that `hf_vision` takes: what learns, at which rates, and what goes on."""

import pytest
import torch
from safetensors.torch import load_file

from llava.config.resolve import resolve
from llava.errors import LlavaError
from llava.model.builder import load_pretrained_model
from llava.model.multimodal_encoder.hf_facts import FACTS
from llava.train.same_model import check_same_model
from tests.model import small
from tests.support import encoders
from tests.train.test_tower_part import rates_of

TOWER = "model.vision_tower.vision_tower."
RATE, DECAY = 2e-4, 0.5
BLOCKS = "3.layers.0", "2.layers.1"
# of types of stages: the last block, the one before it, what lies between them, what lies behind
LAST = {
    **dict.fromkeys(("convnext", "convnextv2"), ("encoder.stages", *BLOCKS, ("3.downsampling_layer",), ())),
    "dinov3_convnext": ("model.stages", *BLOCKS, ("3.downsample_layers",), ()),
    **dict.fromkeys(("hiera", "resnet", "regnet"), ("encoder.stages", *BLOCKS, (), ())),
    **dict.fromkeys(("swin", "swinv2"), ("encoder.layers", "3.blocks.0", "2.blocks.0", ("2.downsample",), ())),
    "segformer": ("stages", "3.blocks.0", "2.blocks.1", ("2.layer_norm", "3.patch_embeddings"), ("3.layer_norm",)),
    "pvt_v2": ("encoder.layers", "3.blocks.0", "2.blocks.1", ("2.layer_norm", "3.patch_embedding"), ("3.layer_norm",)),
    "cvt": ("encoder.stages", "2.layers.2", "2.layers.1", (), ()),
}
ANOTHER = (
    ("dinov2", "image_size", 28),
    ("siglip2_vision_model", "image_size", 56),
    ("convnext", "vision_tower_stage", 3),
)
SETTINGS = dict(
    mm_vision_select_layer=-1,
    mm_vision_tower_trainable_blocks=2,
    mm_vision_tower_layer_decay=DECAY,
    mm_vision_tower_lr=RATE,
    image_aspect_ratio="pad",
    mm_patch_merge_type="flat",
    gradient_checkpointing=True,
    save_strategy="steps",
    save_steps=1,
    max_steps=1,
)


@pytest.mark.parametrize("kind", encoders.KINDS)
def test_the_last_blocks_learn_and_no_others(kit, tmp_path, spy, kind):
    keys = {**SETTINGS, "vision_tower": encoders.folder(tmp_path / "tower", kind)}
    keys |= {"image_size": 64} if kind in encoders.NO_SIZE else {}
    out = kit.run(tmp_path / "out", "iiit", **keys)
    within, last, before, between, behind = LAST.get(kind, (FACTS[kind].blocks, "2", "1", (), ()))
    rates = {last: RATE / 2, before: RATE / 4} | dict.fromkeys(between, RATE / 4) | dict.fromkeys(behind, RATE)
    rates = {f"{TOWER}{within}.{name}.": rate for name, rate in rates.items()}
    expected = {name: rate for name in spy.before for start, rate in rates.items() if name.startswith(start)}
    assert set(rates) == {start for name in expected for start in rates if name.startswith(start)}
    found = rates_of(spy.trainer.optimizer, spy.trainer.model)
    assert {name: rate for name, rate in found.items() if name.startswith(TOWER)} == pytest.approx(expected, rel=1e-12)
    named = dict(spy.trainer.model.named_parameters())
    trained = {name for name, value in named.items() if value.requires_grad}
    with_gradient = {name for name in named if named[name] in spy.trainer.optimizer.optimizer.state}
    assert trained == found.keys() == with_gradient  # or two ranks would wait for each other
    still = trained - spy.moved()
    assert len(still) <= 2 and all(name.endswith(("k_proj.bias", "key.bias")) for name in still), (
        still
    )  # softmax takes no notice of those
    check_same_model(str(out / "checkpoint-1"), resolve(kit.flags(out, "iiit", **keys)))


@pytest.mark.parametrize(("kind", "key", "value"), ANOTHER)
def test_another_size_or_stage_does_not_go_on(kit, tmp_path, kind, key, value):
    keys = {**SETTINGS, "vision_tower": encoders.folder(tmp_path / "tower", kind)}
    out = kit.run(tmp_path / "out", "iiit", **keys)
    with pytest.raises(LlavaError, match=f"{key} is {value} .*trained with None"):
        check_same_model(str(out / "checkpoint-1"), resolve(kit.flags(out, "iiit", **keys, **{key: value})))


@pytest.mark.parametrize(("kind", "key", "value"), ANOTHER)
def test_the_next_stage_trains_the_same_encoder_at_another_size(kit, tmp_path, spy, kind, key, value):
    """Its weights are the checkpoint's, its features the stock model's at that size."""
    keys = {**SETTINGS, "vision_tower": encoders.folder(tmp_path / "tower", kind)}
    first = kit.run(tmp_path / "first", "iiit", **keys)
    trained = {name: v for name, v in load_file(first / "model.safetensors").items() if name.startswith(TOWER)}
    pristine = encoders.classes(kind)[1].from_pretrained(tmp_path / "tower").state_dict()
    assert any(not v.equal(pristine[name.removeprefix(TOWER)]) for name, v in trained.items())
    kept = {**keys, "model_name_or_path": str(first), key: value, "learning_rate": 0.0, "mm_vision_tower_lr": 0.0}
    again = kit.run(tmp_path / "again", "iiit", **kept)
    found = load_file(again / "model.safetensors")
    assert all(v.equal(found[name]) for name, v in trained.items())
    tower = load_pretrained_model(str(again), None, "llava_qwen", device_map="cpu")[1].get_vision_tower().float()
    expected = encoders.build(tmp_path / "tower", kind, mm_vision_select_layer=-1, **{key: value})
    expected.vision_tower.load_state_dict({name.removeprefix(TOWER): v for name, v in trained.items()}, strict=False)
    images = small.pixels(1, 3, expected.image_size, expected.image_size)
    assert tower.image_size == expected.image_size and tower.num_patches == expected.num_patches
    assert torch.allclose(tower(images), expected(images), atol=1e-5)
