"""What a finished run leaves: a folder that is whole by itself, and is not trained over by accident."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests import tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def own_parts(tmp_path_factory):
    """A run from parts of its own (a test deletes them), and its folder."""
    from llava.train.train import train

    folder = tmp_path_factory.mktemp("own")
    train(tiny.train_flags(folder, mm_use_im_patch_token=True))
    return folder


def answer(folder) -> list[int]:
    """Token ids that the model in `folder` answers with."""
    from llava.mm_utils import process_images
    from llava.model.builder import load_pretrained_model

    loaded = load_pretrained_model(str(folder), None, "llava_qwen", device_map="cpu", torch_dtype="float32")
    _, model, image_processor, _ = loaded
    image = Image.new("RGB", (50, 33), (200, 30, 90))
    pixels = process_images([image], image_processor, model.config)
    ids = torch.tensor([[5, 9, -200, 11, 12]])
    new = model.generate(
        ids, images=list(pixels), image_sizes=[image.size], modalities=["image"], max_new_tokens=8, do_sample=False
    )
    return new[0].tolist()


def test_names_and_config(own_parts):
    out = own_parts / "out"
    names = load_file(out / "model.safetensors").keys()
    assert "model.image_newline" in names and "model.mm_projector.2.bias" in names and "lm_head.weight" in names
    tower = {name for name in names if "vision_tower" in name}
    assert all(name.startswith("model.vision_tower.vision_tower.vision_model.") for name in tower)
    prefix = "model.vision_tower.vision_tower.vision_model."
    assert f"{prefix}embeddings.class_embedding" in tower and f"{prefix}pre_layrnorm.weight" in tower
    assert f"{prefix}encoder.layers.2.self_attn.q_proj.weight" in tower and f"{prefix}post_layernorm.bias" in tower

    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlavaQwenForCausalLM"] and config["model_type"] == "llava_qwen"
    expected = {
        "conversation_template": "qwen_1_5",
        "mm_vision_tower": str(own_parts / "clip"),
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "spatial_unpad",
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": [[28, 28], [28, 56], [56, 28], [56, 56]],
        "mm_hidden_size": 32,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": True,
        "tokenizer_model_max_length": 512,
        "tokenizer_padding_side": "right",
        "use_mm_proj": True,
        "use_cache": True,
        "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
    }
    assert {key: config.get(key) for key in expected} == expected
    assert config["mm_vision_config"]["model_type"] == "clip_vision_model"
    assert json.loads((out / "preprocessor_config.json").read_text())["crop_size"] == {"height": 28, "width": 28}
    assert (out / "tokenizer.json").is_file() and (out / "generation_config.json").is_file()


def test_moved_to_an_empty_machine_it_answers_alike(own_parts, tmp_path):
    expected = answer(own_parts / "out")
    assert len(expected) == 8
    shutil.move(own_parts / "out", tmp_path / "moved")
    for name in ("llm", "clip", "images"):
        shutil.rmtree(own_parts / name)
    try:
        code = f"from tests.train.test_checkpoints import answer; print(answer({str(tmp_path / 'moved')!r}))"
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads(done.stdout.strip().splitlines()[-1]) == expected
    finally:
        shutil.move(tmp_path / "moved", own_parts / "out")


def test_a_finished_run_is_not_repeated(kit, tmp_path, capsys):
    out = kit.run(tmp_path / "out", max_steps=1)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    capsys.readouterr()
    kit.run(out, max_steps=1)
    assert f"{out}: already trained (1 steps); --overwrite_output_dir trains again" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_overwrite_trains_anew_and_keeps_what_is_not_the_runs(kit, tmp_path, capsys):
    out = kit.run(tmp_path / "out", max_steps=2, save_strategy="steps", save_steps=1)
    first = tiny.history(out)
    foreign = [out / "notes.txt", out / "checkpoint-final" / "mine.bin", out / "eval" / "eval.json"]
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    (out / "checkpoint-9").mkdir()  # of a longer run, cut off while it was written: not one to resume from
    capsys.readouterr()
    kit.run(out, max_steps=1, learning_rate=2e-3, overwrite_output_dir=True)
    assert "resuming" not in capsys.readouterr().out
    second = tiny.history(out)
    assert len(second) == 1 and second[0]["loss"] == first[0]["loss"]
    assert all(path.read_text() == "mine" for path in foreign)
    assert not (out / "checkpoint-2").exists()


def test_an_overwriting_run_that_is_stopped_is_not_taken_for_a_finished_one(kit, tmp_path, monkeypatch):
    from llava.train.llava_trainer import LLaVATrainer
    from llava.train.train import finished_steps

    out = kit.run(tmp_path / "out", max_steps=1)
    assert finished_steps(out) == 1

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(LLaVATrainer, "training_step", stop)
    with pytest.raises(SystemExit, match=r"^130$"):
        kit.run(out, max_steps=1, overwrite_output_dir=True)
    assert finished_steps(out) is None


def test_a_checkpoint_cut_off_while_it_was_written(kit, tmp_path, monkeypatch, capsys):
    """The folder is there, its state is not: the run goes on from the one before."""
    from llava.train.llava_trainer import LLaVATrainer

    flags = dict(max_steps=3, save_strategy="steps", save_steps=1)
    expected = tiny.history(kit.run(tmp_path / "whole", **flags))
    step = LLaVATrainer.training_step

    def stop_in_third_step(self, *args, **kwargs):
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match=r"^130$"):
        patch.setattr(LLaVATrainer, "training_step", stop_in_third_step)
        kit.run(tmp_path / "out", **flags)
    (tmp_path / "out/checkpoint-2/trainer_state.json").unlink()
    capsys.readouterr()
    out = kit.run(tmp_path / "out", **flags)
    assert f"resuming from {out}/checkpoint-1" in capsys.readouterr().out
    assert [entry["loss"] for entry in tiny.history(out)] == pytest.approx([entry["loss"] for entry in expected])


@pytest.mark.parametrize("parts", ["mm_mlp_adapter", "mm_mlp_adapter,mm_language_model"])
def test_a_run_stopped_while_the_model_was_saved(kit, tmp_path, parts):
    """All steps are done; the next start saves the model and takes no further step."""
    flags = dict(max_steps=2, save_strategy="steps", save_steps=1, mm_tunable_parts=parts)
    out = kit.run(tmp_path / "out", "iiii", **flags)
    name = "mm_projector.safetensors" if parts == "mm_mlp_adapter" else "model.safetensors"
    expected, steps = load_file(out / name), tiny.history(out)
    (out / name).unlink()
    (out / "trainer_state.json").unlink()
    kit.run(out, "iiii", **flags)
    again = load_file(out / name)
    assert again.keys() == expected.keys() and all(value.equal(again[key]) for key, value in expected.items())
    assert tiny.history(out) == steps
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlavaQwenForCausalLM"]


def test_resume_from_a_named_checkpoint(kit, tmp_path, capsys):
    flags = dict(max_steps=2, save_strategy="steps", save_steps=1)
    whole = kit.run(tmp_path / "whole", **flags)
    capsys.readouterr()
    kit.run(tmp_path / "other", **flags, resume_from_checkpoint=whole / "checkpoint-1")
    assert f"resuming from {whole}/checkpoint-1" in capsys.readouterr().out
    assert tiny.history(tmp_path / "other")[-1]["loss"] == pytest.approx(tiny.history(whole)[-1]["loss"], abs=1e-6)
    with pytest.raises(SystemExit):
        kit.run(tmp_path / "none", **flags, resume_from_checkpoint=tmp_path / "nowhere")
    assert f"error: resume_from_checkpoint: {tmp_path}/nowhere" in capsys.readouterr().err
    kit.run(tmp_path / "fresh", **flags, resume_from_checkpoint="False")
    assert "resuming" not in capsys.readouterr().out
