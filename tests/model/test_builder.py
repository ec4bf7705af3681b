"""`load_pretrained_model` on checkpoints of many shapes."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.errors import LlavaError
from llava.model.builder import context_length, load_pretrained_model, make_config, read_config
from llava.model.checkpoint import projector_state, save_projector
from llava.model.families import resolve_architecture
from tests.model import golden

SOURCE = golden.GOLDEN / "qwen_clip_anyres_unpad"
TOWER = "model.vision_tower."


def load(folder, base=None, name="llava-qwen", **kwargs):
    return load_pretrained_model(
        str(folder), base and str(base), name, **{"device_map": "cpu", "torch_dtype": "float32", **kwargs}
    )


def copied(folder, drop=(), config=None, weights=None):
    """Copy of a golden checkpoint without the weights whose names begin so, with changes to config and weights."""
    shutil.copytree(SOURCE, folder)
    state = load_file(folder / "model.safetensors")
    state = {k: v for k, v in state.items() if not drop or not k.startswith(drop)}
    state.update(weights or {})
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    values.update(config or {})
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))
    return folder


def same_weights(model, state, prefix=""):
    found = {k: v for k, v in model.state_dict().items() if k.startswith(prefix)}
    assert found
    return all(torch.equal(v, state[k]) for k, v in found.items())


@pytest.fixture(scope="module")
def weights():
    return load_file(SOURCE / "model.safetensors")


def test_without_tower_weights_they_come_from_the_folder(tmp_path, weights):
    """As LLaVA saves a run with a frozen tower; `mm_vision_tower` is a path inside the checkpoint."""
    source = load_file(SOURCE / "clip_tower" / "model.safetensors")
    source = {k: v + 1 for k, v in source.items()}  # so that they differ from those in the checkpoint
    folder = copied(tmp_path / "llava-qwen", drop=TOWER)
    save_file(source, folder / "clip_tower" / "model.safetensors", {"format": "pt"})
    tokenizer, model, processor, _ = load(folder)
    assert model.get_vision_tower().is_loaded and processor.crop_size["height"] == 56
    tower = {k.split("vision_model.")[-1]: v for k, v in model.get_vision_tower().state_dict().items()}
    bare = {k.removeprefix("vision_model."): v for k, v in source.items()}
    assert len(tower) > 40 and all(torch.equal(tower[key], bare[key]) for key in tower)
    assert same_weights(model, weights, "model.layers") and same_weights(model, weights, "model.mm_projector")
    half = load(folder, torch_dtype="bfloat16")[1]
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    # what is saved from there holds them
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert same_weights(load(tmp_path / "saved")[1], model.state_dict())


def test_tower_in_the_checkpoint_needs_no_folder(tmp_path, weights):
    """Once it was saved here: its config and its image processor lie in config.json."""
    tokenizer, model, processor, _ = load(SOURCE)
    model.save_pretrained(tmp_path / "llava-qwen")
    tokenizer.save_pretrained(tmp_path / "llava-qwen")
    values = json.loads((tmp_path / "llava-qwen" / "config.json").read_text())
    values["mm_vision_tower"] = "/nowhere/clip"
    (tmp_path / "llava-qwen" / "config.json").write_text(json.dumps(values))
    _, again, processor_again, _ = load(tmp_path / "llava-qwen")
    half = load(tmp_path / "llava-qwen", torch_dtype="bfloat16")[1]
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}  # though the tower's config says float32
    assert same_weights(again, weights) and processor_again.to_dict() == processor.to_dict()
    assert (tmp_path / "llava-qwen" / "preprocessor_config.json").is_file()


@pytest.mark.parametrize(
    "drop, words",
    [
        ("model.mm_projector", "lacks 4 weights.*model.mm_projector.0.bias"),
        ("model.layers.1.mlp", "lacks 3 weights.*model.layers.1.mlp.down_proj.weight"),
        ("lm_head", "lacks 1 weights.*lm_head.weight"),
        ("model.image_newline", "model.image_newline"),
        (TOWER + "vision_tower.vision_model.pre_layrnorm", "lacks 2 of its vision tower's 55 weights"),
    ],
)
def test_weights_that_lack_are_not_made_up(tmp_path, drop, words):
    with pytest.raises(LlavaError, match=words) as fault:
        load(copied(tmp_path / "llava-qwen", drop=drop))
    assert "\n" not in str(fault.value)


# --- a projector over a language model ---


def projector_folder(folder, kind, drop=(), config=None, **extra):
    """What stage 1 leaves: config.json and the projector alone."""
    folder.mkdir()
    shutil.copytree(SOURCE / "clip_tower", folder / "clip_tower")
    values = {**json.loads((SOURCE / "config.json").read_text()), **(config or {})}
    (folder / "config.json").write_text(json.dumps(values))
    model = golden.load(SOURCE)[1]
    state = {k: v + 1 for k, v in projector_state(model.named_parameters()).items() if not drop or drop not in k}
    if kind == "bin":
        torch.save({**state, **extra}, folder / "mm_projector.bin")
    else:
        save_projector({**state, **extra}, str(folder))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The language model under it: a plain Qwen2 of transformers."""
    folder = tmp_path_factory.mktemp("base-qwen")
    for path in SOURCE.glob("*token*"):
        shutil.copy(path, folder)
    values = json.loads((SOURCE / "config.json").read_text())
    plain = {k: v for k, v in values.items() if not k.startswith(("mm_", "image_"))}
    (folder / "config.json").write_text(
        json.dumps({**plain, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]})
    )
    state = load_file(SOURCE / "model.safetensors")
    lm = {k: v for k, v in state.items() if not k.startswith((TOWER, "model.mm_projector", "model.image_newline"))}
    save_file(lm, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_projector_over_a_base(tmp_path, base, weights, kind):
    folder = projector_folder(tmp_path / "llava-projector", kind)
    tokenizer, model, processor, _ = load(folder, base)
    assert type(model).__name__ == "LlavaQwenForCausalLM" and processor is not None and len(tokenizer) > 300
    for name in ("mm_projector.0.weight", "mm_projector.2.bias", "image_newline"):
        assert torch.equal(model.model.get_parameter(name), weights[f"model.{name}"] + 1)
    assert same_weights(model, weights, "model.layers") and same_weights(model, weights, "lm_head")
    source = load_file(SOURCE / "clip_tower" / "model.safetensors")
    found = model.get_vision_tower().state_dict()
    assert all(
        torch.equal(v, found["vision_tower.vision_model." + k.removeprefix("vision_model.")])
        for k, v in source.items()
        if "position_ids" not in k
    )
    assert load(folder, base, torch_dtype="bfloat16")[1].model.mm_projector[0].weight.dtype == torch.bfloat16


def test_faults_of_a_projector(tmp_path, base):
    empty = projector_folder(tmp_path / "a", "safetensors")
    (empty / "mm_projector.safetensors").unlink()
    with pytest.raises(LlavaError, match=r"no mm_projector\.safetensors or mm_projector\.bin"):
        load(empty, base)
    with pytest.raises(LlavaError, match=r"mm_projector\.safetensors: no image_newline"):
        load(projector_folder(tmp_path / "b", "safetensors", drop="newline"), base)
    with pytest.raises(LlavaError, match=r"does not fit mm_projector_type mlp2x_gelu: 2\.bias is missing"):
        load(projector_folder(tmp_path / "c", "bin", drop="2.bias"), base)
    with pytest.raises(LlavaError, match="does not fit mm_projector_type mlp3x_gelu"):
        load(projector_folder(tmp_path / "d", "bin", config={"mm_projector_type": "mlp3x_gelu"}), base)


class Code:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_is_unpickled(tmp_path, base):
    folder = projector_folder(tmp_path / "llava-projector", "bin", code=Code(tmp_path / "ran"))
    with pytest.raises(LlavaError, match=r"mm_projector\.bin: not a file of plain tensors"):
        load(folder, base)
    whole = copied(tmp_path / "llava-qwen")
    (whole / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Code(tmp_path / "ran")}, whole / "pytorch_model.bin")
    with pytest.raises(LlavaError, match="no usable weights"):
        load(whole)
    assert not (tmp_path / "ran").exists()
    torch.save(load_file(SOURCE / "model.safetensors"), whole / "pytorch_model.bin")  # tensors alone are welcome
    assert same_weights(load(whole)[1], load_file(SOURCE / "model.safetensors"))


# --- config, dtype, tokens ---


def test_float16_on_a_cpu(capsys):
    model = load(SOURCE, torch_dtype="float16")[1]
    assert model.dtype == torch.float32 and "float16 on CPU: loading in float32 instead" in capsys.readouterr().out
    assert load(SOURCE, torch_dtype=torch.bfloat16, device_map="auto")[1].dtype == torch.bfloat16
    with pytest.raises(LlavaError, match="torch_dtype: found 'float12'"):
        load(SOURCE, torch_dtype="float12")


def test_config_from_outside():
    model = load(SOURCE, overwrite_config={"mm_patch_merge_type": "spatial", "image_aspect_ratio": "pad"})[1]
    assert model.config.mm_patch_merge_type == "spatial" and model.config.image_aspect_ratio == "pad"
    from llava.model.language_model.llava_qwen import LlavaQwenConfig

    config = make_config(str(SOURCE), LlavaQwenConfig, read_config(str(SOURCE)))
    config.mm_newline_position = "frame"
    model = load(SOURCE, customized_config=config, overwrite_config={"mm_spatial_pool_mode": "max"})[1]
    assert (model.config.mm_newline_position, model.config.mm_spatial_pool_mode) == ("frame", "max")
    assert model.config.image_aspect_ratio == "anyres"
    assert load(SOURCE, attn_implementation=None)[1].config._attn_implementation == "sdpa"
    assert load(SOURCE, attn_implementation="eager")[1].config._attn_implementation == "eager"
    assert load(SOURCE, multimodal=True)[1] is not None  # as LLaVA-NeXT's evaluation calls it


def test_conversation_template():
    assert load(SOURCE)[1].config.conversation_template == "qwen_1_5"
    assert load(SOURCE, overwrite_config={"conversation_template": "v1"})[1].config.conversation_template == "v1"
    for name, template in (("llama_clip_pad_flat", "v1"), ("mistral_clip_anyres_unpad", "mistral_instruct")):
        assert golden.load(golden.GOLDEN / name)[1].config.conversation_template == template


def test_embeddings_are_never_shrunk(tmp_path, weights):
    """More rows than the tokenizer has tokens, as published models have them."""
    names = ("lm_head.weight", "model.embed_tokens.weight")
    big = {name: torch.cat([weights[name], weights[name][:17] + 1]) for name in names}
    rows = len(big["lm_head.weight"])
    folder = copied(tmp_path / "llava-qwen", weights=big, config={"vocab_size": rows})
    tokenizer, model, _, _ = load(folder)
    assert len(tokenizer) == rows - 17 and "<im_patch>" not in tokenizer.get_vocab()
    assert model.config.vocab_size == rows and all(torch.equal(model.get_parameter(n), big[n]) for n in names)
    # LLaVA's tokens, asked for by what config.json says or does not say, take rows that were free
    config = {"vocab_size": rows, "mm_use_im_patch_token": ..., "mm_use_im_start_end": True}
    tokenizer, model, _, _ = load(copied(tmp_path / "more-qwen", weights=big, config=config))
    assert {"<im_patch>", "<im_start>", "<im_end>"} <= tokenizer.get_vocab().keys() and len(tokenizer) == rows - 14
    assert model.config.vocab_size == rows and all(torch.equal(model.get_parameter(n), big[n]) for n in names)


def test_embeddings_grow_to_the_tokenizer(tmp_path, weights):
    size = len(load(SOURCE)[0])
    small = {key: weights[key][:size].clone() for key in ("lm_head.weight", "model.embed_tokens.weight")}
    folder = copied(tmp_path / "llava-qwen", weights=small, config={"vocab_size": size, "mm_use_im_start_end": True})
    tokenizer, model, _, _ = load(folder)
    assert len(tokenizer) == size + 2 == model.config.vocab_size == model.lm_head.out_features
    embeddings = model.get_input_embeddings().weight
    assert embeddings.shape[0] == size + 2 and torch.equal(embeddings[:size], small["model.embed_tokens.weight"])
    ids = torch.tensor([[size, size + 1]])
    assert torch.isfinite(model(ids).logits).all()
    spread = (embeddings[size:] - embeddings[:size].mean(0)).abs().max()  # they start near the mean of the others
    assert spread < embeddings[:size].std()


def test_context_length():
    assert load(SOURCE)[3] == 4096
    assert load(SOURCE, overwrite_config={"max_sequence_length": 77})[3] == 77
    assert context_length(SimpleNamespace(tokenizer_model_max_length=99)) == 99
    assert context_length(SimpleNamespace()) == 2048


# --- which class ---


@pytest.mark.parametrize(
    "config, names, expected",
    [
        ({"architectures": ["LlavaMistralForCausalLM"], "model_type": "llava"}, ["x"], "LlavaMistralForCausalLM"),
        ({"architectures": ["LlavaQwenForCausalLM"], "model_type": "llava_llama"}, ["x"], "LlavaQwenForCausalLM"),
        ({"architectures": ["Other"], "model_type": "llava_mistral"}, ["llava-qwen"], "LlavaMistralForCausalLM"),
        ({"model_type": "llava_qwen3"}, [], "LlavaQwen3ForCausalLM"),
        ({"model_type": "qwen2"}, [], "LlavaQwenForCausalLM"),
        ({"model_type": "llava"}, ["llava-v1.6-vicuna-7b"], "LlavaLlamaForCausalLM"),
        ({"model_type": "llava"}, ["llava-v1.6-mistral-7b"], "LlavaMistralForCausalLM"),
        ({"model_type": "llava"}, ["llava-next-interleave-qwen-7b"], "LlavaQwenForCausalLM"),
        ({"model_type": "llava"}, ["llava-Qwen3-8B"], "LlavaQwen3ForCausalLM"),
        ({"model_type": "llava"}, ["llama3-llava-next-8b"], "LlavaLlamaForCausalLM"),
        ({"model_type": "llava"}, ["llava-v1.6-34b"], "LlavaLlamaForCausalLM"),
        ({"model_type": "llava"}, ["run", "/models/vicuna-7b"], "LlavaLlamaForCausalLM"),
        ({"model_type": "llava", "_name_or_path": "x/qwen"}, [None], "LlavaQwenForCausalLM"),
        ({}, ["zephyr-7b"], "LlavaMistralForCausalLM"),
        ({"model_type": "gemma2"}, [], "LlavaGemma2ForCausalLM"),
        ({"model_type": "llava"}, ["llava-v1.6-gemma-2-9b"], "LlavaGemma2ForCausalLM"),
    ],
)
def test_architecture(config, names, expected):
    assert resolve_architecture(config, *names) == expected


def test_faults_are_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    broken = copied(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no such thing" * 9)
    bare = copied(tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    mute = copied(tmp_path / "mute")
    for path in mute.glob("tokenizer*"):
        path.unlink()
    lora = copied(tmp_path / "lora")
    (lora / "adapter_config.json").write_text("{}")
    homeless = copied(tmp_path / "homeless")
    shutil.rmtree(homeless / "clip_tower")
    typeless = copied(tmp_path / "typeless", config={"architectures": ["BertModel"], "model_type": "bert"})
    nameless = copied(tmp_path / "nameless", config={"architectures": None, "model_type": "llava"})
    unreadable = copied(tmp_path / "unreadable")
    (unreadable / "config.json").write_text("{")
    for folder, words in {
        tmp_path / "empty": "no config.json",
        tmp_path / "absent": "no config.json",
        unreadable: "config.json",
        broken: "no usable weights",
        bare: "no usable weights",
        mute: "no tokenizer",
        lora: "found peft_type None, expected LORA",
        homeless: "vision tower 'clip_tower'",
        typeless: "model_type 'bert'",
        nameless: "cannot tell the language model",
    }.items():
        with pytest.raises(LlavaError) as fault:
            load(folder, name="run")
        assert words in str(fault.value) and "\n" not in str(fault.value) and len(str(fault.value)) < 500


@pytest.mark.skipif(torch.cuda.is_available(), reason="speaks of machines without a GPU")
def test_quantisation_needs_its_package():
    with pytest.raises(LlavaError, match="bitsandbytes"):
        load(SOURCE, load_4bit=True)


def test_a_saved_llama_tokenizer_is_the_same(tmp_path):
    """transformers 5 forgets `legacy`, and with it the blank behind </s>, when it saves."""
    from llava.mm_utils import tokenizer_image_token
    from llava.model.builder import load_tokenizer

    source = golden.GOLDEN / "tokenizer_llama"
    first = load_tokenizer(str(source))
    first.save_pretrained(tmp_path / "once")
    load_tokenizer(str(tmp_path / "once")).save_pretrained(tmp_path / "twice")
    prompt = "USER: <image>\nhi ASSISTANT: a cat</s>USER: and <image> ASSISTANT:"
    expected = tokenizer_image_token(prompt, first)
    for folder in ("once", "twice"):
        assert tokenizer_image_token(prompt, load_tokenizer(str(tmp_path / folder))) == expected
