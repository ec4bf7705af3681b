"""The sizes that decide what a model costs to run, read from its config alone; no model is built.

A weight here is a number of a matrix that tokens are multiplied with; norms, biases and look-ups cost next to nothing.
"""

import re
from dataclasses import dataclass, replace
from types import SimpleNamespace

from llava.errors import LlavaError

MERGED = 4  # tokens that a merging projector makes one of
# encoders whose operations their config does not tell: windows that are padded, clips of one picture
_UNCOUNTED = ("sam_vision_model", "sam_hq_vision_model", "vjepa2")
_GATED = ("aimv2", "aimv2_vision_model", "pixtral")  # encoders whose MLP is gated without a word of it in their config


@dataclass(frozen=True)
class LanguageShape:
    """A decoder whose MLP is gated: three matrices.

    queries, keys: width of all query heads, and of all key (or value) heads.
    windows: of each layer, how many tokens a token sees of those up to itself; None: all.
    """

    hidden: int
    queries: int
    keys: int
    intermediate: int
    vocabulary: int
    windows: tuple[int | None, ...]

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of a layer's matrices."""
        hidden = self.hidden
        attention = [(hidden, self.queries), (hidden, self.keys), (hidden, self.keys), (self.queries, hidden)]
        return [*attention, (hidden, self.intermediate), (hidden, self.intermediate), (self.intermediate, hidden)]

    @property
    def layer_weights(self) -> int:
        return sum(inputs * outputs for inputs, outputs in self.matrices)


@dataclass(frozen=True)
class VisionShape:
    """A vision encoder, up to the last layer that is used.

    patch_values: numbers in a patch of pixels.
    extra: tokens that an image has besides its patches (a class token).
    window: side of a window of attention in patches, in `windowed` of the layers; 0: none.
    frames_apart: whether the frames of a clip do not see each other.
    """

    layers: int
    hidden: int
    intermediate: int
    patch_values: int
    gated: bool = False
    extra: int = 0
    windowed: int = 0
    window: int = 0
    merge: int = 1
    frames_apart: bool = False

    @property
    def layer_weights(self) -> int:
        return 4 * self.hidden**2 + (3 if self.gated else 2) * self.hidden * self.intermediate


@dataclass(frozen=True)
class ProjectorShape:
    """From the encoder's tokens to the language model's.

    first: weights of the matrix that meets the encoder's features; rest: of those behind it. Per token that it makes.
    normed: the first matrix meets a norm's output, whose own weights learn where the projector does.
    merged: tokens of the encoder that become one.
    compressor: weights that a token of the compressor meets, 0 without one; sides: (before, after) of its grid.
    scales: how many crops of the encoder become one (S2).
    keeps_extra: whether a class token is among the features.
    """

    first: int
    rest: int
    normed: bool = False
    merged: int = 1
    compressor: int = 0
    sides: tuple[int, int] | None = None
    scales: int = 1
    keeps_extra: bool = False

    def tokens(self, sequences: list[int], extra: int) -> int:
        """Tokens that it makes of vision sequences of these lengths in patches; `extra` is the encoder's."""
        if self.sides:
            return len(sequences) * self.sides[1] ** 2 // self.scales // self.merged
        kept = extra if self.keeps_extra else 0
        return sum((length + kept) // self.merged for length in sequences) // self.scales


@dataclass(frozen=True)
class ModelShape:
    """vision and projector are None for a language model alone."""

    language: LanguageShape
    vision: VisionShape | None = None
    projector: ProjectorShape | None = None


def shape_of(config) -> ModelShape:
    """Of the config of a model of any family.

    Raises:
        LlavaError: a config that does not describe its vision encoder.
    """
    language = _language(config.get_text_config())
    if getattr(config, "vision_config", None) is not None:
        return ModelShape(language, *_own_vision(config.vision_config))
    if getattr(config, "mm_vision_tower", None) is None:
        return ModelShape(language)
    values = getattr(config, "mm_vision_config", None)
    if not values:
        raise LlavaError(f"{config.mm_vision_tower}: found no mm_vision_config, expected its encoder's config")
    vision = _tower(config, values)
    return ModelShape(language, vision, _projector(config, vision))


def _language(config) -> LanguageShape:
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if kinds is None:  # one kind for all of them
        windows = (window,) * layers
    else:
        windows = tuple(window if kind == "sliding_attention" else None for kind in kinds[:layers])
    return LanguageShape(
        hidden=config.hidden_size,
        queries=heads * head,
        keys=(getattr(config, "num_key_value_heads", None) or heads) * head,
        intermediate=config.intermediate_size,
        vocabulary=config.vocab_size,
        windows=windows,
    )


def _own_vision(vision) -> tuple[VisionShape, ProjectorShape]:
    """Of the Qwen-VL models, whose encoders differ in the names of their fields too."""
    hidden = getattr(vision, "embed_dim", None) or vision.hidden_size
    out = vision.hidden_size if hasattr(vision, "embed_dim") else vision.out_hidden_size
    intermediate = getattr(vision, "intermediate_size", None) or int(hidden * vision.mlp_ratio)
    whole = getattr(vision, "fullatt_block_indexes", None)
    windowed = 0 if whole is None else vision.depth - len({layer for layer in whole if layer < vision.depth})
    merge = vision.spatial_merge_size
    shape = VisionShape(
        layers=vision.depth,
        hidden=hidden,
        intermediate=intermediate,
        patch_values=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
        gated=whole is not None,  # Qwen2.5-VL has both
        windowed=windowed,
        window=vision.window_size // vision.patch_size if windowed else 0,
        merge=merge,
        frames_apart=True,
    )
    mergers = 1 + len(getattr(vision, "deepstack_visual_indexes", None) or ())
    wide = hidden * merge**2
    return shape, ProjectorShape(wide**2 * mergers, wide * out * mergers, normed=True, merged=merge**2)


def _tower(config, values: dict) -> VisionShape:
    from llava.model.multimodal_encoder.base import select_layers
    from llava.model.multimodal_encoder.hf_facts import FACTS

    if "spatial_merge_size" in values and "depth" in values:  # a Qwen-VL encoder taken alone, before its merger
        return _part_of_own(config, SimpleNamespace(**values))
    lacking = [name for name in ("num_hidden_layers", "hidden_size") if name not in values]
    if "intermediate_size" not in values and "mlp_ratio" not in values:
        lacking.append("intermediate_size")
    if lacking:
        raise LlavaError(
            f"{config.mm_vision_tower}: found no {', '.join(lacking)} in its encoder's config, by which operations are "
            "counted"
        )
    kind, layers = values.get("model_type"), values["num_hidden_layers"]
    if kind in _UNCOUNTED:
        raise LlavaError(f"{config.mm_vision_tower}: the config of a {kind} is not enough for operations to be counted")
    if kind == "siglip_vision_model":  # its last layer does not exist, whatever is selected
        used = layers - 1
    else:
        feature = getattr(config, "mm_vision_select_feature", None) or "patch"
        used = max(select_layers(feature, config.mm_vision_select_layer, layers + 1))
    patch = values["patch_size"]
    patch = patch[0] if isinstance(patch, (list, tuple)) else patch
    extra = int(kind == "clip_vision_model")
    if kind in FACTS:
        extra = sum(values[n] if isinstance(n, str) else n for n in FACTS[kind].prefix_tokens)
    intermediate, gated = _mlp(kind, values)
    return VisionShape(
        layers=used,
        hidden=values["hidden_size"],
        intermediate=intermediate,
        patch_values=values.get("num_channels", 3) * patch**2,
        gated=gated,
        extra=extra,
    )


def _part_of_own(config, vision) -> VisionShape:
    from llava.model.multimodal_encoder.base import select_layers

    feature = getattr(config, "mm_vision_select_feature", None) or "patch"
    used = max(select_layers(feature, config.mm_vision_select_layer, vision.depth + 1))
    shape, _ = _own_vision(vision)
    whole = getattr(vision, "fullatt_block_indexes", None)
    windowed = 0 if whole is None else used - len({layer for layer in whole if layer < used})
    return replace(shape, layers=used, windowed=windowed, merge=1)


def _mlp(kind: str | None, values: dict) -> tuple[int, bool]:
    """(width of a block's MLP, whether it is gated) of an encoder's config."""
    from llava.model.multimodal_encoder.hf_facts import FACTS

    if "mlp_ratio" not in values or (kind not in FACTS and values.get("intermediate_size")):
        return values["intermediate_size"], kind in _GATED or bool(values.get("use_gated_mlp"))
    wide = int(values["hidden_size"] * values["mlp_ratio"])  # of transformers' encoders that have a ratio, it counts
    if values.get("use_swiglu_ffn"):
        return (int(wide * 2 / 3) + 7) // 8 * 8, True
    return wide, False


def _projector(config, vision: VisionShape) -> ProjectorShape:
    from llava.model.multimodal_encoder.token_compressor import compression_geometry
    from llava.model.multimodal_projector.builder import MERGERS

    feature = getattr(config, "mm_vision_select_feature", None) or "patch"
    channels = vision.hidden * (4 if feature.startswith("slicefour_") else 5 if "m25811" in feature else 1)
    layout = {"keeps_extra": vision.extra > 0 and "cls_patch" in feature}
    if getattr(config, "use_token_compression", False):
        sides = config.compression_input_size, config.compression_output_size
        kernel = compression_geometry(*sides)[0]
        layout |= {"compressor": (channels * kernel) ** 2, "sides": sides}
    scales = [1]
    if getattr(config, "s2", False):
        scales = sorted(int(scale) for scale in str(config.s2_scales).split(","))
        layout["scales"] = sum((scale // scales[0]) ** 2 for scale in scales)
    channels *= len(scales)
    text, kind = config.hidden_size, getattr(config, "mm_projector_type", None) or "linear"
    if kind in MERGERS:
        wide = MERGED * channels
        if kind == "pooler":
            return ProjectorShape(wide * text, text**2, merged=MERGED, **layout)
        return ProjectorShape(wide**2, wide * text, normed=True, merged=MERGED, **layout)
    if kind == "identity":
        return ProjectorShape(0, 0, **layout)
    match = re.fullmatch(r"mlp(\d+)x(?:_res(\d+)x)?_gelu", kind)
    deep, blocks = (int(match[1]) - 1, int(match[2] or 0)) if match else (0, 0)
    return ProjectorShape(channels * text, (deep + 2 * blocks) * text**2, **layout)
