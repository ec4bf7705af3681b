"""Checkpoints in transformers' own format, and names behind which there is no checkpoint."""

import json
import shutil

import pytest
import transformers

from llava.errors import LlavaError, OutOfReach
from llava.families import FAMILIES, family_of
from llava.model import foreign
from llava.model.builder import load_pretrained_model, load_tokenizer, read_config
from llava.model.families import resolve_architecture
from llava.model.language_model.llava_qwen import LlavaQwenForCausalLM
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.places import is_hub_id, not_there
from llava.tools.hf.layouts import FORMATS
from tests.model.golden import GOLDEN

SOURCE = GOLDEN / "qwen_clip_anyres_unpad"


def stock(folder, name: str, **changes):
    """The folder of one of transformers' own models, without weights."""
    config = getattr(transformers, f"{name}Config")()
    config.architectures = [f"{name}ForConditionalGeneration"]
    config.save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))
    return folder


def load(path, base=None, **options):
    return load_pretrained_model(path, base, "llava_qwen", device_map="cpu", torch_dtype="float32", **options)


def refusal(call) -> str:
    with pytest.raises(LlavaError) as fault:
        call()
    assert "\n" not in str(fault.value)
    return str(fault.value)


def test_tables_are_those_of_the_rooms_above():
    assert set(foreign.IMPORTABLE) == FORMATS.keys()
    assert set(foreign.OTHER_FAMILIES) == FAMILIES.keys() - {"llava"}


@pytest.mark.parametrize("name", ["Llava", "LlavaNext", "LlavaOnevision"])
def test_what_can_be_imported_is_told_how(tmp_path, name):
    folder = str(stock(tmp_path / "hf", name))
    ways = [
        lambda: load(folder),
        lambda: load(str(SOURCE), folder),
        lambda: LlavaQwenForCausalLM.from_pretrained(folder),
        lambda: family_of(folder).load(folder),
        lambda: resolve_architecture(read_config(folder), "llava-v1.5-7b", path=folder),
    ]
    for way in ways:
        said = refusal(way)
        assert f"python -m llava.tools.import_hf --model-path {folder} " in said
        assert f"{name}ForConditionalGeneration in the format of transformers" in said


@pytest.mark.parametrize(
    "name", ["LlavaNextVideo", "VipLlava", "VideoLlava", "Mllama", "Idefics3", "InternVL", "PaliGemma", "Gemma3"]
)
def test_what_cannot_be_says_what_is_taken(tmp_path, name):
    folder = str(stock(tmp_path / "llava-hf", name))
    for way in (lambda: load(folder), lambda: LlavaQwenForCausalLM.from_pretrained(folder)):
        said = refusal(way)
        assert f"{name}ForConditionalGeneration" in said and "import_hf" in said and "LlavaQwenForCausalLM" in said


def test_other_parts_than_import_hf_takes(tmp_path):
    folder = stock(tmp_path / "hf", "LlavaNext", text_config={"model_type": "phi3"})
    assert "with phi3 and" in refusal(lambda: load(str(folder)))


def test_a_family_of_its_own_is_named(tmp_path):
    assert "family_of" in refusal(lambda: load(str(stock(tmp_path / "hf", "Qwen2VL"))))


@pytest.mark.parametrize(
    "values",
    [
        {"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava"},  # as published
        {"architectures": ["LlavaQwenForCausalLM"], "model_type": "llava_qwen", "vision_config": {}},
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
        {"architectures": None, "model_type": "llava_mistral"},
        {"model_type": "llava"},  # its name tells
    ],
)
def test_llavas_own_are_none_of_them(values):
    foreign.refuse_foreign(values, "here")


# --- names ---

MISSING = ["./checkpoints/foo", "/abs/none", "a/b/c", "../none", "llava/", "~/llava", "C:/llava", "a b"]


@pytest.mark.parametrize("name", MISSING)
def test_a_path_that_does_not_exist_is_said_not_to(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tower = {"mm_vision_tower": name, "mm_vision_select_layer": -2}
    ways = [
        lambda: load(name),
        lambda: load(str(SOURCE), name),
        lambda: LlavaQwenForCausalLM.from_pretrained(name),
        lambda: load_tokenizer(name),
        lambda: build_vision_tower(tower),
        lambda: build_vision_tower(tower | {"mm_vision_tower": name + "clip"}),
        lambda: load(str(SOURCE), overwrite_config={"mm_vision_tower": name}),
    ]
    for way in ways:
        said = refusal(way)
        assert "no such folder" in said and name in said and "huggingface.co" not in said


def test_what_is_there_and_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.bin").write_text("x")
    for name, text in {"broken": "{", "list": "[1]", "bytes": b"\xff\xfe\x00", "nothing": "{}"}.items():
        shutil.copytree(SOURCE, tmp_path / name)
        (tmp_path / name / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    shutil.copytree(SOURCE, tmp_path / "bare")
    (tmp_path / "bare/config.json").unlink()
    said = {name: refusal(lambda name=name: load(name)) for name in ("empty", "file.bin", "broken", "list", "bytes")}
    assert "the folder is empty" in said["empty"] and "it is a file" in said["file.bin"]
    assert all("config.json" in said[name] for name in ("broken", "list", "bytes"))
    assert "cannot be read as JSON" in said["broken"] and "expected a mapping" in said["list"]
    assert "holds no config.json" in refusal(lambda: load("bare"))
    assert "expected a mapping" in refusal(lambda: load("nothing"))
    assert "an empty name" in refusal(lambda: load(""))
    assert "no such folder" in refusal(lambda: load(tmp_path / "none"))
    (tmp_path / "outer").mkdir()
    shutil.copytree(SOURCE, tmp_path / "outer/inner")
    assert read_config("outer", subfolder="inner")["mm_vision_tower"] == "clip_tower"
    assert "the folder is empty" in refusal(lambda: load_tokenizer("empty"))
    assert "it is a file" in refusal(lambda: load_tokenizer("file.bin"))
    assert "it is a file" in refusal(lambda: build_vision_tower({"mm_vision_tower": "file.bin"}))
    assert "the folder is empty" in refusal(lambda: build_vision_tower({"mm_vision_tower": "empty"}))


def test_a_hub_id_offline_is_told_how_to_be_had(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, way in {
        "org/model": lambda: load("org/model"),
        "org/base": lambda: load(str(SOURCE), "org/base"),
        "org/clip-vit": lambda: build_vision_tower({"mm_vision_tower": "org/clip-vit"}),
        "org/tokenizer": lambda: load_tokenizer("org/tokenizer"),
    }.items():
        said = refusal(way)
        assert f"`hf download {name}`" in said and "HF_HUB_OFFLINE" in said
    assert is_hub_id("org/model") and not is_hub_id("./org/model")
    (tmp_path / "org").mkdir()  # what looks like an id is then more likely a path
    assert "org/model: no config.json: no such folder, nor" in refusal(lambda: load("org/model"))


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("We couldn't connect to 'https://huggingface.co'", "cannot be reached"),
        ("You are trying to access a gated repo.", "hf auth login"),
        ("x is not a valid model identifier listed on the hub", "not a valid model identifier"),
        ("", "the hub has none"),
    ],
)
def test_what_the_hub_says(monkeypatch, reason, words):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    fault = not_there(
        "org/model", "org/model: no config.json", "a checkpoint", OSError(f"{reason}\nmore" if reason else "")
    )
    assert isinstance(fault, OutOfReach) and words in str(fault) and "\n" not in str(fault)


# --- another tower in place of the checkpoint's ---


def clip(folder, **sizes):
    made = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.CLIPVisionConfig(**made | {"image_size": 56, "patch_size": 14} | sizes)
    transformers.CLIPVisionModel(config).save_pretrained(folder)
    square = {"height": config.image_size, "width": config.image_size}
    size = {"shortest_edge": config.image_size}
    transformers.CLIPImageProcessorPil(size=size, crop_size=square).save_pretrained(folder)
    return str(folder)


def test_a_tower_of_other_sizes_is_told_with_both(tmp_path):
    wide = clip(tmp_path / "wide", hidden_size=48)
    said = refusal(lambda: load(str(SOURCE), overwrite_config={"mm_vision_tower": wide}))
    assert wide in said and "tokens of 48 channels, the projector takes 64" in said
    large = clip(tmp_path / "large", image_size=84)
    said = refusal(lambda: load(str(SOURCE), overwrite_config={"mm_vision_tower": large}))
    assert "36 tokens of an image (84 pixels), the checkpoint's 16 (56 pixels)" in said


def test_the_same_tower_elsewhere_is_taken(tmp_path, capsys):
    shutil.copytree(SOURCE / "clip_tower", tmp_path / "clip")
    model = load(str(SOURCE), overwrite_config={"mm_vision_tower": str(tmp_path / "clip")})[1]
    own = load(str(SOURCE))[1]
    assert all(map(lambda a, b: a.equal(b), model.state_dict().values(), own.state_dict().values()))
    assert "in place of clip_tower" in capsys.readouterr().out
