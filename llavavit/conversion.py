"""Weights and configs between the published layouts of the encoder.

    source  as trained: conv1, transformer.layers.N.attn.in_proj, ...; files without a config
    padded  `LlavaViTModel` and `OneVisionEncoderModel`
    packed  `LlavaViTPackingModel`

All hold the same numbers. What differs are names, and whether the query, key and value projections are one matrix.
"""

import dataclasses
import os
import re

import torch
from transformers import PreTrainedConfig
from transformers.utils import cached_file

from .configuration_llava_vit import SIZES, LlavaViTConfig, LlavaViTPackingConfig, OneVisionEncoderConfig

LAYOUTS = ("source", "padded", "packed")
# module names in these layouts; * is a layer's number. The padded layout has q_proj, k_proj, v_proj for its third row.
_MODULES = (
    ("conv1", "embeddings.patch_embedding", "patch_embed.proj"),
    ("ln_pre", "layernorm_pre", "layernorm_pre"),
    ("transformer.layers.*.attn.in_proj", "encoder.layers.*.self_attn.qkv", "encoder.layers.*.self_attn.qkv"),
    ("transformer.layers.*.attn.out_proj", "encoder.layers.*.self_attn.out_proj", "encoder.layers.*.self_attn.proj"),
    ("transformer.layers.*.ln_1", "encoder.layers.*.layer_norm1", "encoder.layers.*.layer_norm1"),
    ("transformer.layers.*.ln_2", "encoder.layers.*.layer_norm2", "encoder.layers.*.layer_norm2"),
    ("transformer.layers.*.mlp.0", "encoder.layers.*.mlp.fc1", "encoder.layers.*.mlp.fc1"),
    ("transformer.layers.*.mlp.2", "encoder.layers.*.mlp.fc2", "encoder.layers.*.mlp.fc2"),
    ("ln_post", "layernorm_post", "layernorm_post"),
    ("head", "head", "head"),
    ("head.attention", "head.attention", "head.attention"),
    ("head.attention.out_proj", "head.attention.out_proj", "head.attention.out_proj"),
    ("head.norm", "head.norm", "head.norm"),
    ("head.mlp.fc1", "head.mlp.fc1", "head.mlp.fc1"),
    ("head.mlp.fc2", "head.mlp.fc2", "head.mlp.fc2"),
)
_PARTS = ("q_proj", "k_proj", "v_proj")
# norms of the source models: their config is code, which the files do not carry
SOURCE_EPS = {"layer_norm_eps": 1e-5, "head_norm_eps": torch.finfo(torch.float32).eps}


# --- weights ----------------------------------------------------------------------------------------------------------


def clean_state_dict(state: dict) -> dict:
    """The weights alone: out of `model` or `state_dict`, without wrappers' prefixes and without rotary buffers.

    Raises:
        ValueError: something else than tensors by name.
    """
    if not isinstance(state, dict):
        raise ValueError(f"weights: found {type(state).__name__}, expected tensors by name")
    while nests := [nest for nest in ("state_dict", "model") if isinstance(state.get(nest), dict)]:
        state = state[nests[0]]
    cleaned = {}
    for name, value in state.items():
        name = re.sub(r"^((module|_orig_mod)\.)+", "", str(name))
        if ".inv_freq" in name:
            continue
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{name}: found {type(value).__name__}, expected a tensor")
        cleaned[name] = value
    return cleaned


def detect_layout(names) -> str:
    """Which of `LAYOUTS` has weights of these names.

    Raises:
        ValueError: none.
    """
    names = set(names)
    for layout, patches in zip(LAYOUTS, _MODULES[0], strict=True):
        if f"{patches}.weight" in names:
            return layout
    expected = ", ".join(f"{name}.weight" for name in _MODULES[0])
    raise ValueError(f"weights: found {len(names)} names without a patch embedding, expected one of {expected}")


def convert_state_dict(state: dict, to: str) -> dict:
    """Weights of any layout in the layout `to`, numbers unchanged.

    Args:
        state: name -> tensor, as `clean_state_dict` gives it.
        to: one of `LAYOUTS`.

    Raises:
        ValueError: a name that belongs to no layout, a layer without one of its projections or with unequal ones.
    """
    if to not in LAYOUTS:
        raise ValueError(f"layout: found {to!r}, expected one of {', '.join(LAYOUTS)}")
    layout = detect_layout(state)
    table = {row[LAYOUTS.index(layout)]: row[LAYOUTS.index(to)] for row in _MODULES}
    converted = {}
    for name, value in (_fuse(state) if layout == "padded" else state).items():
        module, _, leaf = name.rpartition(".")
        number = re.search(r"\.(\d+)\.", module)
        target = table.get(re.sub(r"\.\d+\.", ".*.", module, count=1))
        if target is None:
            raise ValueError(f"weights: found {name!r}, which the {layout} layout does not have")
        converted[f"{target.replace('*', number.group(1)) if number else target}.{leaf}"] = value
    return _split(converted) if to == "padded" else converted


def _fuse(state: dict) -> dict:
    """q_proj, k_proj and v_proj of every layer as one `qkv`."""
    fused = {}
    for name, value in state.items():
        part = next((part for part in _PARTS if f".self_attn.{part}." in name), None)
        if part is None:
            fused[name] = value
            continue
        names = [name.replace(part, other) for other in _PARTS]
        missing = [other for other in names if other not in state]
        if missing:
            raise ValueError(f"weights: found {name!r} without {missing[0]!r}")
        if part == _PARTS[0]:
            if len({state[other].shape for other in names}) > 1:
                shapes = ", ".join(f"{other} {tuple(state[other].shape)}" for other in names)
                raise ValueError(f"weights: found {shapes}, expected one shape")
            fused[name.replace(part, "qkv")] = torch.cat([state[other] for other in names])
    return fused


def _split(state: dict) -> dict:
    """The reverse of `_fuse`."""
    split = {}
    for name, value in state.items():
        if ".self_attn.qkv." in name:
            if len(value) % 3:
                raise ValueError(f"weights: found {name!r} with {len(value)} rows, expected a multiple of 3")
            for part, piece in zip(_PARTS, value.chunk(3), strict=True):
                split[name.replace("qkv", part)] = piece.clone()  # a file cannot hold parts of one tensor
        else:
            split[name] = value
    return split


# --- configs ----------------------------------------------------------------------------------------------------------

_LAYOUT_OF_TYPE = {
    LlavaViTConfig.model_type: "padded",
    OneVisionEncoderConfig.model_type: "padded",
    LlavaViTPackingConfig.model_type: "packed",
}
CONFIG_CLASSES = {c.model_type: c for c in (LlavaViTConfig, OneVisionEncoderConfig, LlavaViTPackingConfig)}


def _own_fields(config_class) -> set[str]:
    base = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    return {field.name for field in dataclasses.fields(config_class)} - base


def convert_config(values: dict, config_class, **changes):
    """Config of another of the three types from one's dictionary; keys that the other lacks are left out.

    The values' own type fills in what they leave to its defaults.
    """
    full = CONFIG_CLASSES[values["model_type"]].from_dict(values).to_dict()
    kept = {name: full[name] for name in _own_fields(config_class) if name in full} | changes
    return config_class(dtype=full.get("dtype"), **kept)


def infer_config(state: dict, config_class=LlavaViTConfig, model_name: str | None = None, **changes):
    """Config for weights that come without one, by their shapes and the published sizes.

    Args:
        state: weights in any layout.
        config_class: which config to make.
        model_name: a name of `SIZES`; the weights must have that size.
        **changes: keys set to values of the caller's.

    Raises:
        ValueError: shapes that no size, or not the named one, has.
    """
    if model_name is not None and model_name not in SIZES:
        raise ValueError(f"model name: found {model_name!r}, expected one of {', '.join(SIZES)}")
    layout = detect_layout(state)
    state = convert_state_dict(state, "packed")
    patches, mlp = state["patch_embed.proj.weight"], state.get("encoder.layers.0.mlp.fc1.weight")
    if patches.ndim != 4 or mlp is None:
        raise ValueError("weights: found no patch embedding [D, C, p, p] with a first layer, expected an encoder's")
    found = {
        "patch_size": patches.shape[-1],
        "hidden_size": patches.shape[0],
        "num_hidden_layers": sum(name.endswith(".mlp.fc1.weight") and name.startswith("encoder.") for name in state),
        "intermediate_size": len(mlp),
    }
    names = SIZES if model_name is None else (model_name,)
    sizes = [size for name in names for size in SIZES[name] if found.items() <= size.items()]
    if not sizes:
        named = "" if model_name is None else " or ".join(f"{size}" for size in SIZES[model_name])
        expected = f"{model_name}: {named}" if named else f"a size of {', '.join(SIZES)}, or a config"
        raise ValueError(f"weights: found {found}, expected {expected}")
    values = sizes[0] | {
        "num_channels": patches.shape[1],
        "use_head": "head.probe" in state,
        "layer_norm_type": "layer_norm" if "layernorm_pre.bias" in state else "rms_norm",
    }
    return config_class(**values | (SOURCE_EPS if layout == "source" else {}) | changes)


# --- files ------------------------------------------------------------------------------------------------------------

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def read_weights(source: str, **hub) -> dict:
    """The weights of a local folder or a hub repository: safetensors, one file or several, or else a .bin.

    Raises:
        OSError: none there, or not all of several.
    """
    import json

    from safetensors.torch import load_file

    def find(name):
        return cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub)

    for ending, load in (
        ("model.safetensors", load_file),
        ("pytorch_model.bin", lambda path: torch.load(path, map_location="cpu", weights_only=True)),
    ):
        if path := find(ending):
            return clean_state_dict(load(path))
        if index := find(f"{ending}.index.json"):
            with open(index) as file:
                paths = {shard: find(shard) for shard in sorted(set(json.load(file)["weight_map"].values()))}
            if missing := [shard for shard, path in paths.items() if path is None]:
                raise OSError(f"{source}: found no {missing[0]}, which {os.path.basename(index)} names")
            return clean_state_dict({name: value for path in paths.values() for name, value in load(path).items()})
    raise OSError(f"{source}: found no model.safetensors and no pytorch_model.bin")


def load_any_layout(config_class, source, kwargs: dict):
    """(config, weights) for `from_pretrained` of a model with `config_class`, where `source` has another type.

    Args:
        config_class: the model's.
        source: local folder, hub id or None.
        kwargs: of `from_pretrained`; what belongs to the config is taken out.

    Returns:
        None where `source` is of the model's own type, or of one unknown here: then transformers does everything.
    """
    if source is None or kwargs.get("state_dict") is not None:
        return None
    hub = {name: kwargs[name] for name in _HUB_OPTIONS if kwargs.get(name) is not None}
    values, _ = PreTrainedConfig.get_config_dict(source, **hub)
    model_type = values.get("model_type")
    if model_type == config_class.model_type or model_type not in CONFIG_CLASSES:
        return None
    config = kwargs.pop("config", None)
    if not isinstance(config, config_class):
        changes = {name: kwargs.pop(name) for name in _own_fields(config_class) if name in kwargs}
        config = convert_config(values, config_class, **changes)
    return config, convert_state_dict(read_weights(str(source), **hub), _LAYOUT_OF_TYPE[config_class.model_type])
