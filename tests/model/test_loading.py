"""What is said of weights that a checkpoint lacks, has in another shape, or has too many of; nothing untrue is said."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llava.errors import LlavaError
from llava.model.builder import load_pretrained_model
from llava.model.language_model.llava_qwen import LlavaQwenForCausalLM
from llava.model.loading import without_report
from tests.model.golden import GOLDEN

SOURCE = GOLDEN / "qwen_clip_anyres_unpad"
UP = "model.layers.0.mlp.up_proj.weight"
OUTER = ("mm_projector", "vision_tower", "image_newline")


@pytest.fixture
def reports(monkeypatch):
    """What transformers tells of its loadings."""
    told = []
    logger = logging.getLogger("transformers.modeling_utils")
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logger.addHandler(handler)
    yield told
    logger.removeHandler(handler)


def edited(folder, edit=None, **config):
    """A copy of a golden checkpoint, its weights changed in place by `edit`."""
    shutil.copytree(SOURCE, folder, ignore=shutil.ignore_patterns("io.*", "image_*"))
    weights = load_file(folder / "model.safetensors")
    if edit:
        edit(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | config))
    return folder


def load(folder, base=None, **options):
    options = {"device_map": "cpu", "torch_dtype": "float32"} | options
    return load_pretrained_model(str(folder), base and str(base), "llava_qwen", **options)[1]


def dropped(*parts):
    return lambda weights: [weights.pop(name) for name in list(weights) if any(part in name for part in parts)]


def cut(name):
    return lambda weights: weights.update({name: weights[name][:5].contiguous()})


# --- nothing untrue ---


@pytest.mark.parametrize("way", ["projector", "frozen tower", "whole", "class", "auto", "half"])
def test_no_loading_calls_loaded_weights_new(tmp_path, reports, capsys, way):
    if way == "projector":
        over = edited(tmp_path / "llava-qwen-pretrain")
        weights = load_file(over / "model.safetensors")
        (over / "model.safetensors").unlink()
        save_file(
            {k: v for k, v in weights.items() if OUTER[0] in k or OUTER[2] in k}, over / "mm_projector.safetensors"
        )
        base = edited(tmp_path / "base", dropped(*OUTER), model_type="qwen2", architectures=["Qwen2ForCausalLM"])
        model = load(over, base)
    else:
        folder = edited(tmp_path / "llava-qwen", dropped("vision_tower") if way == "frozen tower" else None)
        if way == "class":
            model = LlavaQwenForCausalLM.from_pretrained(folder)
        elif way == "auto":
            model = AutoModelForCausalLM.from_pretrained(folder)
        else:
            model = load(folder, torch_dtype="bfloat16" if way == "half" else "float32")
        weights = load_file(SOURCE / "model.safetensors")
    for name in ("model.mm_projector.0.weight", "model.image_newline", UP):
        assert torch.equal(model.get_parameter(name).float(), weights[name].to(model.dtype).float())
    assert not reports and "new" not in capsys.readouterr().out


def test_the_report_of_other_loadings_is_left_as_it_is(reports):
    logger = logging.getLogger("transformers.modeling_utils")
    with without_report():
        logger.warning("X LOAD REPORT from: y")
        logger.warning("another warning")
    logger.warning("Z LOAD REPORT from: y")
    assert reports == ["another warning", "Z LOAD REPORT from: y"]


# --- all that is true ---


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (cut(UP), f"{UP} is (5, 64), expected (128, 64)"),
        (cut("model.mm_projector.0.weight"), "model.mm_projector.0.weight is (5, 64), expected (64, 64)"),
        (cut("model.image_newline"), "model.image_newline is (5,), expected (64,)"),
        (dropped(UP), f"lacks 1 weights of LlavaQwenForCausalLM, {UP}"),
        (dropped("lm_head"), "lacks 1 weights of LlavaQwenForCausalLM, lm_head.weight"),
        (dropped("class_embedding"), "lacks 1 of its vision tower's 55 weights"),
        (lambda w: w.update({"model.mm_projector.4.weight": torch.ones(64, 64)}), "mm_projector.4.weight has no place"),
    ],
)
def test_faults_of_weights_are_told_in_one_line(tmp_path, reports, edit, words):
    folder = edited(tmp_path / "llava-qwen", edit)
    for way in (load, LlavaQwenForCausalLM.from_pretrained):
        with pytest.raises(LlavaError) as fault:
            way(str(folder))
        assert words in str(fault.value) and str(folder) in str(fault.value) and "\n" not in str(fault.value)
    assert not reports


def test_a_vision_weight_of_another_shape(tmp_path):
    name = "model.vision_tower.vision_tower.vision_model.embeddings.patch_embedding.weight"
    with pytest.raises(LlavaError, match=r"patch_embedding.weight is \(5, 3, 14, 14\), expected \(64, 3, 14, 14\)"):
        load(edited(tmp_path / "llava-qwen", cut(name)))


def test_a_shard_that_is_missing(tmp_path):
    folder = edited(tmp_path / "llava-qwen")
    weights, first = load_file(folder / "model.safetensors"), "model-00001-of-00002.safetensors"
    (folder / "model.safetensors").unlink()
    save_file({UP: weights[UP]}, folder / first, {"format": "pt"})
    where = {name: first if name == UP else first.replace("00001", "00002", 1) for name in weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    with pytest.raises(LlavaError, match=r"no usable weights \(.*model-00002-of-00002.safetensors\)"):
        load(folder)


def test_weights_without_a_place_are_noted_once(tmp_path, capsys, reports):
    def add(weights):
        weights |= {
            "model.vision_resampler.query": torch.ones(2),
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
            "model.vision_tower.vision_tower.vision_model.embeddings.position_ids": torch.arange(17)[None],
        }

    load(edited(tmp_path / "llava-qwen", add))
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1 and "1 of its weights are not used" in notes[0] and "vision_resampler.query" in notes[0]
    assert not reports


def test_a_projector_that_is_new_is_said_to_be(tmp_path, capsys):
    folder = edited(tmp_path / "llava-qwen", dropped("mm_projector"))
    with pytest.raises(LlavaError, match=r"lacks 4 weights of LlavaQwenForCausalLM, model\.mm_projector"):
        load(folder)
    LlavaQwenForCausalLM.from_pretrained(str(folder))  # as a start of training
    assert "holds no model.mm_projector.0.bias" in capsys.readouterr().out


def test_other_shapes_where_they_are_asked_for(tmp_path, capsys):
    folder = edited(tmp_path / "llava-qwen", cut("lm_head.weight"))
    model = LlavaQwenForCausalLM.from_pretrained(str(folder), ignore_mismatched_sizes=True)
    assert len(model.lm_head.weight) == model.config.vocab_size
