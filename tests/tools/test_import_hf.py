"""`python -m llava.tools.import_hf`: what becomes of folders of transformers."""

import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from llava.tools.export_hf import export
from llava.tools.hf import streaming
from llava.tools.hf.chat_template import chat_template
from llava.tools.import_hf import main
from tests.model import golden
from tests.tools.hf.checkpoints import CASES, make, tokenizer

pytestmark = pytest.mark.usefixtures("no_collection")


def run(*arguments) -> None:
    main([str(argument) for argument in arguments])


def failure(capsys, *arguments) -> str:
    """The one line that a run says when it fails."""
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    said = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and said[-1].startswith("error: ")
    return said[-1]


@pytest.fixture
def out(tmp_path):
    """Where to write; nothing may be left beside it."""
    parent = tmp_path / "results"
    parent.mkdir()
    yield parent / "out"
    assert os.listdir(parent) in ([], ["out"])


@pytest.fixture(scope="module")
def pair(exported):
    """(LLaVA folder, folder of transformers) of one case."""
    return exported("qwen_next")[:2]


def config_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


def edited(source, folder, **changes):
    """A copy of a folder with changes to config.json."""
    shutil.copytree(source, folder)
    (folder / "config.json").write_text(json.dumps(config_of(source) | changes))
    return folder


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vicuna_next", "qwen3_onevision", "clip_onevision", "llama3_pad"])
def test_there_and_back(name, exported, tmp_path, out):
    """The same tensors, token ids and config; SigLIP's encoder has the depth again that LLaVA counts."""
    source, folder, _ = exported(name)
    run("--model-path", folder, "--output", out)
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    old, new = config_of(source), config_of(out)
    ignored = {
        "transformers_version",
        "mm_vision_tower",
        "mm_image_processor_config",
        "mm_vision_config",
        "mm_use_im_start_end",
    }
    ignored |= {"bos_token_id", "eos_token_id", "pad_token_id", "use_mm_proj"}
    assert {k: v for k, v in old.items() if k not in ignored} == {k: v for k, v in new.items() if k not in ignored}
    for key in ("num_hidden_layers", "model_type", "image_size", "hidden_act"):
        assert old["mm_vision_config"][key] == new["mm_vision_config"][key]
    assert not os.path.isabs(new["mm_vision_tower"]) and not os.path.isdir(new["mm_vision_tower"])
    first, second = (AutoTokenizer.from_pretrained(folder) for folder in (source, out))
    assert len(first) == len(second) and "<image>" not in second.get_vocab()
    if name != "vicuna_next":
        return
    export(str(out), str(tmp_path / "again"))
    there, again = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert there.keys() == again.keys() and all(torch.equal(there[key], again[key]) for key in there)


def test_tied_embeddings_with_spare_rows(tmp_path, out):
    source = make(tmp_path, "qwen_onevision", tie_word_embeddings=True, vocab_size=710)
    export(str(source), str(tmp_path / "hf"))
    run("--model-path", tmp_path / "hf", "--output", out, "--max-shard-size", "100KB", "--dtype", "bfloat16")
    state = {key: value for path in out.glob("*.safetensors") for key, value in load_file(path).items()}
    before = load_file(source / "model.safetensors")
    assert state.keys() == before.keys() and "lm_head.weight" not in state
    assert all(torch.equal(state[key], before[key].bfloat16()) for key in before)
    assert config_of(out)["vocab_size"] == 710 and config_of(out)["dtype"] == "bfloat16"


# --- what transformers itself saved -----------------------------------------------------------------------------------


def stock(folder, name, siglip_layers=4, layer=-2, template="qwen_1_5"):
    """A folder of transformers alone: random weights, its own processor; no trace of an export."""
    import transformers

    kind = "siglip" if "onevision" in name else "clip"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": siglip_layers}
    vision = {
        "model_type": f"{kind}_vision_model",
        **sizes,
        "image_size": 42,
        "patch_size": 14,
        "initializer_factor": 8.0,
    }
    text = {"model_type": "qwen2", **sizes, "num_key_value_heads": 1, "vocab_size": 720, "initializer_range": 0.2}
    found = tokenizer("qwen")
    found.add_special_tokens({"additional_special_tokens": ["<image>", "<video>"]})
    stem = {"next": "LlavaNext", "onevision": "LlavaOnevision", "llava": "Llava"}[name]
    grid = [[84, 42], [42, 84], [84, 84]]
    values = {"vision_config": vision, "text_config": text, "vision_feature_layer": layer, "image_token_index": 703}
    strategy = "full" if kind == "siglip" else "default"
    images = {"image_grid_pinpoints": grid}
    if name == "llava":
        images = {}
    torch.manual_seed(0)
    config = getattr(transformers, f"{stem}Config")(**values, **images, vision_feature_select_strategy=strategy)
    model = getattr(transformers, f"{stem}ForConditionalGeneration")(config)
    model.save_pretrained(folder)
    made = getattr(transformers, f"{stem}ImageProcessorPil")
    square = {"height": 42, "width": 42}
    if kind == "clip":
        processor = made(size={"shortest_edge": 42}, crop_size=square, **images)
    else:
        processor = made(size=square, **images)
    processor.save_pretrained(folder)
    values = {
        "processor_class": f"{stem}Processor",
        "vision_feature_select_strategy": strategy,
        "image_token": "<image>",
    }
    values |= {
        "patch_size": 14,
        "num_additional_image_tokens": 1,
        "num_image_tokens": 9,
        "vision_aspect_ratio": "anyres_max_9",
    }
    (folder / "processor_config.json").write_text(json.dumps(values))
    found.save_pretrained(folder)
    if template:
        (folder / "chat_template.jinja").write_text(chat_template(template))
    return folder


@pytest.mark.parametrize(
    "name, layer", [("next", -2), ("next", 2), ("llava", -2), ("onevision", -1), ("onevision", -2)]
)
def test_a_folder_of_transformers(name, layer, tmp_path, out, capsys):
    """Proven equal by the command itself; the layers that are not run stay out of SigLIP."""
    folder = stock(tmp_path / "hf", name, layer=layer)
    run("--model-path", folder, "--output", out)
    printed = capsys.readouterr().out
    assert "verified in float32" in printed and "conversation template qwen_1_5" in printed
    config, state = config_of(out), load_file(out / "model.safetensors")
    assert config["architectures"] == ["LlavaQwenForCausalLM"] and config["vocab_size"] == 720
    assert config["image_aspect_ratio"] == {"next": "anyres", "llava": "square", "onevision": "anyres_max_9"}[name]
    assert ("model.image_newline" in state) == (name != "llava")
    depth = {"onevision": 5 + layer}.get(name, 4)
    layers = {int(found.group(1)) for key in state if (found := re.search(r"vision_model.encoder.layers.(\d+)", key))}
    assert layers == set(range(depth)) and not any(".head." in key for key in state)
    assert config["mm_vision_config"]["num_hidden_layers"] == (depth + 1 if name == "onevision" else 4)
    if name != "llava":
        assert config["image_grid_pinpoints"][0] == [42, 84]  # (width, height)


@pytest.mark.parametrize("layout", ["hub", "transformers 5"])
def test_both_layouts_of_names(layout, pair, tmp_path, out):
    folder = edited(pair[1], tmp_path / "hf")
    state = load_file(folder / "model.safetensors")
    assert "language_model.model.norm.weight" in state and "vision_tower.vision_model.post_layernorm.bias" in state
    if layout == "transformers 5":
        rules = (("language_model.model.", "model.language_model."), ("language_model.lm_head", "lm_head"))
        rules += (("vision_tower.vision_model.", "model.vision_tower."), ("multi_modal", "model.multi_modal"))
        rules += (("image_newline", "model.image_newline"),)
        renamed = {}
        for key, value in state.items():
            old, new = next(rule for rule in rules if key.startswith(rule[0]))
            renamed[new + key.removeprefix(old)] = value
        save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    run("--model-path", folder, "--output", out)
    before, after = load_file(pair[0] / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_an_export_that_was_changed_keeps_its_rows(pair, tmp_path, out):
    """More tokens than the export had: no row may go."""
    folder = edited(pair[1], tmp_path / "hf")
    found = AutoTokenizer.from_pretrained(folder)
    found.add_tokens(["<new>"])
    found.save_pretrained(folder)
    run("--model-path", folder, "--output", out)
    assert config_of(out)["vocab_size"] == len(load_file(out / "model.safetensors")["lm_head.weight"]) == 704
    assert AutoTokenizer.from_pretrained(out).convert_tokens_to_ids(["<image>", "<new>"]) == [703, 704]


def test_a_blank_behind_the_image(exported, tmp_path, out, capsys):
    """Llama's tokenizer as transformers 5 saves it: the one difference is LLaVA's blank, and a note says so."""
    shutil.copytree(exported("vicuna_pad")[1], tmp_path / "hf")
    for path in (tmp_path / "hf").glob("tokenizer*"):
        path.unlink()
    tokenizer("llama").save_pretrained(tmp_path / "tokenizer")
    found = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    found.add_special_tokens({"additional_special_tokens": ["<image>"]})
    found.save_pretrained(tmp_path / "hf")
    run("--model-path", tmp_path / "hf", "--output", out)
    assert "puts no blank behind an image" in capsys.readouterr().out


def test_the_template_is_named_or_found(pair, tmp_path, out, capsys):
    folder = edited(pair[1], tmp_path / "hf")
    (folder / "chat_template.jinja").write_text(
        chat_template("qwen_1_5").replace("<|im_start|>user\\n", "<|im_start|>user ")
    )
    assert "--version (the nearest is qwen_1_5)" in failure(capsys, "--model-path", folder, "--output", out)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('never') }}")
    assert "its chat template fails" in failure(capsys, "--model-path", folder, "--output", out)
    (folder / "chat_template.jinja").unlink()
    assert "--version" in failure(capsys, "--model-path", folder, "--output", out)
    assert "did you mean" in failure(capsys, "--model-path", folder, "--output", out, "--version", "qwen15")
    run("--model-path", folder, "--output", out, "--version", "qwen_2_5")
    assert config_of(out)["conversation_template"] == "qwen_2_5"


# --- when it writes nothing -------------------------------------------------------------------------------------------

BAD = {
    "no folder": ({}, "no config.json"),
    "another model": ({"model_type": "qwen2_vl"}, "found model_type 'qwen2_vl', expected a folder of"),
    "llava's own": ({"model_type": "llava", "text_config": ...}, "without text_config"),
    "language model": ({"text_config": {"model_type": "gemma", "hidden_size": 32}}, "text_config: found .*gemma"),
    "soft cap": ({"text_config": {"model_type": "gemma2", "hidden_size": 32}}, "found final_logit_softcapping 30.0"),
    "tower": ({"vision_config": {"model_type": "dinov2", "hidden_size": 32}}, "vision_config: found .*dinov2"),
    "activation": ({"projector_hidden_act": "relu"}, "projector_hidden_act: found 'relu', expected 'gelu'"),
    "bias": ({"multimodal_projector_bias": False}, "multimodal_projector_bias: found False"),
    "layers": ({"vision_feature_layer": [-2, -3]}, "expected a single layer"),
    "layer": ({"vision_feature_layer": -9}, "vision_feature_layer: found -9"),
    "grid": ({"image_grid_pinpoints": [[42, 84]]}, "image_grid_pinpoints differ"),
    "cut": ({}, "not a whole safetensors file"),
    "missing": ({}, "lacks 1 of .* weights, model.image_newline"),
    "unknown": ({}, "no place for, resampler.weight"),
    "shape": ({}, "linear_1.bias: found"),
    "processor": ({}, "no processor that transformers loads"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_input(fault, pair, tmp_path, out, capsys):
    changes, words = BAD[fault]
    folder = edited(pair[1], tmp_path / "hf", **{k: v for k, v in changes.items() if v is not ...})
    if ... in changes.values():
        values = {k: v for k, v in config_of(folder).items() if changes.get(k) is not ...}
        (folder / "config.json").write_text(json.dumps(values))
    weights = folder / "model.safetensors"
    state = load_file(weights)
    if fault == "no folder":
        folder = tmp_path / "nowhere"
    elif fault == "cut":
        weights.write_bytes(weights.read_bytes()[:-4])
    elif fault == "missing":
        del state["image_newline"]
    elif fault == "unknown":
        state["resampler.weight"] = torch.zeros(2)
    elif fault == "shape":
        state["multi_modal_projector.linear_1.bias"] = torch.zeros(3)
    elif fault == "processor":
        for name in ("processor_config.json", "preprocessor_config.json"):
            (folder / name).unlink()
    if fault in ("missing", "unknown", "shape"):
        save_file(state, weights, {"format": "pt"})
    assert re.search(words, failure(capsys, "--model-path", folder, "--output", out))


def test_a_weight_that_goes_wrong_leaves_nothing(pair, out, capsys, monkeypatch):
    read = streaming.Weights.read
    monkeypatch.setattr(streaming.Weights, "read", lambda self, name: read(self, name) + ("linear_2.bias" in name))
    assert "logits differ by" in failure(capsys, "--model-path", pair[1], "--output", out)
    monkeypatch.undo()
    run("--model-path", pair[1], "--output", out)
    assert "--overwrite" in failure(capsys, "--model-path", pair[1], "--output", out)
    folder = pair[1].parent
    assert "holds the weights" in failure(capsys, "--model-path", pair[1], "--output", folder, "--overwrite")


def test_cases_are_all_of_them():
    assert {case[-1] for case in CASES.values()} == {"Llava", "LlavaNext", "LlavaOnevision"} and golden.CASES
