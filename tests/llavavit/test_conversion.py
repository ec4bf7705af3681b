"""Weights and configs between the layouts, and `from_pretrained` of every model from every layout's folder."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llavavit import (
    SIZES,
    LlavaViTConfig,
    LlavaViTModel,
    LlavaViTPackingConfig,
    LlavaViTPackingModel,
    OneVisionEncoderConfig,
    OneVisionEncoderModel,
)
from llavavit.conversion import (
    LAYOUTS,
    SOURCE_EPS,
    clean_state_dict,
    convert_config,
    convert_state_dict,
    detect_layout,
    infer_config,
    read_weights,
)
from tests.support.vit.golden import TINY, TINY_SIZE, golden_folder, golden_state, same, source_state
from tests.support.vit.published import GOLDEN_FOLDERS

STATES = {"source": source_state, "padded": golden_state, "packed": lambda: golden_state("llava_vit_packing")}
MODELS = (LlavaViTModel, LlavaViTPackingModel, OneVisionEncoderModel)


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("to", LAYOUTS)
def test_every_layout_becomes_every_other_exactly_and_back(layout, to):
    state = STATES[layout]()
    converted = convert_state_dict(state, to)
    assert detect_layout(state) == layout and detect_layout(converted) == to
    assert same(converted, STATES[to]())  # padded and packed are two published files
    assert same(convert_state_dict(converted, layout), state)


def test_source_names_are_those_of_training():
    layer = ["ln_1", "ln_2", "attn.in_proj", "attn.out_proj", "mlp.0", "mlp.2"]
    head = ["attention.out_proj", "mlp.fc1", "mlp.fc2"]
    modules = ["ln_pre", "ln_post", *[f"transformer.layers.{i}.{part}" for i in range(3) for part in layer]]
    modules += [f"head.{part}" for part in head]
    expected = {f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")}
    expected |= {"conv1.weight", "head.probe", "head.norm.weight"}
    expected |= {"head.attention.in_proj_weight", "head.attention.in_proj_bias"}
    assert source_state().keys() == expected


def test_wrappers_prefixes_nests_and_rotary_buffers_are_taken_off():
    state = source_state()
    wrapped = {f"module._orig_mod.{name}": value for name, value in state.items()}
    wrapped |= {"module.video_rope.inv_freq_t": torch.ones(4), "_orig_mod.rotary_emb.inv_freq": torch.ones(2)}
    assert same(clean_state_dict({"epoch": 3, "model": {"state_dict": wrapped}}), state)
    assert same(clean_state_dict({"state_dict": wrapped, "optimizer": {}}), state)


def without(name):
    return {key: value for key, value in golden_state().items() if key != name}


Q, K = "encoder.layers.1.self_attn.q_proj.weight", "encoder.layers.1.self_attn.k_proj.bias"


@pytest.mark.parametrize(
    ("state", "to", "expected"),
    [
        (lambda: golden_state() | {"encoder.norm.weight": torch.ones(1)}, "source", r"'encoder\.norm\.weight'.*padded"),
        (lambda: source_state() | {"class_embedding": torch.ones(1)}, "packed", "'class_embedding'.*source layout"),
        (lambda: without(Q), "packed", rf"without '{re.escape(Q)}'"),
        (lambda: without(K), "source", rf"without '{re.escape(K)}'"),
        (lambda: golden_state() | {K: torch.ones(63)}, "packed", r"k_proj\.bias \(63,\).*expected one shape"),
        (
            lambda: golden_state("llava_vit_packing") | {"encoder.layers.0.self_attn.qkv.bias": torch.ones(191)},
            "padded",
            "191 rows, expected a multiple of 3",
        ),
        (lambda: {"fc.weight": torch.ones(1)}, "padded", "1 names without a patch embedding"),
        (golden_state, "onnx", "layout: found 'onnx', expected one of source, padded, packed"),
    ],
)
def test_weights_that_are_no_encoders_are_named(state, to, expected):
    with pytest.raises(ValueError, match=expected) as error:
        convert_state_dict(state(), to)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("state", [{"a": 3, "conv1.weight": torch.ones(1)}, [torch.ones(1)]])
def test_what_is_no_tensors_by_name_is_refused(state):
    with pytest.raises(ValueError, match=r"expected (a tensor|tensors by name)"):
        clean_state_dict(state)


# --- configs ----------------------------------------------------------------------------------------------------------


def on_meta(config_class, model_class, size):
    with torch.device("meta"):
        return model_class(config_class(**size)).state_dict()


@pytest.mark.parametrize("name", SIZES)
def test_real_sizes_are_told_by_their_weights(name):
    for size in SIZES[name]:
        packed = on_meta(LlavaViTPackingConfig, LlavaViTPackingModel, size)
        padded = on_meta(LlavaViTConfig, LlavaViTModel, size)
        mapped = convert_state_dict(padded, "packed")
        assert {k: v.shape for k, v in mapped.items()} == {k: v.shape for k, v in packed.items()}
        config = infer_config(convert_state_dict(padded, "source"), LlavaViTPackingConfig, name, image_size=56)
        assert size.items() <= vars(config).items() and config.image_size == 56
        assert SOURCE_EPS.items() <= vars(config).items()
        assert infer_config(packed).layer_norm_eps == 1e-6  # converted weights have the eps of published configs
        other = "hf_llava_vit_base_ln" if name != "hf_llava_vit_base_ln" else "hf_llava_vit_huge_ln"
        with pytest.raises(ValueError, match=f"expected {other}: .*{SIZES[other][-1]['intermediate_size']}"):
            infer_config(packed, model_name=other)


def test_shapes_of_no_published_size_need_a_config(monkeypatch):
    with pytest.raises(ValueError, match=r"'hidden_size': 64.*expected a size of hf_llava_vit_small_ln.*or a config"):
        infer_config(source_state())
    with pytest.raises(ValueError, match="model name: found 'large'"):
        infer_config(source_state(), model_name="large")
    with pytest.raises(ValueError, match="expected an encoder's"):
        infer_config({"conv1.weight": torch.ones(4, 3, 2, 2)})
    monkeypatch.setitem(SIZES, TINY, (TINY_SIZE | {"num_hidden_layers": 4}, TINY_SIZE))
    headless = {name: value for name, value in source_state().items() if not name.startswith(("head.", "ln_post"))}
    assert infer_config(headless, model_name=TINY).use_head is False


def test_config_keys_go_over_and_what_the_other_type_lacks_is_left_out():
    values = {"model_type": "onevision_encoder", "hidden_size": 128, "num_attention_heads": 4, "rope_theta": 100.0}
    config = convert_config(values, LlavaViTPackingConfig, image_size=70)
    assert (config.hidden_size, config.rope_theta, config.image_size) == (128, 100.0, 70)
    # what the values leave out has the defaults of their own type
    assert (config.patch_size, config.num_hidden_layers, config.spatial_merge_size) == (14, 24, 1)
    assert not hasattr(config, "rope_temporal_size")
    back = convert_config(config.to_dict(), OneVisionEncoderConfig)
    assert (back.rope_theta, back.rope_temporal_size) == (100.0, 64)


@pytest.mark.parametrize("value", [0, "12", None, 1.5])
def test_sizes_are_whole_numbers(value):
    with pytest.raises(ValueError, match=r"num_attention_heads: found .*, expected a whole number from 1"):
        LlavaViTConfig(num_attention_heads=value)


# --- folders ----------------------------------------------------------------------------------------------------------


def outputs(model, image):
    """[B, L, D] last hidden state, and [B, D]."""
    with torch.no_grad():
        if isinstance(model, LlavaViTPackingModel):
            patch = model.config.patch_size
            rows = torch.nn.functional.unfold(image, patch, stride=patch).transpose(1, 2)
            grid = torch.tensor([[1, image.shape[2] // patch, image.shape[3] // patch]] * len(image))
            out = model(rows.flatten(0, 1), grid)
            return out.last_hidden_state.view(*rows.shape[:2], -1), out.pooler_output
        out = model(image)
        return out.last_hidden_state, out.pooler_output


@pytest.mark.parametrize("folder", GOLDEN_FOLDERS)
def test_every_model_reads_every_folder(folder):
    loaded = [model.from_pretrained(golden_folder(folder)).eval() for model in MODELS]
    own = next(model for model in loaded if model.config_class.model_type == folder)
    assert same(own.state_dict(), golden_state(folder))
    patch = own.config.patch_size
    image = torch.randn(2, 3, 2 * patch, 3 * patch, generator=torch.Generator().manual_seed(0))
    expected = outputs(own, image)
    for model in loaded:
        assert same(
            convert_state_dict(model.state_dict(), "source"), convert_state_dict(golden_state(folder), "source")
        )
        for found, wanted in zip(outputs(model, image), expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


def test_keys_and_dtype_given_on_loading_are_used():
    folder = golden_folder("llava_vit")
    model = LlavaViTPackingModel.from_pretrained(folder, layer_norm_eps=1e-5, dtype=torch.bfloat16)
    assert model.config.layer_norm_eps == model.layernorm_pre.eps == 1e-5
    assert model.patch_embed.proj.weight.dtype == torch.bfloat16


@pytest.fixture
def folder(tmp_path):
    """config.json of the padded model, without weights."""
    shutil.copy(golden_folder("llava_vit") / "config.json", tmp_path)
    return tmp_path


def shard(folder, ending, save):
    """Weights in two files and their index."""
    state = golden_state()
    names = sorted(state)
    parts = {f"part-1.{ending}": names[:20], f"part-2.{ending}": names[20:]}
    for file, part in parts.items():
        save({name: state[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    stem = "model.safetensors" if ending == "safetensors" else "pytorch_model.bin"
    (folder / f"{stem}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("sharded", [False, True])
def test_weights_in_one_file_or_several_of_either_kind(folder, ending, sharded):
    save = save_file if ending == "safetensors" else torch.save
    if sharded:
        shard(folder, ending, save)
    else:
        save(golden_state(), folder / ("model.safetensors" if ending == "safetensors" else "pytorch_model.bin"))
    assert same(read_weights(str(folder)), golden_state())
    assert same(LlavaViTPackingModel.from_pretrained(folder).state_dict(), golden_state("llava_vit_packing"))


def test_missing_files_of_weights_are_named(folder):
    with pytest.raises(OSError, match=r"no model\.safetensors and no pytorch_model\.bin"):
        read_weights(str(folder))
    shard(folder, "safetensors", save_file)
    (folder / "part-2.safetensors").unlink()
    with pytest.raises(OSError, match=r"no part-2\.safetensors, which model\.safetensors\.index\.json names"):
        read_weights(str(folder))


def test_what_a_converted_model_saves_is_of_its_own_type(tmp_path):
    LlavaViTPackingModel.from_pretrained(golden_folder("llava_vit")).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llava_vit_packing"
    assert same(load_file(tmp_path / "model.safetensors"), golden_state("llava_vit_packing"))
