"""A training run with every type of encoder that `hf_vision` takes: what learns, at which rates, and what goes on."""

import pytest

from llava.config.resolve import resolve
from llava.errors import LlavaError
from llava.model.multimodal_encoder.hf_facts import FACTS
from llava.train.same_model import check_same_model
from tests.support import encoders
from tests.train.test_tower_part import rates_of

TOWER = "model.vision_tower.vision_tower."
RATE, DECAY = 2e-4, 0.5
STAGES = ("0.layers.0", "1.layers.0", "2.layers.0", "2.layers.1", "3.layers.0")  # the blocks of `encoders.STAGES`
BETWEEN = "encoder.stages.3.downsampling_layer."  # behind the block before the last
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


KINDS = [kind for kind in encoders.KINDS if kind not in encoders.MAPS or kind.startswith("convnext")]


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_blocks_learn_and_no_others(kit, tmp_path, spy, kind):
    keys = {**SETTINGS, "vision_tower": encoders.folder(tmp_path / "tower", kind)}
    out = kit.run(tmp_path / "out", "iiit", **keys)
    last, before = (STAGES if kind in encoders.MAPS else ("0", "1", "2"))[:-3:-1]
    rates = {f"{TOWER}{FACTS[kind].blocks}.{last}.": RATE / 2, f"{TOWER}{FACTS[kind].blocks}.{before}.": RATE / 4}
    if kind in encoders.MAPS:
        rates[TOWER + BETWEEN] = RATE / 4
    expected = {name: rate for name in spy.before for start, rate in rates.items() if name.startswith(start)}
    assert set(rates) == {start for name in expected for start in rates if name.startswith(start)}
    found = rates_of(spy.trainer.optimizer, spy.trainer.model)
    assert {name: rate for name, rate in found.items() if name.startswith(TOWER)} == pytest.approx(expected, rel=1e-12)
    named = dict(spy.trainer.model.named_parameters())
    trained = {name for name, value in named.items() if value.requires_grad}
    with_gradient = {name for name in named if named[name] in spy.trainer.optimizer.optimizer.state}
    assert trained == found.keys() == with_gradient  # or two ranks would wait for each other
    still = trained - spy.moved()
    assert all("k_proj.bias" in name for name in still) and len(still) <= 2  # softmax takes no notice of those
    check_same_model(str(out / "checkpoint-1"), resolve(kit.flags(out, "iiit", **keys)))


@pytest.mark.parametrize(
    ("kind", "key", "value"), [("dinov2", "image_size", 28), ("convnext", "vision_tower_stage", 3)]
)
def test_another_size_or_stage_does_not_go_on(kit, tmp_path, kind, key, value):
    keys = {**SETTINGS, "vision_tower": encoders.folder(tmp_path / "tower", kind)}
    out = kit.run(tmp_path / "out", "iiit", **keys)
    with pytest.raises(LlavaError, match=f"{key} is {value} .*trained with None"):
        check_same_model(str(out / "checkpoint-1"), resolve(kit.flags(out, "iiit", **keys, **{key: value})))
