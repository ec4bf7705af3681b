"""LoRA (arXiv 2106.09685), by peft: low-rank adapters in the language model; tower and projector stay whole.

A folder of such a run holds peft's `adapter_config.json` and `adapter_model.safetensors`, and in
`non_lora_trainables.safetensors` whatever else was trained, under the names that LLaVA gives it
(`base_model.model.model.mm_projector...`). LLaVA's own `.bin` of that name is read too.
"""

import contextlib
import json
import os
import re
import warnings

import torch
import torch.nn as nn
from safetensors.torch import save_file

from llava.errors import LlavaError
from llava.model.checkpoint import assign, gathered, read_weights

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
OTHER_WEIGHTS = ("non_lora_trainables.safetensors", "non_lora_trainables.bin")
PREFIX = "base_model.model."  # peft's, before the model's own names
VISION = r".*\b(vision_tower|mm_projector|visual)\b.*"  # names of modules that get no adapters
INSTALL = "pip install -e '.[train]'"


def is_lora(folder: str) -> bool:
    """The folder holds a LoRA adapter."""
    return os.path.isfile(os.path.join(folder, ADAPTER_CONFIG))


def recorded_base(folder: str) -> str | None:
    """The model that an adapter was trained on, as its config names it."""
    path = os.path.join(folder, ADAPTER_CONFIG)
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except (OSError, ValueError) as error:
        raise LlavaError(f"{path}: cannot be read ({error}), expected peft's config of a LoRA adapter") from None
    if config.get("peft_type") != "LORA":
        raise LlavaError(f"{path}: found peft_type {config.get('peft_type')!r}, expected LORA")
    return config.get("base_model_name_or_path")


def add_lora(model, *, r: int, alpha: int, dropout: float, base: str):
    """Wrap a model: an adapter on every linear layer of its language model, the output layer excepted.

    Args:
        model: LLaVA model or Qwen2-VL, changed in place.
        r, alpha, dropout: rank, scale (adapters count alpha / r), dropout before the adapters.
        base: name of the model, for the adapter's config.

    Returns:
        peft's PeftModel, whose attributes are the model's.
    """
    peft = _peft()
    linear = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not re.fullmatch(VISION, name)
        and module is not model.get_output_embeddings()
    }
    config = peft.LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=sorted(linear),
        exclude_modules=VISION,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )
    # from the run's seed alone: how much randomness the rest took differs between ZeRO stages
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(torch.initial_seed())
        # of the base's dtype; what a run holds them in is decided for all its weights together
        return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


def is_adapted(model) -> bool:
    """The model carries LoRA adapters."""
    return hasattr(model, "peft_config")


def trains_under_lora(name: str, bias: str) -> bool:
    """Whether a parameter of an adapted language model is trained; `bias` as in LLaVA: none, all or lora_only.

    The newline token belongs to the language model's part and has no adapter, so it is trained whole.
    """
    if "lora_" in name or name.endswith("image_newline"):
        return True
    return name.endswith("base_layer.bias") if bias == "lora_only" else bias == "all" and name.endswith("bias")


def save_lora(model, folder: str, write: bool = True) -> None:
    """Write what was trained: the adapter and, apart from it, all else that has a gradient.

    A collective under ZeRO-3: every rank must call it, and one of them with `write`.
    """
    state = gathered((name, value) for name, value in model.named_parameters() if value.requires_grad)
    if not write:
        return
    os.makedirs(folder, exist_ok=True)
    model.save_pretrained(
        folder, state_dict={k: v for k, v in state.items() if "lora_" in k}, save_embedding_layers=False
    )
    others = {k.replace(".base_layer.", "."): v.contiguous() for k, v in state.items() if "lora_" not in k}
    save_file(others, os.path.join(folder, OTHER_WEIGHTS[0]), {"format": "pt"})


def restore_lora(model, folder: str) -> None:
    """Put a folder's weights into a model that has adapters already: the start, or the resumption, of a run.

    Raises:
        LlavaError: a file is missing or cannot be read, or its weights are not this model's.
    """
    named = {_plain(name): value for name, value in model.named_parameters()}
    adapter, fits = _adapter(folder), f"lora_r and the base model of {folder} to be this run's"
    lacking = sorted(k for k in named if "lora_" in k and k not in adapter)
    if lacking:
        raise LlavaError(f"{folder}: found no adapter for {lacking[0]}, expected {fits}")
    for name, value in (adapter | _others(folder)).items():
        _put(named, name, value, folder, fits)


def saved_lora(model, folder: str):
    """(the model's name, what gives it) of every weight in the folder of such a run."""
    named = {_plain(name): name for name, _ in model.named_parameters()}
    for name, value in (_adapter(folder) | _others(folder)).items():
        if name in named:
            yield named[name], lambda value=value: value


def load_lora(model, folder: str, missing: list[str] = ()):
    """Adapter and other trained weights of a folder, in a base model for inference.

    Args:
        model: plain LLaVA model or Qwen2-VL, changed in place.
        folder: of a run with LoRA, this project's or LLaVA's.
        missing: weights that the base does not have, so the folder must.

    Returns:
        peft's PeftModel; its `merge_and_unload()` is a plain model again.

    Raises:
        LlavaError: files are missing or cannot be read, or do not fit the model.
    """
    peft = _peft()
    others, adapter = _others(folder), _adapter(folder)
    lacking = sorted(set(missing) - others.keys())
    if lacking:
        raise LlavaError(f"{folder}: neither it nor its base holds {len(lacking)} weights, {lacking[0]} for one")
    fits = "the adapter of another base model, or this one's"
    named = dict(model.named_parameters())
    for name, value in others.items():
        _put(named, name, value, folder, fits)
    modules = dict(model.named_modules())
    for name, value in adapter.items():
        module, _, which = name.removesuffix(".weight").rpartition(".")
        layer = modules.get(module)
        if which not in ("lora_A", "lora_B") or not isinstance(layer, nn.Linear):
            raise LlavaError(f"{folder}: its adapter holds {name}, which the base model has no linear layer for")
        found = value.shape[1] if which == "lora_A" else value.shape[0]
        expected = layer.in_features if which == "lora_A" else layer.out_features
        if found != expected:
            raise LlavaError(
                f"{folder}: {name} is for {found} channels, the base model has {expected}: it is not the model that "
                f"the adapter was trained on ({recorded_base(folder)})"
            )
    config = peft.PeftConfig.from_pretrained(folder)
    if not any(re.fullmatch(VISION, name) for name in adapter):  # LLaVA's configs would put empty adapters there
        config.exclude_modules = VISION
    with _quiet():
        return peft.PeftModel.from_pretrained(model, folder, config=config)


def _peft():
    try:
        import peft
    except ImportError:
        raise LlavaError(f"LoRA needs the package peft: {INSTALL}") from None
    return peft


@contextlib.contextmanager
def _quiet():
    """Without the warning about a name of transformers that peft uses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _adapter(folder: str) -> dict[str, torch.Tensor]:
    """The adapter's weights under the model's own names."""
    return {_plain(name): value for name, value in _read(folder, ADAPTER_WEIGHTS).items()}


def _others(folder: str) -> dict[str, torch.Tensor]:
    """What was trained beside the adapter, under the model's own names."""
    return {_plain(name): value for name, value in _read(folder, OTHER_WEIGHTS).items()}


def _read(folder: str, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    paths = [os.path.join(folder, name) for name in names]
    return read_weights(next(filter(os.path.isfile, paths), paths[0]))


def _plain(name: str) -> str:
    """A name without what peft puts into it."""
    return name.removeprefix(PREFIX).replace(".base_layer.", ".").replace(".default.", ".")


def _put(named: dict, name: str, value: torch.Tensor, folder: str, fits: str) -> None:
    target = named.get(name)
    shape = None if target is None else tuple(getattr(target, "ds_shape", target.shape))
    if shape != tuple(value.shape):
        found = "has none of that name" if shape is None else f"has {shape}"
        raise LlavaError(f"{folder}: {name} is {tuple(value.shape)}, the model {found}; expected {fits}")
    assign(target, value)
