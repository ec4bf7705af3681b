"""A LLaVA checkpoint without its weights in memory: config, tower, tokenizer, and where each weight lies."""

import os
from typing import NamedTuple

from llava.config.own_tower import own_classes
from llava.errors import LlavaError
from llava.tools.hf.layouts import AUTO, OUTPUT, TOWER, choose_format, is_buffer
from llava.tools.hf.streaming import Stored, Weights


class Source(NamedTuple):
    """What an export reads.

    stored: LLaVA name of each weight -> where it lies; `read` reads one of those.
    """

    path: str
    config: object
    tower: object
    tokenizer: object
    template: str
    form: object
    stored: dict[str, tuple[Weights, Stored]]

    def read(self, name: str):
        weights, stored = self.stored[name]
        return weights.read(stored.name)


def read_source(path: str, template: str | None = None) -> Source:
    """Read everything but the weights, and refuse what has no counterpart.

    Args:
        path: checkpoint folder.
        template: conversation template, in place of the checkpoint's.

    Raises:
        LlavaError: a checkpoint that is not whole, or that transformers has no class for.
    """
    from llava.conversation import get_template
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_tokenizer, make_config, read_config
    from llava.model.families import LANGUAGE_MODELS, model_classes, resolve_architecture

    values = read_config(path)
    if not os.path.isdir(path):
        raise LlavaError(f"{path}: no such folder, expected a LLaVA checkpoint (fetch it from the hub first)")
    if os.path.isfile(os.path.join(path, "adapter_config.json")):
        raise LlavaError(f"{path}: a LoRA adapter; merge it into its base model before exporting it")
    architecture = resolve_architecture(values, get_model_name_from_path(path), path)
    model_class, config_class = model_classes(architecture)
    config = make_config(path, config_class, values)
    own = own_classes(values.get("mm_vision_tower"), values.get("mm_vision_tower_type"))
    if own:  # before its code would be run
        raise LlavaError(f"{path}: vision tower {own[0]}, a class of its own: {AUTO}")
    expected, tower = expected_weights(model_class, config)
    form = choose_format(path, config, tower)
    template = template or getattr(config, "conversation_template", None) or LANGUAGE_MODELS[architecture].template
    get_template(template)
    config.conversation_template = template
    tokenizer = load_tokenizer(path)
    return Source(path, config, tower, tokenizer, template, form, _locate(path, tower, expected))


def expected_weights(model_class, config) -> tuple[dict[str, tuple[int, ...]], object]:
    """({LLaVA name: shape} of what a model's checkpoint holds, its vision tower without weights)."""
    import torch

    with torch.device("meta"):
        model = model_class(config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if not is_buffer(name)}
    if config.tie_word_embeddings:
        shapes.pop(OUTPUT, None)
    return shapes, model.get_vision_tower()


def _locate(path: str, tower, expected: dict[str, tuple[int, ...]]) -> dict[str, tuple[Weights, Stored]]:
    """Where every expected weight lies: in the checkpoint, or the tower's in the tower's own folder."""
    weights = Weights(path)
    found = {name: (weights, weights.stored[name]) for name in expected if name in weights.stored}
    lacking = [name for name in expected if name not in found]
    if lacking and {n for n in expected if n.startswith(TOWER)} == set(lacking):
        folder = _tower_folder(path, tower.vision_tower_name)
        encoder = Weights(folder)
        bare = {name.removeprefix("vision_model."): stored for name, stored in encoder.stored.items()}
        found.update({n: (encoder, bare[n.removeprefix(TOWER)]) for n in lacking if n.removeprefix(TOWER) in bare})
        lacking = [name for name in lacking if name not in found]
        path = f"{path} and {folder}"
    if lacking:
        raise LlavaError(f"{path}: lacks {len(lacking)} of {len(expected)} weights, {', '.join(lacking[:3])}")
    for name, (_, stored) in found.items():
        shape = expected[name]
        if stored.shape != shape:
            raise LlavaError(f"{path}: {name}: found {stored.shape}, expected {shape} as config.json says")
    return found


def _tower_folder(path: str, name: str) -> str:
    """The folder of the encoder's own weights, which a checkpoint with a frozen tower need not hold."""
    if os.path.isdir(name):
        return name
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, allow_patterns=["*.safetensors", "*.bin", "*.json"])
    except (OSError, ValueError) as error:
        raise LlavaError(
            f"{path}: holds no weights of its vision tower, and {name!r} cannot be had "
            f"({str(error).splitlines()[0][:120]})"
        ) from None
