"""Which parts are trained, at which learning rates."""

from types import SimpleNamespace

import pytest

from llava.constants import TUNABLE_PARTS
from llava.errors import LlavaError
from llava.families import get_family
from llava.families.training import tunable_parts

TOWER, COMPRESSOR, PROJECTOR, LLM = TUNABLE_PARTS
FLAGS = dict.fromkeys(
    (
        "tune_mm_mlp_adapter",
        "freeze_backbone",
        "unfreeze_mm_vision_tower",
        "unfreeze_language_model",
        "freeze_mm_token_compressor",
    ),
    False,
)


def chosen(mm_tunable_parts=None, freeze_mm_mlp_adapter=False, **flags):
    model_args = SimpleNamespace(mm_tunable_parts=mm_tunable_parts, **(FLAGS | flags))
    return tunable_parts(model_args, SimpleNamespace(freeze_mm_mlp_adapter=freeze_mm_mlp_adapter))


def test_parts_by_flag():
    assert chosen() == {PROJECTOR, LLM}
    assert chosen(tune_mm_mlp_adapter=True) == {PROJECTOR}
    assert chosen(freeze_backbone=True) == {PROJECTOR}
    assert chosen(unfreeze_mm_vision_tower=True) == {TOWER, PROJECTOR, LLM}
    assert chosen(unfreeze_mm_vision_tower=True, tune_mm_mlp_adapter=True) == {TOWER, PROJECTOR}
    assert chosen(freeze_mm_mlp_adapter=True) == {LLM}
    assert chosen(freeze_backbone=True, unfreeze_language_model=True) == {PROJECTOR, LLM}
    assert chosen(f"{TOWER}, {LLM}", tune_mm_mlp_adapter=True, freeze_mm_mlp_adapter=True) == {TOWER, LLM}
    for wrong in ("", "mm_tower", f"{TOWER};{LLM}"):
        with pytest.raises(LlavaError, match="mm_tunable_parts"):
            chosen(wrong)


def test_compressor_goes_with_the_projector():
    """In both stages, however the parts are named, unless it is to stay as it is."""
    compressed = {"use_token_compression": True}
    assert chosen(**compressed) == {COMPRESSOR, PROJECTOR, LLM}
    assert chosen(tune_mm_mlp_adapter=True, **compressed) == {COMPRESSOR, PROJECTOR}
    assert chosen(f"{TOWER},{PROJECTOR},{LLM}", **compressed) == set(TUNABLE_PARTS)
    assert chosen(PROJECTOR, mm_vision_tower_type="clip+toconv") == {COMPRESSOR, PROJECTOR}
    assert chosen(PROJECTOR, freeze_mm_token_compressor=True, **compressed) == {PROJECTOR}
    assert chosen(COMPRESSOR, **compressed) == {COMPRESSOR} and chosen(LLM, **compressed) == {LLM}


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (dict(mm_tunable_parts=TOWER), {TOWER}),
        (dict(mm_tunable_parts=LLM), {LLM}),
        (dict(mm_tunable_parts=f"{PROJECTOR},{LLM}"), {PROJECTOR, LLM}),
        (dict(mm_tunable_parts=None), {PROJECTOR, LLM}),
        (dict(mm_tunable_parts=None, tune_mm_mlp_adapter=True), {PROJECTOR}),
        (dict(mm_tunable_parts=None, freeze_backbone=True, unfreeze_mm_vision_tower=True), {TOWER, PROJECTOR}),
        (dict(mm_tunable_parts=None, freeze_mm_mlp_adapter=True), {LLM}),
    ],
)
def test_only_the_chosen_parts_move(kit, tmp_path, spy, flags, parts):
    if PROJECTOR not in parts:  # a new one would stay random
        flags = flags | {"pretrain_mm_mlp_adapter": kit.projector}
    kit.run(tmp_path / "out", max_steps=1, save_strategy="no", **flags)
    assert spy.moved_parts() == parts
    trained = {part for part in TUNABLE_PARTS if part in parts}
    part_of = get_family("llava").part_of
    asked = {part_of(name) for name, value in spy.trainer.model.named_parameters() if value.requires_grad}
    assert asked == trained


def test_learning_rate_of_each_part(kit, tmp_path, spy):
    part_of = get_family("llava").part_of
    rates = {"mm_vision_tower_lr": 2e-5, "mm_projector_lr": 3e-4, "mm_token_compressor_lr": 7e-4}
    grids = {"use_token_compression": True, "compression_input_size": 4, "compression_output_size": 2}
    kit.run(tmp_path / "out", vision_tower=kit.clip_fine, weight_decay=0.1, max_steps=1, **rates, **grids)
    parameters = dict(spy.trainer.model.named_parameters())
    name_of = {id(value): name for name, value in parameters.items()}
    rates, decays, seen = {part: set() for part in TUNABLE_PARTS}, {}, []
    for group in spy.trainer.optimizer.param_groups:
        for parameter in group["params"]:
            name = name_of[id(parameter)]
            seen.append(name)
            rates[part_of(name)].add(group["initial_lr"])
            decays[name] = group["weight_decay"]
    assert rates == {TOWER: {2e-5}, COMPRESSOR: {7e-4}, PROJECTOR: {3e-4}, LLM: {1e-3}}
    assert sorted(seen) == sorted(name for name, value in parameters.items() if value.requires_grad)
    assert decays["model.mm_projector.0.weight"] == 0.1 and decays["model.mm_projector.0.bias"] == 0
    assert decays["model.norm.weight"] == 0


@pytest.mark.parametrize("part", [TOWER, PROJECTOR])
def test_a_rate_of_zero_is_a_rate(kit, tmp_path, spy, part):
    rate = {TOWER: "mm_vision_tower_lr", PROJECTOR: "mm_projector_lr"}[part]
    kit.run(tmp_path / "out", max_steps=2, **{rate: 0.0})
    assert spy.moved_parts() == {TOWER, PROJECTOR, LLM} - {part}


def test_what_the_features_do_not_use_stays_frozen(kit, tmp_path, spy):
    kit.run(tmp_path / "out", max_steps=2, weight_decay=0.5)
    prefix = "model.vision_tower.vision_tower.vision_model."
    tower = {name for name in spy.before if name.startswith(prefix)}
    unused = {name for name in tower if ".layers.2." in name or ".post_layernorm." in name}
    assert len(unused) > 10 and len(tower - unused) > 20
    still = tower - spy.moved()
    assert still == unused
    assert all(spy.trainer.model.get_parameter(name).requires_grad is False for name in unused)


def test_nothing_to_train(kit, tmp_path, capsys):
    with pytest.raises(SystemExit):
        kit.run(tmp_path / "out", "tttt", vision_tower=None, mm_tunable_parts=PROJECTOR, image_aspect_ratio="square")
    assert "error: nothing to train" in capsys.readouterr().err
