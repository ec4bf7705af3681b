"""The last blocks of a vision tower learn, and each block at a rate of its own."""

import json

import pytest
import torch
from safetensors.torch import load_file

from llava.errors import LlavaError
from tests import tiny

TOWER = "model.vision_tower.vision_tower."
LAYERS = 5  # of which layer -2 leaves four to the features
DECAY, RATE = 0.5, 2e-4
STEPS = dict(save_strategy="steps", save_steps=1, lr_scheduler_type="constant")


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deep")
    kinds = ("clip", "siglip", "hevc_vit", "hevc_vit_packing")
    return {kind: tiny.tower(folder / kind, kind, layers=LAYERS) for kind in kinds}


def layer(name: str) -> int | None:
    """Number of the block that a parameter of a tower is in."""
    return int(name.split("layers.")[1].split(".")[0]) if "layers." in name else None


def moved_blocks(names) -> set[int | None]:
    return {layer(name) for name in names if name.startswith(TOWER)}


@pytest.mark.parametrize("kind", ["clip", "siglip", "hevc_vit", "hevc_vit_packing"])
def test_the_last_blocks_move(kit, deep, tmp_path, spy, capsys, kind):
    flags = {"gradient_checkpointing": kind == "clip", "weight_decay": 0.5}
    out = kit.run(tmp_path / "out", max_steps=2, vision_tower=deep[kind], mm_vision_tower_trainable_blocks=2, **flags)
    assert "vision tower: the last 2 of 4 blocks learn, the rest is frozen" in capsys.readouterr().out
    assert moved_blocks(spy.moved()) == {2, 3}
    asked = {name for name, value in spy.trainer.model.named_parameters() if value.requires_grad}
    assert {name for name in asked if name.startswith(TOWER)} == {
        name for name in spy.before if name.startswith(TOWER) and layer(name) in (2, 3)
    }
    assert spy.moved_parts() == {"mm_vision_tower", "mm_mlp_adapter", "mm_language_model"}
    saved = load_file(out / "model.safetensors")
    parameters = dict(spy.trainer.model.named_parameters())
    assert saved.keys() >= parameters.keys()  # frozen blocks too
    assert all(saved[name].equal(value.detach()) for name, value in parameters.items())


def rates_of(optimizer, model) -> dict[str, float]:
    name_of = {id(value): name for name, value in model.named_parameters()}
    return {name_of[id(p)]: group["initial_lr"] for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("given", [True, False])
def test_rate_of_each_block(kit, deep, tmp_path, spy, capsys, given):
    rate = {"mm_vision_tower_lr": RATE} if given else {}
    flags = {"mm_vision_tower_layer_decay": DECAY, "mm_projector_lr": 3e-4, "weight_decay": 0.1, **rate}
    kit.run(tmp_path / "out", max_steps=1, vision_tower=deep["clip"], **flags)
    base, found = RATE if given else 1e-3, rates_of(spy.trainer.optimizer, spy.trainer.model)
    seen = set()
    for name, value in found.items():
        if name.startswith(TOWER):  # four blocks: 0.5^1 for the last, 0.5^4 for the first, 0.5^5 for what is before
            power = 5 if layer(name) is None else 4 - layer(name)
            seen.add(power)
            assert value == pytest.approx(base / 2**power, rel=1e-12), name
        else:
            assert value == (3e-4 if "mm_projector" in name else 1e-3), name
    assert seen == {1, 2, 3, 4, 5}
    levels = ("before the blocks", *range(4))  # nothing behind them learns here
    told = ", ".join(f"{level} {base / 2 ** (5 - number):.2e}" for number, level in enumerate(levels))
    assert f"vision tower, learning rates of 4 blocks (layer decay 0.5): {told}\n" in capsys.readouterr().out
    assert found.keys() == {name for name, value in spy.trainer.model.named_parameters() if value.requires_grad}
    decays = {group["weight_decay"] for group in spy.trainer.optimizer.param_groups if group["initial_lr"] == base / 2}
    assert decays == {0.1, 0.0}  # biases and norms have none, in their block's groups too


def test_resume_keeps_the_groups(kit, deep, tmp_path, spy):
    changes = dict(
        vision_tower=deep["clip"],
        mm_vision_tower_trainable_blocks=3,
        mm_vision_tower_layer_decay=DECAY,
        mm_vision_tower_lr=RATE,
        **STEPS,
    )
    whole = kit.run(tmp_path / "whole", max_steps=2, **changes)
    groups = [(group["lr"], len(group["params"])) for group in spy.trainer.optimizer.param_groups]
    kit.run(tmp_path / "cut", max_steps=1, **changes)
    cut = kit.run(tmp_path / "cut", max_steps=2, **changes)
    assert [(group["lr"], len(group["params"])) for group in spy.trainer.optimizer.param_groups] == groups
    assert {rate for rate, _ in groups} == {1e-3, RATE / 2, RATE / 4, RATE / 8}
    first, second = load_file(whole / "model.safetensors"), load_file(cut / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


def test_another_part_does_not_go_on(kit, deep, tmp_path, capsys):
    changes = dict(vision_tower=deep["clip"], mm_vision_tower_layer_decay=DECAY, **STEPS)
    out = kit.run(tmp_path / "out", "iiii", max_steps=1, **changes)
    for key, value, told in (
        ("mm_vision_tower_layer_decay", 0.75, "is 0.75 (command line), it was trained with 0.5"),
        ("mm_vision_tower_trainable_blocks", 2, "is 2 (command line), it was trained with None"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            kit.run(out, "iiii", max_steps=2, **(changes | {key: value}))
        assert f"{key} {told}" in capsys.readouterr().err
    run = out / "checkpoint-1/run_config.json"  # as from before there were these keys
    content = json.loads(run.read_text())
    del content["keys"]["mm_vision_tower_layer_decay"], content["keys"]["mm_vision_tower_trainable_blocks"]
    from llava.config.resolve import resolve
    from llava.train.same_model import check_same_model

    (out / "checkpoint-1/manifest.json").unlink()
    run.write_text(json.dumps(content))
    check_same_model(str(out / "checkpoint-1"), resolve(kit.flags(out, "iiii", vision_tower=deep["clip"])))
    with pytest.raises(LlavaError, match=r"mm_vision_tower_layer_decay is 0\.5"):
        check_same_model(str(out / "checkpoint-1"), resolve(kit.flags(out, "iiii", **changes)))


BLOCKS = "mm_vision_tower_trainable_blocks"
FROZEN = {"mm_tunable_parts": "mm_mlp_adapter,mm_language_model"}
TEXT = {"vision_tower": None, "image_aspect_ratio": "square"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({BLOCKS: 5}, f"command line: {BLOCKS} is 5, expected at most 4, the blocks of the vision tower"),
        ({BLOCKS: 2, **FROZEN}, f"{BLOCKS} is 2, but the vision tower is frozen (trained: mm_mlp_adapter, mm_language"),
        ({"mm_vision_tower_layer_decay": 0.5, **FROZEN}, "mm_vision_tower_layer_decay is 0.5, but the vision tower is"),
        ({"mm_vision_tower_layer_decay": 0}, "number above 0 and at most 1"),
        ({"mm_vision_tower_layer_decay": 1.01}, "number above 0 and at most 1"),
        ({BLOCKS: 0}, "positive whole number"),
        ({BLOCKS: 1, **TEXT}, f"{BLOCKS} is 1, but the vision tower has no blocks"),
    ],
)
def test_refused_before_weights_load(kit, deep, tmp_path, capsys, monkeypatch, changes, told):
    from llava.families.llava import Llava

    monkeypatch.setattr(Llava, "prepare", lambda *args: pytest.fail("weights are loaded"))
    with pytest.raises(SystemExit):
        kit.run(tmp_path / "out", "tttt", **({"vision_tower": deep["clip"]} | changes))
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and told in errors[0]


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_qwen_vl(tmp_path, spy, capsys, kind):
    from tests.train.test_qwen2_vl_training import Kit

    chosen = {} if kind != "qwen3_vl" else {"patch_selection_method": None, "patch_alpha": None}
    own = Kit(tmp_path, kind)
    depth = json.loads((tmp_path / kind / "config.json").read_text())["vision_config"]["depth"]
    flags = {"mm_vision_tower_layer_decay": DECAY, "mm_vision_tower_lr": RATE, **chosen}
    own.run(tmp_path / "out", max_steps=1, mm_vision_tower_trainable_blocks=1, **flags)
    name = "model.visual.blocks."
    moved = {n for n in spy.moved() if n.startswith("model.visual.") and "merger" not in n}
    assert moved and all(n.startswith(f"{name}{depth - 1}.") for n in moved)
    assert {n for n in spy.moved() if "merger" in n}  # the merger is another part, and learns
    rates = rates_of(spy.trainer.optimizer, spy.trainer.model)
    assert {rates[n] for n in moved} == {RATE * DECAY}
    assert {rate for n, rate in rates.items() if "merger" in n} == {1e-3}
    capsys.readouterr()
    with pytest.raises(SystemExit):
        own.run(tmp_path / "more", mm_vision_tower_trainable_blocks=depth + 1, **chosen)
    assert f"expected at most {depth}, the blocks" in capsys.readouterr().err
