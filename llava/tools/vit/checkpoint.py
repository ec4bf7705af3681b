"""Read an HEVC-ViT checkpoint of any layout, and write one of the layouts that have a model."""

import json
import os
import pickle
from typing import NamedTuple

from llava.errors import LlavaError

PATCH_EMBEDDINGS = ("conv1.weight", "patch_embedding.weight", "patch_embed.proj.weight")


class Checkpoint(NamedTuple):
    """What is known of weights besides the weights.

    path: where they are.
    layout: theirs, one of `llavavit.conversion.LAYOUTS`.
    config: of the model that has this layout; of the padded one for the source layout.
    dtype: of the patch embedding.
    preprocessor: the folder's preprocessor_config.json, or None.
    """

    path: str
    layout: str
    config: object
    dtype: object
    preprocessor: dict | None

    def __str__(self):
        c, name = self.config, str(self.dtype).removeprefix("torch.")
        return f"{self.path} ({self.layout} layout, {name}, {c.num_hidden_layers} layers of {c.hidden_size} channels)"


# --- reading ----------------------------------------------------------------------------------------------------------


def read_state(path: str) -> dict:
    """The weights of a folder, a .safetensors file or a .pth, .pt or .bin file; pickled code is refused.

    Raises:
        LlavaError: nothing there, or no weights.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from llavavit.conversion import clean_state_dict, read_weights

    if not os.path.exists(path):
        raise LlavaError(f"{path}: nothing there, expected a folder or a file of weights")
    try:
        if os.path.isdir(path):
            return read_weights(path)
        if path.endswith(".safetensors"):
            return clean_state_dict(load_file(path))
        if path.endswith((".pth", ".pt", ".bin")):
            return clean_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except pickle.UnpicklingError:
        raise LlavaError(f"{path}: cannot be read as weights: it is no file of tensors alone") from None
    except (OSError, EOFError, RuntimeError, ValueError, SafetensorError) as error:
        raise LlavaError(f"{path}: cannot be read as weights: {_one_line(error)}") from None
    raise LlavaError(f"{path}: found no known ending, expected a folder, .safetensors, .pth, .pt or .bin")


def read_checkpoint(path: str, model_name=None, config_file=None, image_size=None) -> Checkpoint:
    """What weights at `path` are: their config from `config_file`, else the folder's, else from their shapes.

    Args:
        path: folder or file.
        model_name: a published size that they must have.
        config_file: a config.json to use.
        image_size: side in pixels to write into the config.

    Raises:
        LlavaError: weights that are not read, not those of the config or not of the named size.
    """
    from llavavit import OneVisionEncoderConfig
    from llavavit.conversion import SOURCE_EPS, convert_config, detect_layout, infer_config

    state = read_state(path)
    changes = {} if image_size is None else {"image_size": image_size}
    values = _read_config(config_file or os.path.join(path, "config.json"), required=config_file is not None)
    try:
        layout = detect_layout(state)
        target = "padded" if layout == "source" else layout
        config_class = model_class(target).config_class
        if values is None:
            config = infer_config(state, config_class, model_name, **changes)
        else:
            if target == "padded" and values["model_type"] == OneVisionEncoderConfig.model_type:
                config_class = OneVisionEncoderConfig
            # a config that is silent on eps does not mean the defaults of models that these weights never were
            config = convert_config((SOURCE_EPS if layout == "source" else {}) | values, config_class, **changes)
            if model_name is not None:
                named = infer_config(state, model_name=model_name)
                if config.num_attention_heads != named.num_attention_heads:
                    raise ValueError(
                        f"config: found {config.num_attention_heads} attention heads, expected "
                        f"{named.num_attention_heads} for {model_name}"
                    )
        if config.image_size % config.patch_size:
            raise ValueError(f"image_size: found {config.image_size}, expected a multiple of {config.patch_size}")
        _check_fits(state, layout, config)
    except (ValueError, TypeError) as error:
        raise LlavaError(f"{path}: {_one_line(error)}") from None
    patches = state[next(name for name in state if name.endswith(PATCH_EMBEDDINGS))]
    preprocessor = _read_json(os.path.join(path, "preprocessor_config.json"))
    return Checkpoint(path, layout, config, patches.dtype, preprocessor)


def model_class(layout: str):
    """The model of a layout, padded or packed."""
    from llavavit import LlavaViTModel, LlavaViTPackingModel

    return {"padded": LlavaViTModel, "packed": LlavaViTPackingModel}[layout]


def class_of(config):
    """The model of a config."""
    from llavavit import LlavaViTModel, LlavaViTPackingModel, OneVisionEncoderModel

    models = (LlavaViTModel, LlavaViTPackingModel, OneVisionEncoderModel)
    return next(model for model in models if model.config_class is type(config))


def _read_json(path: str) -> dict | None:
    if not os.path.isfile(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
    except ValueError as error:
        raise LlavaError(f"{path}: no JSON: {_one_line(error)}") from None
    if not isinstance(values, dict):
        raise LlavaError(f"{path}: found {type(values).__name__}, expected keys and values")
    return values


def _read_config(path: str, required: bool) -> dict | None:
    from llavavit.conversion import CONFIG_CLASSES

    values = _read_json(path)
    if values is None:
        if required:
            raise LlavaError(f"{path}: no such file, expected a config.json")
        return None
    if values.get("model_type") not in CONFIG_CLASSES:
        raise LlavaError(
            f"{path}: model_type: found {values.get('model_type')!r}, expected one of {', '.join(CONFIG_CLASSES)}"
        )
    return values


def _check_fits(state: dict, layout: str, config) -> None:
    """Raise ValueError, in the weights' own names, where names or shapes are not those of the config's model."""
    import torch

    from llavavit.conversion import convert_state_dict

    with torch.device("meta"):
        model = class_of(config)(config)
    expected = {name: tuple(value.shape) for name, value in convert_state_dict(model.state_dict(), layout).items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    for name in sorted(expected | found):
        if found.get(name) != expected.get(name):
            raise ValueError(
                f"{name}: found {found.get(name, 'no such weights')}, expected {expected.get(name, 'no such weights')}"
            )


def _one_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


# --- writing ----------------------------------------------------------------------------------------------------------


def write_checkpoint(folder: str, checkpoint: Checkpoint, layout: str, image_size=None, **config_keys) -> None:
    """Write config.json, model.safetensors and preprocessor_config.json of a checkpoint's weights in `layout`.

    Args:
        folder: one that exists.
        checkpoint: of the weights, which are read here.
        layout: padded or packed.
        image_size: put into a preprocessor config that is kept, too.
        **config_keys: further keys of config.json.
    """
    from safetensors.torch import save_file

    from llavavit.conversion import convert_config, convert_state_dict

    model = model_class(layout)
    state = convert_state_dict(read_state(checkpoint.path), layout)
    config = convert_config(checkpoint.config.to_dict(), model.config_class)
    config.architectures, config.dtype = [model.__name__], checkpoint.dtype
    for name, value in config_keys.items():
        setattr(config, name, value)
    config.save_pretrained(folder)
    tensors, path = (
        {name: value.contiguous() for name, value in state.items()},
        os.path.join(folder, "model.safetensors"),
    )
    save_file(tensors, path, metadata={"format": "pt"})
    os.chmod(path, os.stat(os.path.join(folder, "config.json")).st_mode)  # safetensors lets nobody but the owner read
    preprocessor = _preprocessor(checkpoint.preprocessor, config.image_size, image_size is not None)
    with open(os.path.join(folder, "preprocessor_config.json"), "w", encoding="utf-8") as file:
        json.dump(preprocessor, file, indent=2)
        file.write("\n")


def _preprocessor(kept: dict | None, side: int, resized: bool) -> dict:
    """A checkpoint's own preprocessor config, or that of CLIP's image processor for pictures of `side` pixels."""
    from llavavit.configuration_llava_vit import IMAGE_MEAN, IMAGE_STD

    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    if kept is not None:
        return kept | sizes if resized else kept
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": 3,
        "do_center_crop": True,
        **sizes,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
    }
