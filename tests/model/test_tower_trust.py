"""Whose word runs the class of an encoder: the user's and an installed plugin's, not a checkpoint's alone."""

import importlib.metadata
import shutil
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from llava.config.resolve import resolve
from llava.errors import LlavaError
from llava.families import get_family
from llava.model.builder import load_pretrained_model
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_encoder.trust import naming
from llava.tools.hf.source import read_source
from tests import tiny
from tests.model import small
from tests.model.own_encoders import FILE, IMAGE, SIDE, saved, working_folder  # noqa: F401

CLASSES = ("mine.py:Plain", "mine:Plain")  # a file, and a module of the working directory or PYTHONPATH


@pytest.fixture
def checkpoint(here, tmp_path):
    """Makes a whole checkpoint, whose class then leaves a file behind wherever it is imported."""

    def make(name):
        saved(tmp_path / "saved", name, vision_tower_image=IMAGE)
        tiny.llm(tmp_path / "llm")
        for file in (tmp_path / "llm").glob("token*"):
            shutil.copy(file, tmp_path / "saved")
        for module in [module for module in sys.modules if "mine" in module]:
            del sys.modules[module]
        (here / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n{FILE}")
        return str(tmp_path / "saved")

    return make


def load(path, **options):
    return load_pretrained_model(path, None, "llava_qwen", device_map="cpu", torch_dtype="float32", **options)[1]


def train(path, **keys):
    """What a run checks of a model that it starts from."""
    run = resolve(["--model_name_or_path", path, *(f"--{key}={value}" for key, value in keys.items())])
    get_family("llava").check_fit(run)


@pytest.mark.parametrize("name", CLASSES)
def test_a_checkpoints_word_alone_runs_nothing(checkpoint, tmp_path, name, monkeypatch):
    path = checkpoint(name)
    monkeypatch.syspath_prepend(str(tmp_path / "here"))
    ways = {
        "evaluation, chat, merging": load,
        "transformers": AutoModelForCausalLM.from_pretrained,
        "explain_image": get_family("llava").geometry,
        "training": train,
        "export": read_source,
    }
    for what, way in ways.items():
        with pytest.raises(LlavaError) as found:
            way(path)
        told = str(found.value)
        assert name in told and "saved" in told and "\n" not in told, what
        assert (f"--vision_tower {name}, in a training run vision_tower: {name}" in told) == (what != "export")
        assert not (tmp_path / "ran").exists(), what


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_that_the_user_names(checkpoint, tmp_path, name):
    path = checkpoint(name)
    model = load(path, vision_tower=name)
    assert (tmp_path / "ran").exists() and model.get_vision_tower()(small.pixels(1, 3, SIDE, SIDE)).shape == (1, 9, 32)
    load(path, overwrite_config={"mm_vision_tower": name})
    AutoModelForCausalLM.from_pretrained(path, vision_tower=name)
    train(path, vision_tower=name, version="qwen_1_5", mm_projector_type="mlp2x_gelu")
    with pytest.raises(LlavaError, match="only the checkpoint"):  # what was named then is not named now
        load(path)


def test_the_users_file_not_the_checkpoints(checkpoint, here, tmp_path):
    """Its config has the path of another machine, at which there is a file here, too."""
    (tmp_path / "else").mkdir()
    shutil.copy(here / "mine.py", tmp_path / "else")
    path = checkpoint(f"{tmp_path}/else/mine.py:Plain")
    (tmp_path / "else/mine.py").write_text(f"open({str(tmp_path / 'wrong')!r}, 'w').close()\n{FILE}")
    load(path, vision_tower="mine.py:Plain")
    assert (tmp_path / "ran").exists() and not (tmp_path / "wrong").exists()


@pytest.mark.parametrize(
    ("named", "fault"),
    [
        ("mine.py:Map", r"^vision_tower: found mine.py:Map, but the vision tower of .*saved is mine.py:Plain"),
        ("mine:Plain", r"found mine:Plain, but the vision tower of .*saved is mine.py:Plain"),
        ("openai/clip", r"^vision_tower: found 'openai/clip', expected a class of your own"),
    ],
)
def test_another_than_the_checkpoints(checkpoint, tmp_path, named, fault):
    with pytest.raises(LlavaError, match=fault):
        load(checkpoint("mine.py:Plain"), vision_tower=named)
    assert not (tmp_path / "ran").exists()


def test_a_tower_that_is_no_class(here, tmp_path):
    model = small.model(small.tower(tmp_path / "clip"), image_aspect_ratio="pad")
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(LlavaError, match=r"but the vision tower of .*saved is .*clip, no class of anyone's own"):
        load(str(tmp_path / "saved"), vision_tower="mine.py:Plain")


def test_the_class_of_a_folders_weights(here, tmp_path):
    """The class stands in the type, beside the folder in vision_tower; naming the folder names no class."""
    saved(tmp_path / "saved", "encoder", mm_vision_tower_type="towers.py:Restoring")
    with pytest.raises(LlavaError, match=r"in a training run mm_vision_tower_type: towers.py:Restoring"):
        train(str(tmp_path / "saved"), vision_tower="encoder", mm_projector_type="mlp2x_gelu")
    train(str(tmp_path / "saved"), mm_vision_tower_type="towers.py:Restoring", mm_projector_type="mlp2x_gelu")


def test_trusted(checkpoint, here, tmp_path):
    path = checkpoint("mine.py:Plain")
    load(path, trust_remote_code=True)
    assert (tmp_path / "ran").exists()


def test_an_installed_plugin(checkpoint, tmp_path, monkeypatch):
    """Its name is trusted, as installing it was the user's; the path that it stands for is not, in a checkpoint."""
    point = importlib.metadata.EntryPoint("ours", "mine:Plain", "llava.towers")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point] if group == "llava.towers" else [])
    load(checkpoint("ours"))
    assert (tmp_path / "ran").exists()
    (tmp_path / "ran").unlink()
    with pytest.raises(LlavaError, match="only the checkpoint"):
        load(checkpoint("mine:Plain"))
    assert not (tmp_path / "ran").exists()
    load(checkpoint("mine:Plain"), vision_tower="ours")


def test_naming_ends(here):
    config = small.config("mine.py:Plain", vision_tower_image=IMAGE)
    config._name_or_path = "somebody/model"
    fault = r"only the checkpoint somebody/model names this class \(named: x.y:Z\)"
    with pytest.raises(LlavaError, match=fault), naming("x.y:Z", None, "openai/clip"):
        build_vision_tower(config)
    with naming("mine.py:Plain"):
        assert build_vision_tower(config).num_patches == 9
    with pytest.raises(LlavaError, match="names this class,"):
        build_vision_tower(config)
    assert torch.ran == 1
