"""A LLaVA model in pieces on several devices. "meta" stands for another device here: no operation mixes it with the
CPU's tensors, and everything can be moved to it."""

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate import init_empty_weights
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from transformers.integrations.accelerate import infer_auto_device_map

from llava.model.builder import load_pretrained_model
from llava.model.language_model.llava_qwen import LlavaQwenConfig, LlavaQwenForCausalLM
from llava.model.multimodal_encoder.builder import TOWERS
from tests import tiny
from tests.model import golden, small

SOURCE = str(golden.GOLDEN / "qwen_clip_anyres_unpad")
PARTS = ("vision_tower", "mm_projector", "image_newline", "embed_tokens")
IDS = torch.tensor([[5, -200, 7, 11, 13]])
IMAGES = {"images": [torch.linspace(-1, 1, 5 * 3 * 56 * 56).reshape(5, 3, 56, 56)], "image_sizes": [(100, 60)]}


@pytest.fixture(scope="module")
def model():
    return load(device_map="cpu")


def load(**kwargs):
    return load_pretrained_model(SOURCE, None, "llava-qwen", torch_dtype="float32", **kwargs)[1]


def moved(model, parts):
    """A copy with these parts on "meta", called as accelerate lets them be called."""
    model = copy.deepcopy(model)
    inner = model.get_model()
    for name in parts:
        part = getattr(inner, name)
        if name == "image_newline":
            inner.image_newline = torch.nn.Parameter(part.to("meta"))
        else:
            add_hook_to_module(part.to("meta"), AlignDevicesHook("meta"))
    return model


# from "meta" nothing comes back, so what is there is the end of a chain
@pytest.mark.parametrize(
    "there",
    [
        (),
        PARTS[3:],
        ("mm_projector", "embed_tokens"),
        PARTS[1:],
        ("vision_tower", *PARTS[1:]),
        ("vision_tower", "mm_projector", "embed_tokens"),
    ],
    ids="+".join,
)
def test_pieces_on_two_devices(model, there):
    rest = {"labels": IDS, "modalities": ["image"], **IMAGES}
    mask = torch.ones_like(IDS)
    expected = model.prepare_inputs_labels_for_multimodal(IDS, None, mask, None, **rest)
    merged = moved(model, there).prepare_inputs_labels_for_multimodal(IDS, None, mask, None, **rest)
    _, _, mask, _, embeds, labels = merged
    assert {tensor.device.type for tensor in (mask, embeds, labels)} == {"meta" if there else "cpu"}
    assert embeds.shape == expected[4].shape and labels.shape == expected[5].shape


def test_the_merge_of_a_batch_without_images_takes_the_anchor_along(model, monkeypatch):
    """A rank without images: what it adds lies where the language model does."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    pieces = moved(model, ("mm_projector", "embed_tokens")).train()
    embeds = pieces.prepare_inputs_labels_for_multimodal(torch.tensor([[5, 7]]), None, None, None, None, [])[4]
    assert embeds.device.type == "meta"


@pytest.mark.parametrize("offloaded", ["vision_tower", "mm_projector", "embed_tokens", "layers.0"])
def test_offloaded_weights_give_the_same(model, offloaded, tmp_path):
    inner = model.get_model()
    parts = [*(name for name, _ in inner.named_children() if name != "layers"), "image_newline"]
    parts += [f"layers.{number}" for number in range(len(inner.layers))]
    places = {f"model.{part}": "disk" if part == offloaded else "cpu" for part in parts} | {"lm_head": "cpu"}
    pieces = load(device_map=places, offload_folder=str(tmp_path))
    assert any(parameter.device.type == "meta" for parameter in pieces.parameters())
    asked = {**IMAGES, "max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found, expected = (made.generate(IDS, **asked).logits for made in (pieces, model))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
@pytest.mark.parametrize("kind", TOWERS)
def test_what_a_map_over_devices_splits(kind, devices, tmp_path):
    """Neither a tower nor a layer, whatever the devices hold: their forwards take all of their weights at once."""
    tower = tiny.tower(tmp_path / "tower", kind)
    settings = {"s2_scales": f"{tiny.SIDE},{2 * tiny.SIDE}"} if kind == "clip_s2" else {}
    with init_empty_weights():
        made = small.model(tower, mm_vision_tower_type=kind, mm_patch_merge_type="spatial_unpad", **settings)
    sizes = {"tower": bytes_of(made.get_vision_tower()), "layer": bytes_of(made.get_model().layers[0])}
    least = int(1.1 * max(bytes_of(made) / devices + sizes["layer"], sizes["tower"]))
    held = infer_auto_device_map(
        made, dict.fromkeys(range(devices), least) | {"cpu": bytes_of(made)}, made._no_split_modules
    )
    tower_parts = {
        place for name, place in held.items() if name.startswith("model.vision_tower") or name in ("", "model")
    }
    assert len(tower_parts) == 1
    assert not any(name.startswith(f"model.layers.{n}.") for n in range(8) for name in held)
    if devices > 1:
        assert len(set(held.values())) > 1
    layers = {name for name in made.get_vision_tower().no_split_modules if name.endswith(("Layer", "Block"))}
    assert layers and layers <= {type(module).__name__ for module in made.get_vision_tower().modules()}


def bytes_of(module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def test_new_vision_modules_join_the_language_model(tmp_path):
    """bitsandbytes has put a quantised one on its GPU, and Trainer then moves nothing."""
    config = LlavaQwenConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlavaQwenForCausalLM(config).to("meta")
    args = SimpleNamespace(
        vision_tower=tiny.tower(tmp_path / "clip"), mm_projector_type="mlp2x_gelu", mm_patch_merge_type="spatial_unpad"
    )
    args.mm_vision_select_layer, args.mm_vision_select_feature = -2, "patch"
    args.use_token_compression, args.compression_input_size, args.compression_output_size = True, 2, 1
    model.get_model().initialize_vision_modules(args)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert any("token_compressor" in name for name, _ in model.named_parameters())
