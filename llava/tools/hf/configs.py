"""The config of a LLaVA checkpoint as that of a transformers model, and back."""

import os

from llava.errors import LlavaError
from llava.model.families import PLAIN_TYPES
from llava.tools.hf.layouts import FORMATS, Format

OWN_KEY = "llava"  # in an exported config.json: what LLaVA's config says that transformers' has no place for
TOWERS = {"clip_vision_model": "clip", "siglip_vision_model": "siglip"}
# described by the exported config itself
_DERIVED = {
    "mm_vision_config",
    "mm_image_processor_config",
    "mm_hidden_size",
    "mm_vision_select_layer",
    "mm_vision_select_feature",
    "architectures",
    "dtype",
    "torch_dtype",
    "model_type",
    "transformers_version",
    "_name_or_path",
}


def text_config(config):
    """The plain language model's config in a LLaVA config, and the keys that are LLaVA's own as a dict."""
    plain = type(config).__mro__[1]
    values = config.to_dict()
    known = plain().to_dict().keys() | {"rope_parameters", "head_dim"}
    text = plain.from_dict({key: value for key, value in values.items() if key in known and key != "model_type"})
    text._name_or_path = ""
    text.architectures = [f"{plain.__name__.removesuffix('Config')}ForCausalLM"]
    own = {key: value for key, value in values.items() if key not in known | _DERIVED}
    if os.path.isabs(own["mm_vision_tower"]):  # a folder of this machine means nothing elsewhere
        del own["mm_vision_tower"]
    return text, own


def vision_config(tower):
    """The encoder's config in transformers' model: SigLIP without the layer and the head that LLaVA never runs."""
    config = type(tower.config).from_dict(tower.config.to_dict())
    if config.model_type == "siglip_vision_model":
        config.num_hidden_layers = tower.keep_layers
        config.vision_use_head = False
    return config


def feature_choice(tower) -> tuple[int, str]:
    """(vision_feature_layer, vision_feature_select_strategy) of a tower; both sides count hidden states alike."""
    if tower.config.model_type == "siglip_vision_model":
        return -1, "full"  # the last layer that is left
    return tower.select_layer, "full" if "cls_patch" in tower.select_feature else "default"


def grid_hw(grid_pinpoints, side: int) -> list[list[int]]:
    """LLaVA's candidate resolutions, (width, height), in transformers' order: [height, width]."""
    from llava.images.geometry import parse_grid_pinpoints

    return [[height, width] for width, height in parse_grid_pinpoints(grid_pinpoints, side)]


def to_hf(config, tower, form: Format, tokens: dict[str, int], rows: int, dtype: str):
    """transformers' config.

    Args:
        config, tower: of the LLaVA model.
        form: the model to describe.
        tokens: ids of "image" and, for OneVision, "video".
        rows: of the embedding that is written.
        dtype: of the weights.
    """
    import torch

    from llava.model.visual_merge import MergeRules

    text, own = text_config(config)
    own["vocab_size"] = text.vocab_size
    text.vocab_size = rows
    layer, strategy = feature_choice(tower)
    side = tower.config.image_size
    values = {
        "text_config": text,
        "vision_config": vision_config(tower),
        "image_token_index": tokens["image"],
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": strategy,
        "tie_word_embeddings": bool(config.tie_word_embeddings),
    }
    if form.model_type != "llava":
        values["image_grid_pinpoints"] = grid_hw(config.image_grid_pinpoints, side)
    if form.model_type == "llava_onevision":
        values["video_token_index"] = tokens["video"]
        values["vision_aspect_ratio"] = f"anyres_max_{MergeRules.from_config(config).max_crops}"
    else:
        values["image_seq_length"] = tower.num_patches
    made = form.load("Config")(**values)
    made.architectures = [form.model_class]
    made.dtype = made.text_config.dtype = made.vision_config.dtype = getattr(torch, dtype)
    setattr(made, OWN_KEY, own)
    return made


# --- the way back -----------------------------------------------------------------------------------------------------


def read_hf(path: str):
    """(config, its `Format`) of a transformers folder.

    Raises:
        LlavaError: no config, or that of another model.
    """
    from llava.model.builder import read_config

    values = read_config(path)
    form = FORMATS.get(values.get("model_type"))
    if form is None or "text_config" not in values:
        raise LlavaError(
            f"{path}: config.json: found model_type {values.get('model_type')!r}"
            f"{'' if 'text_config' in values else ' without text_config'}, expected a folder of transformers' own "
            f"{', '.join(FORMATS)}"
        )
    return form.load("Config").from_dict(values), form


def to_llava(path: str, hf, form: Format, processor, template: str):
    """LLaVA's config of a transformers model.

    Args:
        path: of its folder, for messages.
        hf: its config.
        form: which model it is.
        processor: its image processor.
        template: conversation template.

    Raises:
        LlavaError: a part that LLaVA does not have.
    """
    text, own = hf.text_config, dict(getattr(hf, OWN_KEY, None) or {})
    language_model = PLAIN_TYPES.get(text.model_type)
    if language_model is None:
        raise LlavaError(
            f"{path}: text_config: found model_type {text.model_type!r}, expected one of {', '.join(PLAIN_TYPES)}"
        )
    if (cap := getattr(text, "final_logit_softcapping", None)) is not None:
        raise LlavaError(
            f"{path}: text_config: found final_logit_softcapping {cap}, expected none: {form.model_class} has no cap"
        )
    expected = {"projector_hidden_act": "gelu", "multimodal_projector_bias": True}
    for key, value in expected.items():
        if getattr(hf, key, value) != value:
            raise LlavaError(f"{path}: {key}: found {getattr(hf, key)!r}, expected {value!r} (mlp2x_gelu)")
    values = {key: value for key, value in text.to_dict().items() if key not in ("model_type", "_name_or_path")}
    values.update(own)
    values.update(
        vocab_size=text.vocab_size,
        tie_word_embeddings=bool(hf.tie_word_embeddings or text.tie_word_embeddings),
        architectures=[language_model.architecture],
        mm_projector_type="mlp2x_gelu",
        mm_use_im_start_end=False,
        mm_use_im_patch_token=False,
        use_mm_proj=True,
        conversation_template=template,
        **_vision_values(path, hf, own),
        **_image_values(path, hf, form, processor, own),
    )
    values["mm_image_processor_config"] = tower_processor(path, hf, processor).to_dict()
    return language_model.load()[1].from_dict(values)


def _vision_values(path: str, hf, own: dict) -> dict:
    """Which tower, which layer, which tokens."""
    vision, layer, strategy = hf.vision_config, hf.vision_feature_layer, hf.vision_feature_select_strategy
    kind = TOWERS.get(vision.model_type)
    if kind is None:
        raise LlavaError(
            f"{path}: vision_config: found model_type {vision.model_type!r}, expected one of {', '.join(TOWERS)}"
        )
    if not isinstance(layer, int):
        raise LlavaError(f"{path}: vision_feature_layer: found {layer}, expected a single layer")
    depth = vision.num_hidden_layers
    states = depth + 1
    if not -states <= layer < states:
        raise LlavaError(f"{path}: vision_feature_layer: found {layer}, expected a layer of {depth}")
    stored = vision.to_dict()
    select = "patch"
    if kind == "siglip":
        if strategy != "full" or layer % states == 0:
            raise LlavaError(
                f"{path}: vision_feature_select_strategy {strategy!r} of layer {layer}: expected 'full' and a layer, "
                "since SigLIP has no class token"
            )
        stored["num_hidden_layers"] = layer % states + 1  # LLaVA's SigLIP tower stops one layer before the last
        stored.pop("vision_use_head", None)
        layer = -2
    elif strategy == "full":
        select = "cls_patch"
    return {
        "mm_vision_tower": own.get("mm_vision_tower") or _tower_name(kind, stored),
        "mm_vision_tower_type": kind,
        "mm_vision_config": stored,
        "mm_vision_select_layer": layer,
        "mm_vision_select_feature": select,
        "mm_hidden_size": vision.hidden_size,
    }


def _tower_name(kind: str, stored: dict) -> str:
    """A published encoder of these sizes, or else its kind: the checkpoint carries the encoder, the name is a label."""
    from llava.model.multimodal_encoder.published import PUBLISHED

    for name, (sizes, _) in PUBLISHED.items():
        if kind in name and all(stored.get(key) == value for key, value in sizes.items()):
            return name
    return f"{kind}_vision_tower"


def _image_values(path: str, hf, form: Format, processor, own: dict) -> dict:
    """How images are cut and merged."""
    if form.model_type == "llava":
        padded = bool(getattr(processor, "do_pad", False))
        return {"image_aspect_ratio": "pad" if padded else "square", "mm_patch_merge_type": "flat"}
    grid = [list(pair) for pair in hf.image_grid_pinpoints]
    if [list(pair) for pair in processor.image_grid_pinpoints] != grid:
        raise LlavaError(f"{path}: image_grid_pinpoints differ between config.json and the image processor")
    aspect = hf.vision_aspect_ratio if form.model_type == "llava_onevision" else "anyres"
    known, side = own.get("image_grid_pinpoints"), hf.vision_config.image_size
    if not known or grid_hw(known, side) != grid:
        known = [[width, height] for height, width in grid]
    return {"image_aspect_ratio": aspect, "image_grid_pinpoints": known, "mm_patch_merge_type": "spatial_unpad"}


def tower_processor(path: str, hf, processor):
    """The tower's own image processor, with the numbers of the transformers model's."""
    from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

    side = hf.vision_config.image_size
    kept = ("resample", "image_mean", "image_std", "rescale_factor", "do_rescale", "do_normalize", "do_resize")
    values = {key: getattr(processor, key) for key in kept if getattr(processor, key, None) is not None}
    if hf.vision_config.model_type == "siglip_vision_model":
        return SiglipImageProcessorPil(size={"height": side, "width": side}, **values)
    size, crop = dict(processor.size), dict(processor.crop_size or {})
    if processor.do_center_crop is False or not crop:
        size, crop = {"shortest_edge": side}, {"height": side, "width": side}
    return CLIPImageProcessorPil(size=size, crop_size=crop, **values)
