"""A checkpoint goes on in a run of the same model, the same parts of it trained: compared before weights are loaded."""

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from llava.config.own_tower import same_class
from llava.config.schema import all_keys, convert, own_keys
from llava.errors import LlavaError
from llava.model.vision_settings import uses_compression
from llava.train.resume import RUN_NAME, read_json
from llava.train.schedule import has_optimizer

_VISION = (
    *("mm_vision_select_layer", "mm_vision_select_feature", "s2", "mm_projector_type"),
    *("tower_args", "vision_tower_image", "image_size", "vision_tower_stage"),
    *("mm_use_im_start_end", "mm_use_im_patch_token"),
)
_COMPRESSION = ("compression_input_size", "compression_output_size")
_LORA = ("lora_r", "lora_alpha", "lora_bias", "bits")
_RATES = {
    "mm_vision_tower": "mm_vision_tower_lr",
    "mm_mlp_adapter": "mm_projector_lr",
    "mm_token_compressor": "mm_token_compressor_lr",
}
_BLOCKS, _DECAY = "mm_vision_tower_trainable_blocks", "mm_vision_tower_layer_decay"
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")

Difference = tuple[str, Any, Any]  # (key, the checkpoint's value, the run's)


def check_same_model(checkpoint: str, run) -> None:
    """Refuse to go on from a checkpoint in a run of another model, or in one that trains other parts of it.

    What a checkpoint was is read from its run_config.json; where there is none (LLaVA-NeXT's own, older ones), from
    config.json and adapter_config.json as far as they tell.

    Args:
        checkpoint: folder.
        run: the resolved `Run`.

    Raises:
        LlavaError: one line with all that differs.
    """
    had = recorded(checkpoint)
    now = {"learning_rate": run["learning_rate"], **{name: setting.value for name, setting in run.settings.items()}}
    found = [
        *_vision_differences(had, now),
        *_model_differences(checkpoint, had, now),
        *_training_differences(checkpoint, had, now),
    ]
    if not found:
        return
    told = []
    for name, before, after in found:
        source = f" ({run.source(name)})" if run.source(name) != "default" else ""
        told.append(f"{name} is {after}{source}, it was trained with {before}")
    raise LlavaError(
        f"{checkpoint}: found a checkpoint of another run: {'; '.join(told)}; expected the same, another output_dir, "
        "or --overwrite_output_dir to train anew"
    )


def recorded(checkpoint: str) -> dict[str, Any]:
    """{key: value} of the run that wrote a checkpoint, as far as its files tell."""
    keys = (read_json(checkpoint, RUN_NAME) or {}).get("keys")
    if isinstance(keys, dict):
        values = {name: item["value"] for name, item in keys.items() if isinstance(item, dict) and "value" in item}
        return {"learning_rate": all_keys()["learning_rate"].default, **values}
    config, adapter = read_json(checkpoint, "config.json"), read_json(checkpoint, "adapter_config.json")
    found: dict[str, Any] = {"lora_enable": adapter is not None}
    if adapter is not None:
        named = {"lora_r": "r", "lora_alpha": "lora_alpha", "model_name_or_path": "base_model_name_or_path"}
        found |= {key: adapter[name] for key, name in named.items() if adapter.get(name) is not None}
    return found if config is None else found | _of_config(config)


def _of_config(config: dict) -> dict[str, Any]:
    """{key: value} of a model's config.json."""
    if not config.get("mm_vision_tower"):
        return {"vision_tower": None}
    found = {"mm_tunable_parts": config.get("mm_tunable_parts")}
    for name, key in own_keys().items():
        value = config.get(key.checkpoint if isinstance(key.checkpoint, str) else name)
        if key.checkpoint:
            try:
                found[name] = key.default if value is None else convert(key, value, "config.json")
            except LlavaError:  # of a kind that no run has; nothing to compare with
                continue
    return found


# --- what differs -----------------------------------------------------------------------------------------------------


def _vision_differences(had: dict, now: dict) -> Iterator[Difference]:
    """Tower, compressor, projector, and tokens that the model gets."""
    if "vision_tower" not in had:
        return
    if not same_place(had["vision_tower"], now["vision_tower"]):
        yield "vision_tower", had["vision_tower"], now["vision_tower"]
    if not (had["vision_tower"] and now["vision_tower"]):
        return
    before, after = SimpleNamespace(**had), SimpleNamespace(**now)
    compressed = uses_compression(before), uses_compression(after)
    if compressed[0] != compressed[1]:
        yield "use_token_compression", *compressed
    elif had.get("s2") == now["s2"] and not _same_type(_tower_type(before), _tower_type(after)):
        yield "mm_vision_tower_type", _tower_type(before), _tower_type(after)
    names = [*_VISION, *(_COMPRESSION if all(compressed) else ())]
    names += ["s2_scales"] if had.get("s2") and now["s2"] else []
    yield from _unlike(names, had, now)
    merge = "mm_patch_merge_type"  # a newline token is trained with some
    if merge in had and ("unpad" in had[merge]) != ("unpad" in now[merge]):
        yield merge, had[merge], now[merge]


def _model_differences(checkpoint: str, had: dict, now: dict) -> Iterator[Difference]:
    """The language model and its adapters."""
    name, path = "model_name_or_path", now["model_name_or_path"]
    if had["lora_enable"] != now["lora_enable"]:
        yield "lora_enable", had["lora_enable"], now["lora_enable"]
    elif now["lora_enable"]:
        yield from _unlike(_LORA, had, now)
        if name in had and not same_place(had[name], path):  # its weights are not in the checkpoint
            yield name, had[name], path
            return
    before = read_json(checkpoint, "config.json")
    if before is None:
        return
    kind, sizes = _architecture(before, checkpoint, None)
    kind_now, sizes_now = _architecture(_config(path), path, now["model_class_name"])
    if kind != kind_now:
        yield name, kind, f"{path}, {kind_now}"
        return
    unlike = [size for size in _SIZES if size in sizes and size in sizes_now and sizes[size] != sizes_now[size]]
    if unlike:
        told = [", ".join(f"{size} {found[size]}" for size in unlike) for found in (sizes, sizes_now)]
        yield name, told[0], f"{path}, {told[1]}"


def _training_differences(checkpoint: str, had: dict, now: dict) -> Iterator[Difference]:
    """The trained parts, and how an optimizer whose state is in the checkpoint groups them."""
    from llava.families.training import tunable_parts

    if not had.get("mm_tunable_parts") and "freeze_backbone" not in had:
        return  # LLaVA-NeXT's config.json does not tell
    defaults = {name: key.default for name, key in own_keys().items()}
    before, after = (SimpleNamespace(**defaults | values) for values in (had, now))
    parts, parts_now = tunable_parts(before, before), tunable_parts(after, after)
    if parts != parts_now:
        yield "mm_tunable_parts", ",".join(sorted(parts)), ",".join(sorted(parts_now))
        return
    had = {name: defaults[name] for name in (_BLOCKS, _DECAY)} | had  # of a run before there were these keys
    yield from _unlike([_BLOCKS], had, now)
    if not has_optimizer(checkpoint) or "learning_rate" not in had:
        return
    yield from _unlike([_DECAY], had, now)
    if _groups(parts, had) != _groups(parts, now):
        yield from _unlike([*_RATES.values(), "learning_rate"], had, now)
    if _optimizer(had["optim"]) != _optimizer(now["optim"]):
        yield "optim", had["optim"], now["optim"]


def _unlike(names, had: dict, now: dict) -> Iterator[Difference]:
    """Those of the keys that the checkpoint tells of, with another value."""
    return ((name, had[name], now[name]) for name in names if name in had and had[name] != now[name])


def same_place(a: str | None, b: str | None) -> bool:
    """Two names of one model: folders spelled differently, or one that has been moved, or a hub id and its copy."""
    if not (a and b) or a == b:
        return a == b
    if os.path.isdir(a) and os.path.isdir(b):
        return os.path.realpath(a) == os.path.realpath(b)
    return os.path.basename(os.path.normpath(a)) == os.path.basename(os.path.normpath(b))


def _same_type(a: str | None, b: str | None) -> bool:
    return a == b or same_class(a, b)


def _tower_type(cfg: SimpleNamespace) -> str | None:
    """Registry id of a run's tower; None where nothing tells."""
    from llava.model.multimodal_encoder.builder import tower_type

    try:
        return tower_type(cfg, cfg.vision_tower)
    except LlavaError:
        return None


def _architecture(config: dict, path: str, model_class_name: str | None) -> tuple[str, dict]:
    """(class or type of a model, what its language model's config says)."""
    from llava.families import family_of
    from llava.model.families import resolve_architecture

    inner = {**config, **(config.get("text_config") or {})}
    if family_of(path).name != "llava":
        return str(config.get("model_type")), inner
    if model_class_name is not None:
        return f"{model_class_name}ForCausalLM", inner
    return resolve_architecture(config, path), inner


def _config(path: str) -> dict:
    from llava.model.builder import read_config

    return read_config(path)


def _groups(parts: set[str], values: dict) -> set[frozenset[str]]:
    """The trained parts that share a learning rate."""
    by_rate: dict[float, set[str]] = {}
    for part in parts:
        rate = values.get(_RATES.get(part, ""))
        by_rate.setdefault(values["learning_rate"] if rate is None else rate, set()).add(part)
    return {frozenset(group) for group in by_rate.values()}


def _optimizer(name: str) -> str:
    """An optimizer without what has no influence on its state."""
    return str(name).replace("_fused", "")
