"""`python -m llava.tools.export_hf`: what stock transformers makes of what it writes, and when it writes nothing."""

import json
import os
import re
import shutil
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

from llava.constants import IMAGE_TOKEN_INDEX
from llava.errors import LlavaError
from llava.mm_utils import process_image, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.tools.export_hf import export, main
from llava.tools.hf import probes, streaming, verify
from llava.tools.hf.processor import load_processor
from tests.model import golden
from tests.tools.hf.checkpoints import CASES, make

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


def ours(folder):
    return load_pretrained_model(
        str(folder), None, "llava", device_map="cpu", torch_dtype="float32", attn_implementation="eager"
    )


def theirs(folder):
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, attn_implementation="eager", dtype="float32", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


def pictures(*sizes):
    rng = np.random.default_rng(5)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).resize((w, h)) for w, h in sizes]


def prompt(processor, text, images=0):
    content = [{"type": "image"}] * images + [{"type": "text", "text": text}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


# --- the same model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_stock_transformers_gives_the_same_numbers(name, exported):
    """A batch of three padded on the left: two pictures of different aspect and a question without one."""
    source, folder, (model_class, report, _) = exported(name)
    assert model_class == f"{CASES[name][-1]}ForConditionalGeneration"
    assert report.difference <= 1e-5 and report.dtype == "float32"
    tokenizer, model, images, _ = ours(source)
    stock, processor = theirs(folder), load_processor(str(folder))
    assert type(stock).__name__ == model_class

    shown = pictures((100, 61), (40, 90))
    prompts = [
        prompt(processor, "What is this?", 1),
        prompt(processor, "And a red flower?", 1),
        prompt(processor, "Hi"),
    ]
    lists = [[picture] for picture in shown] if "onevision" in name else shown
    batch = processor(text=prompts, images=lists, return_tensors="pt", padding=True)
    assert batch["attention_mask"][:, -1].all() and not batch["attention_mask"].all()
    with torch.no_grad():
        logits = stock(**batch).logits
        answers = stock.generate(**batch, do_sample=False, max_new_tokens=8)
    settings = stock.generation_config
    greedy = {"do_sample": False, "max_new_tokens": 8}
    greedy |= {"eos_token_id": settings.eos_token_id, "pad_token_id": settings.pad_token_id}
    for row, (text, picture) in enumerate(zip(prompts, [*shown, None], strict=True)):
        ids = tokenizer_image_token(text, tokenizer, return_tensors="pt")[None]
        assert (ids == IMAGE_TOKEN_INDEX).sum() == (picture is not None)
        given = {}
        if picture is not None:
            given = {"images": list(process_images([picture], images, model.config)), "image_sizes": [picture.size]}
        with torch.no_grad():
            expected = model(ids, **given).logits[0]
            answer = model.generate(ids, **given, **greedy)
        real = batch["attention_mask"][row].bool()
        assert len(expected) == real.sum() and expected.abs().max() > 1
        assert (logits[row, real][:, : expected.shape[-1]] - expected).abs().max() <= 1e-4
        new = answers[row, len(real) :].tolist()
        assert new[: answer.shape[1]] == answer[0].tolist()
        assert logits[row, real].argmax(-1).max() < expected.shape[-1]  # no row that was added ever wins


@pytest.mark.parametrize("name", ["vicuna_pad", "qwen_onevision", "qwen_next"])
def test_several_images_in_one_prompt(name, exported):
    """LLaVA squares each of them; OneVision's processor does too, LLaVA-NeXT's cuts each into crops."""
    source, folder, _ = exported(name)
    tokenizer, model, images, _ = ours(source)
    stock, processor = theirs(folder), load_processor(str(folder))
    shown = pictures((100, 61), (40, 90))
    text = prompt(processor, "Which is larger?", 2)
    assert text.count("<image>\n") == 2
    batch = processor(text=[text], images=[shown], return_tensors="pt")
    ids = tokenizer_image_token(text, tokenizer, return_tensors="pt")[None]
    sizes = {"image_sizes": [picture.size for picture in shown]}

    def expected(aspect):
        grid = model.config.image_grid_pinpoints
        pixels = [process_image(picture, images, aspect, grid) for picture in shown]
        return model(ids, images=pixels, **sizes).logits[0]

    with torch.no_grad():
        logits = stock(**batch).logits[0]
        squared = expected("pad")
        if name == "qwen_next":
            assert len(squared) < len(logits)
            squared = expected("anyres")
    assert (logits[:, : squared.shape[-1]] - squared).abs().max() <= 1e-4


@pytest.mark.parametrize("name", [name for name in golden.CASES if "video" not in name])
def test_published_values(name, tmp_path):
    """Checkpoints and logits of LLaVA-NeXT itself; those of video come from models whose class here takes none."""
    case = golden.case(name)
    export(str(case.folder), str(tmp_path / "hf"), version=case.info["conversation"])
    stock, processor = theirs(tmp_path / "hf"), load_processor(str(tmp_path / "hf"))
    for row, (text, picture) in enumerate(zip(case.info["prompts"], case.pictures, strict=True)):
        batch = processor(text=text, images=[picture], return_tensors="pt")
        expected = case.io["logits"][row][case.io["merged_attention_mask"][row].bool()]
        with torch.no_grad():
            logits = stock(**batch).logits[0, :, : expected.shape[-1]]
        assert logits.shape == expected.shape and (logits - expected).abs().max() <= 1e-4


# --- what is in the folder --------------------------------------------------------------------------------------------


def test_what_is_written(exported):
    source, folder, (_, _, notes) = exported("vicuna_next")
    assert notes == []
    config = json.loads((folder / "config.json").read_text())
    assert config["image_grid_pinpoints"][1] == [84, 42]  # (height, width): two crops, one above the other
    assert config["vision_feature_layer"] == -2 and config["vision_feature_select_strategy"] == "default"
    assert config["image_seq_length"] == 9 and config["image_token_index"] == 900
    assert str(source) not in json.dumps(config)  # no path of this machine
    state, before = load_file(folder / "model.safetensors"), load_file(source / "model.safetensors")
    embedding = state["language_model.model.embed_tokens.weight"]
    assert config["text_config"]["vocab_size"] == len(embedding) == 960  # 901, and then a multiple of 64
    assert torch.equal(embedding[:900], before["model.embed_tokens.weight"])
    assert (embedding[900:] - before["model.embed_tokens.weight"].mean(0)).abs().max() < 1e-6
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids("<image>") == 900 and tokenizer.padding_side == "left"
    assert oct((folder / "model.safetensors").stat().st_mode)[-3:] == oct((folder / "config.json").stat().st_mode)[-3:]
    assert {"processor_config.json", "preprocessor_config.json", "chat_template.jinja"} <= set(os.listdir(folder))


def test_stop_tokens_and_settings(tmp_path, out):
    source = make(tmp_path, "qwen_next")
    (source / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 701, "temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.05})
    )
    run("--model-path", source, "--output", out)
    settings = json.loads((out / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [700, 701] and settings["pad_token_id"] == 701
    assert settings["repetition_penalty"] == 1.05
    assert (settings["temperature"], settings["top_p"], settings["do_sample"]) == (0.7, 0.8, True)


def test_the_onevision_processor_config(exported):
    """SigLIP loses the layer that LLaVA never runs; the processor's video half is described, too."""
    source, folder, (_, _, notes) = exported("qwen_onevision")
    config = json.loads((folder / "config.json").read_text())
    assert config["vision_config"]["num_hidden_layers"] == 3 and config["vision_config"]["vision_use_head"] is False
    assert config["vision_feature_layer"] == -1 and config["vision_feature_select_strategy"] == "full"
    assert config["vision_aspect_ratio"] == "anyres_max_2"
    assert [config["image_token_index"], config["video_token_index"]] == [703, 704]
    assert json.loads((source / "config.json").read_text())["mm_vision_config"]["num_hidden_layers"] == 4
    values = json.loads((folder / "processor_config.json").read_text())
    assert values["processor_class"] == "LlavaOnevisionProcessor" and values["num_image_tokens"] == 9
    assert values["video_processor"]["video_processor_type"] == "LlavaOnevisionVideoProcessor"
    assert any("torchvision" in note for note in notes)
    with pytest.raises(LlavaError, match="videos: found some, and no video processor"):
        load_processor(str(folder))(text="<video>\nwhat", videos=[np.zeros((2, 28, 28, 3), np.uint8)])


def test_tied_embeddings_and_spare_rows(tmp_path, out):
    """Qwen's small models: no output layer of their own, and rows for `<image>` there already."""
    source = make(tmp_path, "qwen_onevision", tie_word_embeddings=True, vocab_size=710)
    run("--model-path", source, "--output", out)
    state = load_file(out / "model.safetensors")
    assert not any("lm_head" in name for name in state)
    before = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(state["language_model.model.embed_tokens.weight"], before) and len(before) == 710
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is True and config["text_config"]["vocab_size"] == 710
    stock = theirs(out)
    assert stock.lm_head.weight is stock.get_input_embeddings().weight


def test_a_captioner_gets_no_chat_template(tmp_path, out, capsys):
    source = make(tmp_path, "vicuna_pad", conversation_template="plain")
    run("--model-path", source, "--output", out)
    assert "no chat template" in capsys.readouterr().out and not (out / "chat_template.jinja").exists()


# --- where the weights lie --------------------------------------------------------------------------------------------


def test_shards_and_dtype(tmp_path, out):
    source = make(tmp_path, "qwen_next")
    run("--model-path", source, "--output", out, "--max-shard-size", "100KB", "--dtype", "bfloat16")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = {path.name: load_file(path) for path in out.glob("*.safetensors")}
    assert len(files) > 2 and set(index["weight_map"].values()) == set(files)
    for name, file in index["weight_map"].items():
        assert files[file][name].dtype == torch.bfloat16
    assert all(sum(t.nbytes for t in shard.values()) <= 100_000 for shard in files.values())
    assert theirs(out).config.dtype is not None
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_older_checkpoints(tmp_path, out):
    """LLaVA-1.5 as published: pickled shards, no weights of the frozen tower."""
    source = make(tmp_path, "vicuna_pad")
    state = load_file(source / "model.safetensors")
    prefix = "model.vision_tower.vision_tower."
    encoder = {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}
    shutil.copytree(golden.GOLDEN / "llama_clip_pad_flat" / "clip_tower", source / "clip")  # for its file names
    values = json.loads((source / "config.json").read_text())
    (source / "clip" / "config.json").write_text(json.dumps(values.pop("mm_vision_config")))
    (source / "clip" / "preprocessor_config.json").write_text(json.dumps(values.pop("mm_image_processor_config")))
    save_file(encoder, source / "clip" / "model.safetensors", {"format": "pt"})
    values["mm_vision_tower"] = "clip"
    (source / "config.json").write_text(json.dumps(values))
    (source / "model.safetensors").unlink()
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # as old versions saved it
    names, index = list(state), {}
    for shard, part in enumerate((names[::2], names[1::2])):
        torch.save({name: state[name] for name in part}, source / f"pytorch_model-{shard}.bin")
        index |= {name: f"pytorch_model-{shard}.bin" for name in part}
    index = {"metadata": {}, "weight_map": index}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    run("--model-path", source, "--output", out)
    written = load_file(out / "model.safetensors")
    assert torch.equal(
        written["vision_tower.vision_model.pre_layrnorm.weight"], encoder["vision_model.pre_layrnorm.weight"]
    )
    assert len(written) == len(names) - 1 + len(encoder)


def test_memory_holds_one_shard(tmp_path, monkeypatch):
    """No tensor is read before its shard is due, and none is kept after it."""
    source = make(tmp_path, "qwen_next")
    weights = streaming.Weights(str(source))
    live, most = [], 0

    def reader(name):
        def read():
            nonlocal most
            value = weights.read(name)
            live.append((weakref.ref(value), value.nbytes))
            most = max(most, sum(size for held, size in live if held() is not None))
            return value

        return read

    targets = {n: streaming.Target(s.shape, s.dtype, reader(n)) for n, s in weights.stored.items()}
    total = streaming.write_shards(str(tmp_path), targets, "60KB")
    assert total == sum(target.bytes for target in targets.values())
    largest = max(target.bytes for target in targets.values())
    assert 0 < most <= max(60_000, largest) < total / 3


# --- when it writes nothing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type linear"),
        ({"mm_projector_type": "mlp2x_res1x_gelu"}, "mm_projector_type mlp2x_res1x_gelu"),
        ({"mm_patch_merge_type": "spatial"}, "anyres with mm_patch_merge_type spatial"),
        ({"mm_patch_merge_type": "spatial_unpad_nobase"}, "spatial_unpad_nobase"),
        ({"mm_patch_merge_type": "spatial_maxpool2x2"}, "maxpool2x2"),
        ({"mm_patch_merge_type": "flat"}, "mm_patch_merge_type flat"),
        ({"image_aspect_ratio": "pad"}, "image_aspect_ratio pad"),
        ({"mm_vision_select_feature": "cls_patch"}, "cls_patch"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        ({"use_token_compression": True, "compression_input_size": 24, "compression_output_size": 12}, "ToConv"),
        ({"s2": True, "s2_scales": "336,672"}, "CLIPS2|S2"),
        ({"mm_vision_select_feature": "slicefour_patch", "mm_vision_select_layer": -1}, "slicefour_patch"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
        ({"mm_vision_tower_type": "hevc_vit", "mm_vision_config": {"model_type": "llava_vit"}}, "HEVCViT"),
    ],
)
def test_what_transformers_has_no_class_for(changes, words, tmp_path, out, capsys):
    """Refused from the config alone: this folder holds no weights."""
    folder = tmp_path / "llava"
    shutil.copytree(golden.GOLDEN / "qwen_clip_anyres_unpad", folder)
    (folder / "model.safetensors").unlink()
    values = json.loads((folder / "config.json").read_text())
    clip = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 8, "num_attention_heads": 2}
    clip |= {"image_size": 336, "patch_size": 14, "model_type": "clip_vision_model"}
    values |= {"mm_vision_config": clip, "mm_image_processor_config": {"crop_size": {"height": 336, "width": 336}}}
    if "mm_vision_config" in changes:
        changes = changes | {"mm_vision_config": clip | changes["mm_vision_config"]}
    (folder / "config.json").write_text(json.dumps(values | changes))
    said = failure(capsys, "--model-path", folder, "--output", out)
    assert re.search(words, said) and "AutoModelForCausalLM" in said and "from llava.model import" in said


@pytest.mark.parametrize(
    "weight",
    [
        "model.image_newline",
        "model.mm_projector.2.bias",
        "model.layers.1.mlp.down_proj.weight",
        "lm_head.weight",
        "model.vision_tower.vision_tower.vision_model.encoder.layers.2.mlp.fc2.weight",
    ],
)
def test_a_weight_that_goes_wrong_leaves_nothing(weight, exported, out, capsys, monkeypatch):
    source = exported("qwen_next")[0]
    read = streaming.Weights.read
    monkeypatch.setattr(
        streaming.Weights, "read", lambda self, name: read(self, name) + (0.05 if name == weight else 0)
    )
    said = failure(capsys, "--model-path", source, "--output", out)
    assert "not the same model: " in said and "logits differ by" in said and not out.exists()


def test_a_weight_that_is_not_used_may_differ(exported, out, monkeypatch):
    """The layers behind the one that is selected, and the final norm."""
    read = streaming.Weights.read
    odd = ("encoder.layers.3.", "post_layernorm")
    monkeypatch.setattr(
        streaming.Weights, "read", lambda self, name: read(self, name) + any(part in name for part in odd)
    )
    run("--model-path", exported("qwen_next")[0], "--output", out)
    assert out.is_dir()


@pytest.mark.parametrize("what", ["prompt", "pixels", "tokens"])
def test_inputs_that_differ_leave_nothing(what, exported, out, capsys, monkeypatch):
    source = exported("qwen_onevision")[0]
    from llava.tools.hf import chat_template, configs, processor

    if what == "prompt":
        made = chat_template.chat_template
        monkeypatch.setattr(chat_template, "chat_template", lambda name: made(name).replace("helpful", "helpless"))
    elif what == "pixels":
        made_processor = processor.image_processor

        def darker(*args):
            found = made_processor(*args)
            found.image_mean = [0.4, 0.4, 0.4]
            return found

        monkeypatch.setattr(processor, "image_processor", darker)
    else:
        grid = configs.grid_hw
        monkeypatch.setattr(configs, "grid_hw", lambda *args: [pair[::-1] for pair in grid(*args)][:3])
    said = failure(capsys, "--model-path", source, "--output", out)
    words = {"prompt": "prompt is", "pixels": "pixels differ by", "tokens": "tokens, LLaVA's"}[what]
    assert "not the same model: picture of " in said and words in said


def test_what_is_there_stays(exported, out, capsys, monkeypatch):
    source = exported("qwen_next")[0]
    run("--model-path", source, "--output", out)
    before = (out / "config.json").read_text()
    assert "--overwrite" in failure(capsys, "--model-path", source, "--output", out)
    said = failure(capsys, "--model-path", source, "--output", source, "--overwrite")
    assert "holds the weights that are read" in said and (source / "model.safetensors").is_file()
    read = streaming.Weights.read
    monkeypatch.setattr(streaming.Weights, "read", lambda self, name: read(self, name) * 1.5)
    failure(capsys, "--model-path", source, "--output", out, "--overwrite")
    assert (out / "config.json").read_text() == before and len(load_file(out / "model.safetensors")) > 50
    monkeypatch.undo()
    run("--model-path", source, "--output", out, "--overwrite", "--dtype", "float32")


@pytest.mark.parametrize(
    "fault", ["device", "no folder", "adapter", "cut", "missing", "shape", "version", "size", "projector only"]
)
def test_bad_input(fault, exported, tmp_path, out, capsys):
    folder, arguments, weights = tmp_path / "llava", [], "model.safetensors"
    shutil.copytree(exported("qwen_next")[0], folder)
    state = load_file(folder / weights)
    if fault == "no folder":
        folder, words = tmp_path / "nowhere", "nowhere"
    elif fault == "adapter":
        (folder / "adapter_config.json").write_text("{}")
        words = "LoRA"
    elif fault == "cut":
        (folder / weights).write_bytes((folder / weights).read_bytes()[:-100])
        words = "not a whole safetensors file"
    elif fault == "missing":
        del state["model.image_newline"]
        save_file(state, folder / weights)
        words = "lacks 1 of .* weights, model.image_newline"
    elif fault == "shape":
        state["model.mm_projector.0.bias"] = torch.zeros(7)
        save_file(state, folder / weights)
        words = r"model.mm_projector.0.bias: found \(7,\), expected \(32,\)"
    elif fault == "version":
        arguments, words = ["--version", "qwen_15"], "did you mean 'qwen_1_5'"
    elif fault == "device":
        arguments, words = ["--device", "gpu"], "--device: found 'gpu', expected cpu"
    elif fault == "size":
        arguments, words = ["--max-shard-size", "huge"], "max_shard_size: found 'huge'"
    else:
        (folder / weights).rename(folder / "mm_projector.safetensors")
        words = "found no weights"
    assert re.search(words, failure(capsys, "--model-path", folder, "--output", out, *arguments))


# --- how it verifies --------------------------------------------------------------------------------------------------


def test_half_precision_where_float32_does_not_fit(tmp_path, out, capsys, monkeypatch):
    monkeypatch.setattr(verify, "available_memory", lambda device: 2**20)
    source = make(tmp_path, "qwen_next", torch.bfloat16)
    run("--model-path", source, "--output", out)
    printed = capsys.readouterr().out
    assert "verified in bfloat16" in printed and "limit 1.0e-04" not in printed
    assert load_file(out / "model.safetensors")["image_newline"].dtype == torch.bfloat16


def test_one_model_at_a_time(exported, monkeypatch):
    """When the second is loaded the first is gone."""
    monkeypatch.undo()  # with the collection, here
    source, folder, _ = exported("qwen_next")
    held, load = [], verify.load_hf
    generate = type(ours(source)[1]).generate

    def seen(model, *args, **kwargs):
        held.append(weakref.ref(model))
        return generate(model, *args, **kwargs)

    def loading(*args):
        assert held and not any(model() for model in held)
        held.append(None)
        return load(*args)

    monkeypatch.setattr("llava.model.llava_arch.LlavaMetaForCausalLM.generate", seen)
    monkeypatch.setattr(verify, "load_hf", loading)
    report = verify.verify(str(source), str(folder), "qwen_1_5", True, str(source))
    assert held[-1] is None and report.difference <= report.tolerance


@pytest.mark.parametrize(
    "dtype, logit, token, words",
    [
        ("float32", 5.00005, 7, None),
        ("float32", 5.001, 7, "logits differ by 1.0e-03, more than 1.0e-04, the most at row 1 of 2"),
        ("float32", float("nan"), 7, "logits differ by nan"),
        ("bfloat16", 5.1, 7, None),
        ("bfloat16", 5.2, 7, r"\(in bfloat16\): logits differ by 2.0e-01, more than 1.6e-01"),
        ("bfloat16", 5.0, 8, r"transformers answers \[8\], LLaVA \[7\]"),
    ],
)
def test_what_counts_as_the_same(dtype, logit, token, words):
    probe = probes.Probe("a question", None, "Hi")
    mine = {"logits": torch.tensor([[1.0, 2.0], [3.0, 5.0]]), "tokens": torch.tensor([7.0])}
    other = {"logits": torch.tensor([[1.0, 2.0, 99.0], [3.0, logit, 99.0]]), "tokens": torch.tensor([float(token)])}
    if words is None:
        assert verify._compare_outputs(probe, mine, other, dtype)[0] == pytest.approx(logit - 5, abs=1e-5)
    else:
        with pytest.raises(LlavaError, match=words):
            verify._compare_outputs(probe, mine, other, dtype)


def test_pictures_are_of_sizes_that_both_sides_round_alike():
    """328x205 is none: LLaVA-NeXT rounds 14.999999999999998 down, transformers to 15."""
    grid = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]
    assert not probes.rounding_agrees((328, 205), grid, 336, 24)
    sizes = [(w, h) for w in range(300, 340) for h in range(180, 220)]
    odd = [size for size in sizes if not probes.rounding_agrees(size, grid, 336, 24)]
    assert len(odd) < 5
    assert probes._nearest_that_agrees((328, 205), grid, 336, 24) == (329, 205)


def test_command_line_is_quick():
    code = (
        "import sys, llava.tools.export_hf, llava.tools.import_hf; print({'torch', 'transformers'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
    with pytest.raises(LlavaError, match="/nowhere/at/all: no config"):
        export("/nowhere/at/all", "/tmp/never")
