"""`python -m llava.tools.convert_vit`: what it reads, what it writes, and when it writes nothing."""

import argparse
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessorPil

import llavavit.conversion
from llava.tools.convert_vit import main
from llava.tools.vit import checkpoint as vit_checkpoint
from llavavit import SIZES, LlavaViTModel, LlavaViTPackingModel
from llavavit.conversion import SOURCE_EPS, convert_state_dict
from tests.support.vit.golden import TINY, TINY_SIZE, golden_folder, golden_state, same, source_state
from tests.support.vit.published import GOLDEN_FOLDERS

PUBLISHED_CONFIG = {"model_type": "llava_vit", **TINY_SIZE, "image_size": 64}


@pytest.fixture(autouse=True)
def tiny_size(monkeypatch):
    monkeypatch.setitem(SIZES, TINY, (TINY_SIZE | {"num_hidden_layers": 4}, TINY_SIZE))


@pytest.fixture
def source(tmp_path):
    """Source weights as a training run saves them."""
    path = tmp_path / "in" / "weights.pth"
    path.parent.mkdir()
    state = {f"module._orig_mod.{name}": value for name, value in source_state().items()}
    torch.save({"model": state, "epoch": 3}, path)
    return path


@pytest.fixture
def out(tmp_path):
    """Where to write; nothing may be left beside it."""
    parent = tmp_path / "results"
    parent.mkdir()
    yield parent / "out"
    assert os.listdir(parent) in ([], ["out"])


def convert(*arguments) -> None:
    main([str(argument) for argument in arguments])


def failure(capsys, *arguments) -> str:
    """The one line that a run says when it fails."""
    with pytest.raises(SystemExit) as stopped:
        convert(*arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


def read_json(path) -> dict:
    return json.loads(path.read_text())


# --- what it writes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("to", "model"), [("padded", LlavaViTModel), ("packing", LlavaViTPackingModel)])
@pytest.mark.parametrize("folder", GOLDEN_FOLDERS)
def test_a_folder(folder, to, model, out, capsys):
    convert("--to", to, golden_folder(folder), out)
    printed = capsys.readouterr()
    for name in ("last_hidden_state", "pooler_output", "hidden_states"):
        value = next(line.split()[1] for line in printed.out.splitlines() if line.split()[0] == name)
        assert 0 <= float(value) < 1e-5
    assert printed.err == ""
    assert ("rope_temporal_size 64 is left out" in printed.out) == (folder == "onevision_encoder")
    config = read_json(out / "config.json")
    assert config["model_type"] == model.config_class.model_type and config["architectures"] == [model.__name__]
    assert config["image_size"] == read_json(golden_folder(folder) / "config.json")["image_size"]
    layout = "padded" if to == "padded" else "packed"
    assert same(load_file(out / "model.safetensors"), convert_state_dict(golden_state(folder), layout))


@pytest.mark.parametrize("to", ["padded", "packing"])
def test_a_file_of_source_weights(to, source, out, capsys):
    convert("--to", to, source, out, "--model_name", TINY, "--image_size", "96")
    assert "source layout, float32, 3 layers of 64 channels" in capsys.readouterr().out
    config = read_json(out / "config.json")
    assert TINY_SIZE.items() <= config.items() and config["image_size"] == 96
    # what they were trained with, not what the published conversion writes
    assert {key: config[key] for key in SOURCE_EPS} == SOURCE_EPS
    assert same(convert_state_dict(load_file(out / "model.safetensors"), "source"), source_state())


def test_weights_keep_their_dtype(tmp_path, out):
    half = {name: value.bfloat16() for name, value in golden_state().items()}
    save_file(half, tmp_path / "half.safetensors")
    convert("--to", "packing", tmp_path / "half.safetensors", out)
    assert same(load_file(out / "model.safetensors"), convert_state_dict(half, "packed"))
    assert read_json(out / "config.json")["dtype"] == "bfloat16"
    assert LlavaViTPackingModel.from_pretrained(out).dtype == torch.bfloat16


def test_a_config_of_the_callers(tmp_path, source, out):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(PUBLISHED_CONFIG | {"layer_norm_eps": 1e-3, "rope_theta": 50.0}))
    convert("--to", "packing", source, out, "--config", config)
    written = read_json(out / "config.json")
    assert (written["layer_norm_eps"], written["rope_theta"], written["image_size"]) == (1e-3, 50.0, 64)
    assert written["head_norm_eps"] == SOURCE_EPS["head_norm_eps"]  # which the config is silent on


def test_preprocessor_is_clips(source, out):
    convert("--to", "padded", source, out, "--image_size", "96")
    values = read_json(out / "preprocessor_config.json")
    assert values["image_processor_type"] == "CLIPImageProcessor"
    processor = CLIPImageProcessorPil.from_pretrained(out)
    assert processor.size == {"shortest_edge": 96} and processor.crop_size == {"height": 96, "width": 96}
    assert processor.resample == 3 and processor.rescale_factor == 1 / 255
    assert list(processor.image_mean) == [0.48145466, 0.4578275, 0.40821073]
    assert list(processor.image_std) == [0.26862954, 0.26130258, 0.27577711]


@pytest.mark.parametrize("image_size", [None, 96])
def test_a_folders_own_preprocessor_is_kept(tmp_path, out, image_size):
    own = {"image_processor_type": "SiglipImageProcessor", "image_mean": [0.5, 0.5, 0.5], "size": {"height": 64}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(own))
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED_CONFIG))
    torch.save(golden_state(), tmp_path / "pytorch_model.bin")
    convert("--to", "packing", tmp_path, out, *([] if image_size is None else ["--image_size", image_size]))
    written = read_json(out / "preprocessor_config.json")
    assert written["image_mean"] == own["image_mean"]
    assert written["size"] == (own["size"] if image_size is None else {"shortest_edge": 96})
    assert read_json(out / "config.json")["image_size"] == (image_size or 64)


# --- when outputs differ ----------------------------------------------------------------------------------------------


def disturb_writing(monkeypatch, change) -> None:
    """`change` the weights on their way into OUT."""
    write, convert_state = vit_checkpoint.write_checkpoint, convert_state_dict

    def disturbed(*args, **kwargs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(llavavit.conversion, "convert_state_dict", lambda *a: change(convert_state(*a)))
            return write(*args, **kwargs)

    monkeypatch.setattr("llava.tools.convert_vit.write_checkpoint", disturbed)


def one_weight(state: dict) -> dict:
    weight = next(value for name, value in state.items() if name.endswith("layers.0.mlp.fc1.weight"))
    weight[3, 5] += 0.05
    return state


def one_nan(state: dict) -> dict:
    state["layernorm_pre.bias"][0] = float("nan")
    return state


@pytest.mark.parametrize("change", [one_weight, one_nan])
@pytest.mark.parametrize("layout", ["source", "packed"])
def test_a_difference_leaves_no_out(monkeypatch, source, out, capsys, change, layout):
    disturb_writing(monkeypatch, change)
    path = source if layout == "source" else golden_folder("llava_vit_packing")
    error = failure(capsys, "--to", "padded", path, out)
    assert "last_hidden_state differs by" in error and "expected at most 1e-04" in error
    assert not out.exists()


def test_a_config_that_gets_lost_is_a_difference(monkeypatch, source, out, capsys):
    real = llavavit.conversion.convert_config
    monkeypatch.setattr(llavavit.conversion, "convert_config", lambda *a, **k: real(*a, **k | {"rope_theta": 9000.0}))
    assert "differs by" in failure(capsys, "--to", "padded", source, out)
    assert not out.exists()


def test_overwriting_waits_for_success(monkeypatch, source, out, capsys):
    convert("--to", "padded", source, out)
    (out / "notes.txt").write_text("old")
    assert "is there already; --overwrite replaces it" in failure(capsys, "--to", "packing", source, out)
    with monkeypatch.context() as patch:
        disturb_writing(patch, one_weight)
        failure(capsys, "--to", "packing", source, out, "--overwrite")
    assert (out / "notes.txt").read_text() == "old"
    assert read_json(out / "config.json")["model_type"] == "llava_vit"
    convert("--to", "packing", source, out, "--overwrite")
    assert read_json(out / "config.json")["model_type"] == "llava_vit_packing"
    assert not (out / "notes.txt").exists()


def test_a_folder_that_cannot_be_put_in_place_gives_the_old_one_back(monkeypatch, source, out):
    convert("--to", "padded", source, out)
    rename = os.rename

    def fail(a, b):
        if str(b) == str(out) and not str(a).endswith("replaced"):
            raise PermissionError("no")
        rename(a, b)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(PermissionError):
        convert("--to", "packing", source, out, "--overwrite")
    assert read_json(out / "config.json")["model_type"] == "llava_vit"


def test_only_checkpoints_are_overwritten_and_never_the_weights_read(tmp_path, source, out, capsys):
    out.mkdir()
    assert "found no config.json in it" in failure(capsys, "--to", "padded", source, out, "--overwrite")
    (source.parent / "config.json").write_text("{}")
    assert "holds the weights" in failure(capsys, "--to", "padded", source, source.parent, "--overwrite")
    assert source.exists()


# --- what it refuses --------------------------------------------------------------------------------------------------


def change_config(**changes):
    return lambda folder: (folder / "config.json").write_text(json.dumps(PUBLISHED_CONFIG | changes))


def save(change):
    """A step that saves changed padded weights."""
    return lambda folder: save_file(change(golden_state()), folder / "model.safetensors")


def drop(name):
    return lambda state: {key: value for key, value in state.items() if key != name}


REFUSED = [
    (change_config(num_hidden_layers=2), [], r"encoder.layers.2.layer_norm1.bias: found (64,), expected no such"),
    (change_config(use_head=False), [], "head.attention.in_proj_bias: found (192,), expected no such weights"),
    (change_config(patch_size=14), ["--image_size", "28"], "patch_embedding.weight: found (64, 3, 16, 16), expected"),
    (change_config(hidden_size=96), [], "expected heads of a width that is a multiple of 32"),
    (change_config(model_type="clip"), [], "model_type: found 'clip', expected one of llava_vit, onevision_encoder"),
    (change_config(image_size=100), [], "image_size: found 100, expected a multiple of 16"),
    (change_config(layer_norm_eps="tiny"), [], "layer_norm_eps: found 'tiny', expected a number above 0"),
    (lambda folder: (folder / "config.json").write_text("{"), [], "config.json: no JSON"),
    (lambda folder: (folder / "config.json").write_text("[]"), [], "config.json: found list, expected keys"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"1234567890"), [], "cannot be read as weights"),
    (lambda folder: (folder / "model.safetensors").unlink(), [], "found no model.safetensors and no pytorch_model"),
    (save(drop("layernorm_post.bias")), [], "layernorm_post.bias: found no such weights, expected (64,)"),
    (save(drop("encoder.layers.0.self_attn.v_proj.bias")), [], "v_proj.bias: found no such weights, expected (64,)"),
    (save(lambda state: state | {"fc.bias": torch.ones(2)}), [], "fc.bias: found (2,), expected no such weights"),
    (save(lambda state: {"fc.bias": torch.ones(2)}), [], "1 names without a patch embedding"),
    (save(dict), ["--model_name", "hf_llava_vit_huge_ln"], "'hidden_size': 64"),
    (save(dict), ["--model_name", "huge"], "model name: found 'huge', expected one of hf_llava_vit_small_ln"),
    (change_config(num_attention_heads=1), ["--model_name", TINY], "1 attention heads, expected 2 for " + TINY),
    (save(dict), ["--config", "nowhere.json"], "nowhere.json: no such file"),
]


@pytest.mark.parametrize(("change", "arguments", "expected"), REFUSED)
def test_what_does_not_fit_is_told_in_one_line(tmp_path, out, capsys, change, arguments, expected):
    folder = tmp_path / "in"
    folder.mkdir()
    save_file(golden_state(), folder / "model.safetensors")
    change_config()(folder)
    change(folder)
    error = failure(capsys, "--to", "packing", folder, out, *arguments)
    assert expected in error and (str(folder) in error or "nowhere.json" in error)
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("w.pth", {"model": source_state, "args": argparse.Namespace(lr=1)}, "it is no file of tensors alone"),
        ("w.pth", [1, 2], "found list, expected tensors by name"),
        ("w.pth", None, "cannot be read as weights"),
        ("w.safetensors", None, "cannot be read as weights"),
        ("w.ckpt", None, "found no known ending"),
        ("none.pth", False, "nothing there"),
    ],
)
def test_files_that_are_no_weights(tmp_path, out, capsys, name, content, expected):
    if content is None:
        (tmp_path / name).write_bytes(b"nothing")
    elif content is not False:
        torch.save(content() if callable(content) else content, tmp_path / name)
    assert expected in failure(capsys, "--to", "packing", tmp_path / name, out)


def test_weights_of_no_published_size_ask_for_a_config(monkeypatch, source, out, capsys):
    monkeypatch.delitem(SIZES, TINY)
    error = failure(capsys, "--to", "packing", source, out)
    assert "'hidden_size': 64" in error and "or a config" in error


@pytest.mark.parametrize("module", ["llava.tools.convert_vit", "llava.tools.upload_llava_vit"])
def test_help_imports_nothing_heavy(module):
    heavy = "[name for name in ('torch', 'transformers', 'llavavit') if name in sys.modules]"
    program = f"import sys, {module} as tool; tool.build_parser(); print({heavy})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
