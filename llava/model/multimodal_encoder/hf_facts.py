"""What differs between the vision backbones of transformers, one row per `model_type`.

Read from each model's own code and published preprocessor_config.json. Statistics are those the weights were trained
with; they count only where the encoder's folder has no preprocessor_config.json.
"""

from dataclasses import dataclass, replace

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
NONE = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # normalised inside the model
BILINEAR, BICUBIC = 2, 3  # Pillow's numbers


@dataclass(frozen=True)
class Facts:
    """One type of encoder.

    name: transformers' `nameConfig` and `nameModel`.
    prefix_tokens: counts of class tokens and of registers before the patches: numbers, or fields of the config.
    patch: the config's field that holds the pixels of a side of a patch; "" where the config has none and the first of
        `strides` is meant.
    blocks: where the model holds its blocks, or stages.
    strides: pixels of a side of a token, stage by stage, of an encoder that gives a feature map at each of them; () of
        one that gives tokens of one size. In the shape that is published: a config with another patch has others
        (`stage_strides`).
    interpolates: other sizes than its own: "always" by itself, "asked" with an argument, "native" where the config's
        `is_native` says so, "" never.
    any_size: pictures of any size and aspect.
    processor: transformers' Pillow processor of the type; None where it has none, and the project's own rule is used.
    hidden_states: how they come: "tokens" [B, T, D], the embeddings first and the last without the final norm;
        "normed" the same, the last with the final norm; "maps" [B, D, h, w], that of stage i at i.
    statistics, resample: mean and std, interpolation.
    unused: modules and parameters that no hidden state needs.
    weight_prefix: what stands before the encoder's weights in the checkpoint of a larger model.
    """

    name: str
    prefix_tokens: tuple[int | str, int | str] = (1, 0)
    blocks: str = "encoder.layer"
    patch: str = "patch_size"
    strides: tuple[int, ...] = ()
    interpolates: str = "always"
    any_size: bool = False
    processor: str | None = None
    hidden_states: str = "tokens"
    statistics: tuple = IMAGENET
    resample: int = BICUBIC
    final_norm: str = "layernorm"
    unused: tuple[str, ...] = ()
    weight_prefix: str = ""

    def prefix(self, config) -> tuple[int, int]:
        """(class tokens, registers) of a config."""
        return tuple(getattr(config, n) if isinstance(n, str) else n for n in self.prefix_tokens)

    def patch_of(self, config) -> int:
        """Pixels of a side of a patch of a config, before any stage makes larger tokens of them."""
        return side_of(getattr(config, self.patch)) if self.patch else self.strides[0]

    def stage_strides(self, config) -> tuple[int, ...]:
        """Pixels of a side of a token at each stage that a config has; () of an encoder without stages."""
        if not self.strides:
            return ()
        patch = self.patch_of(config)
        return tuple(patch * stride // self.strides[0] for stride in self.strides[: len(config.depths)])


def side_of(value) -> int:
    """A size in pixels that a config gives as a number or as [height, width]."""
    return int(value[0] if isinstance(value, (list, tuple)) else value)


_CLIP, _BIT, _VIT = "CLIPImageProcessorPil", "BitImageProcessorPil", "ViTImageProcessorPil"
_PYRAMID = (4, 8, 16, 32)
_DINOV2 = dict(any_size=True, unused=("embeddings.mask_token",))
_CONVNEXT = dict(
    prefix_tokens=(0, 0),
    blocks="encoder.stages",
    strides=_PYRAMID,
    processor="ConvNextImageProcessorPil",
    hidden_states="maps",
)
_AIMV2 = Facts(
    "Aimv2Vision",
    prefix_tokens=(0, 0),
    blocks="encoder.layers",
    interpolates="native",
    processor=_CLIP,
    statistics=OPENAI,
    final_norm="rms_norm",
    unused=("head",),
    weight_prefix="vision_model.",
)
_SIGLIP2 = Facts(
    "Siglip2Vision",
    prefix_tokens=(0, 0),
    blocks="encoder.layers",
    any_size=True,
    processor="Siglip2ImageProcessorPil",
    statistics=HALF,
    resample=BILINEAR,
    final_norm="post_layernorm",
    unused=("head",),
    weight_prefix="vision_model.",
)
_MLCD = Facts(
    "MLCDVision",
    blocks="encoder.layers",
    interpolates="always",
    processor=_CLIP,
    statistics=OPENAI,
    final_norm="post_layernorm",
    weight_prefix="vision_model.",
)
_METACLIP2 = Facts(
    "MetaClip2Vision",
    blocks="encoder.layers",
    interpolates="asked",
    processor=_CLIP,
    statistics=OPENAI,
    final_norm="post_layernorm",
    weight_prefix="vision_model.",
)
_INTERNVL = Facts(
    "InternVLVision",
    processor="GotOcr2ImageProcessorPil",
    hidden_states="normed",
    unused=("embeddings.mask_token",),
    weight_prefix="vision_tower.",
)

FACTS = {
    "siglip2": _SIGLIP2,
    "siglip2_vision_model": _SIGLIP2,
    "aimv2": _AIMV2,
    "aimv2_vision_model": _AIMV2,
    "mlcd": _MLCD,
    "mlcd_vision_model": _MLCD,
    "metaclip_2": _METACLIP2,
    "metaclip_2_vision_model": _METACLIP2,
    "internvl": _INTERNVL,
    "internvl_vision": _INTERNVL,
    "radio": Facts(
        "Radio", prefix_tokens=("num_cls_tokens", "num_registers"), any_size=True, statistics=NONE, final_norm=""
    ),
    "convnext": Facts("ConvNext", **_CONVNEXT),
    "convnextv2": Facts("ConvNextV2", **_CONVNEXT),
    "vit": Facts(
        "ViT",
        blocks="layers",
        interpolates="asked",
        processor=_VIT,
        statistics=HALF,
        resample=BILINEAR,
        unused=("pooler", "embeddings.mask_token"),
    ),
    "vit_mae": Facts("ViTMAE", blocks="layers", interpolates="asked", processor=_VIT),
    "ijepa": Facts(
        "IJepa",
        prefix_tokens=(0, 0),
        blocks="layers",
        interpolates="asked",
        processor=_VIT,
        unused=("pooler", "embeddings.mask_token"),
    ),
    "dinov3_vit": Facts(
        "DINOv3ViT", (1, "num_register_tokens"), "model.layer", resample=BILINEAR, final_norm="norm", **_DINOV2
    ),
    "dinov2_with_registers": Facts("Dinov2WithRegisters", (1, "num_register_tokens"), processor=_BIT, **_DINOV2),
    "dinov2": Facts("Dinov2", processor=_BIT, **_DINOV2),
}

# types that exist only as code of their own repository: what to take in their place
REMOTE = {"intern_vit_6b": "a checkpoint of InternVL that transformers knows (internvl, its names end in -hf)"}

# Encoders that take any size, images of all sizes in one row (`packed_vision`); rows of larger models are their vision
# halves. Positions are rotary, or learned and resized to each image's grid.
_PIXTRAL = Facts(
    "PixtralVision",
    prefix_tokens=(0, 0),
    blocks="transformer.layers",
    any_size=True,
    processor="PixtralImageProcessorPil",
    statistics=OPENAI,
    final_norm="",
    weight_prefix="vision_tower.",
)
_QWEN2_VL = Facts(
    "Qwen2VLVision",
    prefix_tokens=(0, 0),
    blocks="blocks",
    any_size=True,
    processor="Qwen2VLImageProcessorPil",
    statistics=OPENAI,
    final_norm="",
    weight_prefix="visual.",
)
_QWEN2_5_VL = replace(_QWEN2_VL, name="Qwen2_5_VLVision")
_QWEN3_VL = replace(_QWEN2_VL, name="Qwen3VLVision", statistics=HALF)
PACKED = {
    "siglip2": _SIGLIP2,
    "siglip2_vision_model": _SIGLIP2,
    "qwen2_vl": _QWEN2_VL,
    "qwen2_vl_vision": _QWEN2_VL,
    "qwen2_5_vl": _QWEN2_5_VL,
    "qwen2_5_vl_vision": _QWEN2_5_VL,
    "qwen3_vl": _QWEN3_VL,
    "qwen3_vl_moe": _QWEN3_VL,
    "qwen3_vl_moe_vision": _QWEN3_VL,
    "qwen3_vl_vision": _QWEN3_VL,
    "llava": _PIXTRAL,
    "mistral3": _PIXTRAL,
    "pixtral": _PIXTRAL,
}
FACTS |= PACKED
