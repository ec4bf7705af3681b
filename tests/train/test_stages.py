"""Stage 1 (the projector alone), what it leaves, how stage 2 takes it up, and where a tower's weights come from."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.errors import LlavaError
from tests import tiny

STAGE1 = dict(mm_tunable_parts="mm_mlp_adapter", version="plain", save_strategy="no")
PROJECTOR = {f"model.mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}


@pytest.fixture(scope="module")
def stage1(kit, tmp_path_factory):
    return kit.run(tmp_path_factory.mktemp("stage1") / "out", "iiiiii", **STAGE1)


def test_stage1_trains_the_projector_alone(kit, tmp_path, spy):
    kit.run(tmp_path / "out", "iiiiii", **STAGE1)
    assert spy.moved() == PROJECTOR


@pytest.mark.parametrize(("merge", "newline"), [("spatial_unpad", True), ("spatial", False)])
def test_stage1_file(kit, tmp_path, stage1, spy, merge, newline):
    out = stage1
    if not newline:
        out = kit.run(tmp_path / "out", "iiiiii", **STAGE1, mm_patch_merge_type=merge)
    saved = load_file(out / "mm_projector.safetensors")
    assert saved.keys() == PROJECTOR | ({"model.image_newline"} if newline else set())
    assert not list(out.glob("model*.safetensors"))
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json", "trainer_state.json"):
        assert (out / name).is_file()


def test_stage1_loads_for_inference(kit, stage1):
    from llava.model.builder import load_pretrained_model

    loaded = load_pretrained_model(str(stage1), kit.llm, "llava_qwen", device_map="cpu", torch_dtype="float32")
    tokenizer, model, image_processor, _ = loaded
    weights = model.state_dict()
    for name, value in load_file(stage1 / "mm_projector.safetensors").items():
        assert value.equal(weights[name]), name
    llm, tower = load_file(f"{kit.llm}/model.safetensors"), load_file(f"{kit.clip}/model.safetensors")
    assert llm["model.norm.weight"].equal(weights["model.norm.weight"])
    name = "encoder.layers.0.mlp.fc1.weight"
    assert tower[f"vision_model.{name}" if f"vision_model.{name}" in tower else name].equal(
        weights[f"model.vision_tower.vision_tower.vision_model.{name}"]
    )
    assert model.config.conversation_template == "plain"
    assert type(model).__name__ == "LlavaQwenForCausalLM"
    assert image_processor is not None and len(tokenizer) == 703


class Stopped(Exception):
    """Stands for a run that is killed."""


@pytest.mark.parametrize(
    ("parts", "grouped"), [("mm_mlp_adapter", False), ("mm_vision_tower,mm_mlp_adapter,mm_language_model", True)]
)
def test_resume_gives_the_uninterrupted_run(kit, tmp_path, monkeypatch, capsys, parts, grouped):
    """Two epochs of two steps, in shuffled order, stopped inside the second."""
    from llava.train.llava_trainer import LLaVATrainer

    changes = dict(
        mm_tunable_parts=parts,
        mm_projector_lr=3e-3,
        max_steps=4,
        save_strategy="steps",
        save_steps=1,
        group_by_modality_length=grouped,
        train_sampling_strategy=None,
    )
    whole = kit.run(tmp_path / "whole", "iiiitiii", **changes)

    step = LLaVATrainer.training_step

    def step_until_three(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise Stopped
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(LLaVATrainer, "training_step", step_until_three)
        kit.run(tmp_path / "cut", "iiiitiii", **changes)
    assert not (tmp_path / "cut/trainer_state.json").exists()
    if parts == "mm_mlp_adapter":
        assert (tmp_path / "cut/checkpoint-3/mm_projector.safetensors").is_file()
    capsys.readouterr()
    cut = kit.run(tmp_path / "cut", "iiiitiii", **changes)
    assert f"resuming from {tmp_path}/cut/checkpoint-3" in capsys.readouterr().out

    ours, expected = tiny.history(cut), tiny.history(whole)
    assert [entry["step"] for entry in ours] == [1, 2, 3, 4]
    for got, want in zip(ours, expected, strict=True):
        assert got["loss"] == pytest.approx(want["loss"], abs=1e-6)
        assert got["learning_rate"] == want["learning_rate"]
    name = "mm_projector.safetensors" if parts == "mm_mlp_adapter" else "model.safetensors"
    first, second = load_file(whole / name), load_file(cut / name)
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[key], second[key], atol=1e-6) for key in first)


@pytest.mark.parametrize("form", ["file", "folder", "bin"])
def test_stage2_starts_from_the_projector(kit, tmp_path, spy, stage1, form):
    weights = load_file(stage1 / "mm_projector.safetensors")
    source = {"file": stage1 / "mm_projector.safetensors", "folder": stage1, "bin": tmp_path / "mm_projector.bin"}[form]
    if form == "bin":
        torch.save(weights, source)
    kit.run(tmp_path / "out", pretrain_mm_mlp_adapter=source, max_steps=1)
    assert weights
    for name, value in weights.items():
        assert value.equal(spy.before[name]), name
    assert spy.moved_parts() == {"mm_vision_tower", "mm_mlp_adapter", "mm_language_model"}


def test_projector_that_does_not_fit(kit, tmp_path, stage1, capsys):
    weights = load_file(stage1 / "mm_projector.safetensors")
    weights["model.mm_projector.0.weight"] = torch.zeros(32, 48)
    save_file(weights, tmp_path / "wide.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((stage1 / "mm_projector.safetensors").read_bytes()[:999])
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickle.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    for path, expected in [
        (tmp_path / "wide.safetensors", "0.weight is (32, 48), expected (32, 32)"),
        (tmp_path / "cut.safetensors", "not a whole safetensors file"),
        (tmp_path / "empty", "no such file"),
        (tmp_path / "pickle.bin", "not a file of plain tensors"),
    ]:
        with pytest.raises(SystemExit):
            kit.run(tmp_path / "out", pretrain_mm_mlp_adapter=path)
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and str(path) in error and expected in error
    with pytest.raises(SystemExit):  # another kind of projector
        kit.run(tmp_path / "out", pretrain_mm_mlp_adapter=stage1, mm_projector_type="linear")
    assert "mm_projector_type linear" in capsys.readouterr().err


@pytest.fixture(scope="module")
def full(kit, tmp_path_factory):
    """A run that trained all parts: its tower is no longer the folder's."""
    return kit.run(tmp_path_factory.mktemp("full") / "out")


def tower_weights(state) -> dict[str, torch.Tensor]:
    prefix = "model.vision_tower.vision_tower.vision_model."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def folder_weights(folder: str) -> dict[str, torch.Tensor]:
    state = load_file(f"{folder}/model.safetensors")
    return {name.removeprefix("vision_model."): value for name, value in state.items()}


@pytest.mark.parametrize("named", [True, False])
def test_a_full_checkpoint_keeps_its_trained_tower(kit, tmp_path, spy, full, named, capsys):
    trained = tower_weights(load_file(full / "model.safetensors"))
    from_folder = folder_weights(kit.clip)
    assert any(not value.equal(from_folder[name]) for name, value in trained.items())
    kit.run(tmp_path / "out", model_name_or_path=full, vision_tower=kit.clip if named else None, max_steps=1)
    begun_with = tower_weights(spy.before)
    assert begun_with.keys() == trained.keys() and len(trained) > 20
    assert all(value.equal(begun_with[name]) for name, value in trained.items())
    assert "is replaced by" not in capsys.readouterr().out
    for name in ("model.mm_projector.0.weight", "model.image_newline", "lm_head.weight"):
        assert load_file(full / "model.safetensors")[name].equal(spy.before[name])


def test_another_tower_brings_its_own_weights(kit, tmp_path, spy, full, capsys):
    out = kit.run(tmp_path / "out", model_name_or_path=full, vision_tower=kit.clip_other, max_steps=1)
    other = folder_weights(kit.clip_other)
    begun_with = tower_weights(spy.before)
    assert len(begun_with) > 20
    assert all(other[name].equal(value) for name, value in begun_with.items())
    assert f"vision tower: {kit.clip} is replaced by {kit.clip_other}" in capsys.readouterr().out
    assert load_file(full / "model.safetensors")["lm_head.weight"].equal(spy.before["lm_head.weight"])
    assert spy.trainer.model.config.mm_vision_tower == kit.clip_other
    assert (out / "model.safetensors").is_file()


def test_a_tower_of_another_kind(kit, tmp_path, spy, full):
    kit.run(tmp_path / "out", model_name_or_path=full, vision_tower=kit.siglip, max_steps=1)
    other, begun_with = folder_weights(kit.siglip), tower_weights(spy.before)
    assert begun_with and all(other[name].equal(value) for name, value in begun_with.items())
    assert spy.trainer.model.config.mm_vision_config["model_type"] == "siglip_vision_model"


GRIDS = {"use_token_compression": True, "compression_input_size": 4, "compression_output_size": 2}


def test_compressor_in_both_stages(kit, tmp_path, spy, capsys):
    """Stage 1 trains and keeps it beside the projector, stage 2 goes on from there, and a base model takes both."""
    from llava.model.builder import load_pretrained_model

    grids = GRIDS | {"vision_tower": kit.clip_fine}
    first = kit.run(tmp_path / "first", tune_mm_mlp_adapter=True, mm_tunable_parts=None, max_steps=2, **grids)
    assert spy.moved_parts() == {"mm_mlp_adapter", "mm_token_compressor"}
    adapter = load_file(first / "mm_projector.safetensors")
    names = {name for name in adapter if ".token_compressor." in name}
    assert len(names) == 4 and all(name.startswith("model.vision_tower.token_compressor.") for name in names)
    assert not (first / "model.safetensors").exists()
    model = load_pretrained_model(str(first), kit.llm, "llava_qwen", device_map="cpu", torch_dtype="float32")[1]
    assert all(model.state_dict()[name].equal(adapter[name]) for name in adapter)
    assert "untrained" not in capsys.readouterr().out

    second = kit.run(
        tmp_path / "second", pretrain_mm_mlp_adapter=first / "mm_projector.safetensors", max_steps=2, **grids
    )
    assert all(spy.before[name].equal(adapter[name]) for name in names)
    assert {"mm_mlp_adapter", "mm_token_compressor", "mm_vision_tower"} <= spy.moved_parts()
    weights = load_file(second / "model.safetensors")
    assert all(not weights[name].equal(adapter[name]) for name in names)

    # without its compressor such a file is no start for a model that is to have one
    save_file({k: v for k, v in adapter.items() if k not in names}, first / "mm_projector.safetensors")
    with pytest.raises(LlavaError, match="no token_compressor in it"):
        load_pretrained_model(str(first), kit.llm, "llava_qwen", device_map="cpu", torch_dtype="float32")


def test_compressor_that_was_trained_on_images(kit, tmp_path, spy, capsys):
    from llava.model.multimodal_encoder.token_compressor import TokenCompressor

    grids = GRIDS | {"vision_tower": kit.clip_fine}
    donor = TokenCompressor(4, 2, 32)
    save_file(donor.state_dict(), tmp_path / "token_compressor.safetensors")
    out = kit.run(
        tmp_path / "out", max_steps=1, pretrain_token_compressor=tmp_path / "token_compressor.safetensors", **grids
    )
    prefix = "model.vision_tower.token_compressor."
    assert all(spy.before[prefix + name].equal(value) for name, value in donor.state_dict().items())
    config = json.loads((out / "config.json").read_text())
    assert config["pretrain_token_compressor"].endswith("token_compressor.safetensors")
    with pytest.raises(SystemExit):
        kit.run(tmp_path / "again", pretrain_token_compressor=tmp_path / "absent.safetensors", **grids)
    assert "absent.safetensors" in capsys.readouterr().err


def without(folder, into, part: str):
    """A copy of a checkpoint without the weights whose names have this part."""
    shutil.copytree(folder, into)
    state = load_file(into / "model.safetensors")
    kept = {name: value for name, value in state.items() if part not in name}
    assert len(kept) < len(state)
    save_file(kept, into / "model.safetensors", {"format": "pt"})
    return into


def test_a_checkpoint_that_lacks_weights(kit, tmp_path, full, capsys):
    lacking = without(full, tmp_path / "lacking", "layers.1.mlp.up_proj")
    with pytest.raises(SystemExit):
        kit.run(tmp_path / "out", model_name_or_path=lacking)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: {lacking}: the checkpoint lacks 1 weights of ") and "up_proj" in error
    bare = without(full, tmp_path / "bare", "mm_projector")
    with pytest.raises(SystemExit):
        kit.run(tmp_path / "out", model_name_or_path=bare, mm_tunable_parts="mm_language_model")
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{bare}: holds no model.mm_projector.0.bias" in error and "mm_mlp_adapter is not trained" in error
    kit.run(tmp_path / "new", model_name_or_path=bare, max_steps=1)
    assert "new and random to begin with" in capsys.readouterr().out
    given = {"pretrain_mm_mlp_adapter": kit.projector, "mm_tunable_parts": "mm_language_model"}
    kit.run(tmp_path / "given", model_name_or_path=bare, max_steps=1, **given)
    assert "new and random" not in capsys.readouterr().out


def test_a_checkpoint_in_transformers_format(kit, tmp_path, capsys):
    from transformers import LlavaNextConfig

    config = LlavaNextConfig(architectures=["LlavaNextForConditionalGeneration"])
    config.save_pretrained(tmp_path / "hf")
    for more in ({}, {"model_class_name": "LlavaQwen"}):
        with pytest.raises(SystemExit):
            kit.run(tmp_path / "out", model_name_or_path=tmp_path / "hf", **more)
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"python -m llava.tools.import_hf --model-path {tmp_path / 'hf'}" in error
