"""What differs between the vision backbones of transformers, one row per `model_type`.

Read from each model's own code and published preprocessor_config.json. Statistics are those the weights were trained
with; they count only where the encoder's folder has no preprocessor_config.json.
"""

from dataclasses import dataclass

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
    size: the config's field that holds the pixels of a side of a picture.
    side: those pixels, where the config does not say them.
    interpolates: other sizes than its own: "always" by itself, "asked" with an argument, "native" where the config's
        `is_native` says so, "" never.
    any_size: pictures of any size and aspect.
    processor: transformers' Pillow processor of the type; None where it has none, and the project's own rule is used.
    hidden_states: how they come, a key of `hf_states.KINDS`, which says of each whether the last has the final norm.
    statistics, resample: mean and std, interpolation.
    unused: modules and parameters that no hidden state needs.
    embeds_tuples: its patch embedding returns more than a tensor, of which transformers' hook for gradient
        checkpointing, which asks a gradient of it, knows nothing.
    weight_prefix: what stands before the encoder's weights in the checkpoint of a larger model.
    """

    name: str
    prefix_tokens: tuple[int | str, int | str] = (1, 0)
    blocks: str = "encoder.layer"
    patch: str = "patch_size"
    strides: tuple[int, ...] = ()
    size: str = "image_size"
    side: int = 0
    interpolates: str = "always"
    any_size: bool = False
    processor: str | None = None
    hidden_states: str = "tokens"
    statistics: tuple = IMAGENET
    resample: int = BICUBIC
    final_norm: str = "layernorm"
    unused: tuple[str, ...] = ()
    weight_prefix: str = ""
    embeds_tuples: bool = False

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

    def stage_width(self, config, stage: int) -> int:
        """Channels of a token at a stage, from 1."""
        widths = getattr(config, "hidden_sizes", None) or config.embed_dim
        if isinstance(widths, (list, tuple)):
            return widths[stage - 1]
        return int(widths * getattr(config, "embed_dim_multiplier", 2) ** (stage - 1))


def side_of(value) -> int:
    """A size in pixels that a config gives as a number or as [height, width]."""
    return int(value[0] if isinstance(value, (list, tuple)) else value)


# --- rows that several types share, or a type and the larger model that it is a half of ---

_CLIP, _BIT, _VIT = "CLIPImageProcessorPil", "BitImageProcessorPil", "ViTImageProcessorPil"
_PYRAMID = (4, 8, 16, 32)
_TOKENS = ("pooler", "embeddings.mask_token")  # of a ViT for classification, or for masked images
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
_CLIP_LIKE = dict(
    blocks="encoder.layers",
    interpolates="asked",
    processor=_CLIP,
    statistics=OPENAI,
    final_norm="post_layernorm",
    weight_prefix="vision_model.",
)
_METACLIP2 = Facts("MetaClip2Vision", **_CLIP_LIKE)
_ALTCLIP = Facts("AltCLIPVision", **_CLIP_LIKE)
_CHINESE_CLIP = Facts("ChineseCLIPVision", **{**_CLIP_LIKE, "processor": "ChineseCLIPImageProcessorPil"})
_BLIP_LIKE = _CLIP_LIKE | dict(processor="BlipImageProcessorPil")
_BLIP = Facts("BlipVision", **_BLIP_LIKE)
_BLIP2 = Facts("Blip2Vision", **_BLIP_LIKE)
_TIPS2 = Facts(
    "Tipsv2Vision",
    prefix_tokens=(1, "num_register_tokens"),
    any_size=True,
    statistics=NONE,
    resample=BILINEAR,
    unused=("embeddings.mask_token",),
    weight_prefix="vision_model.",
)
_INTERNVL = Facts(
    "InternVLVision",
    processor="GotOcr2ImageProcessorPil",
    hidden_states="normed",
    unused=("embeddings.mask_token",),
    weight_prefix="vision_tower.",
)

_SAM = dict(
    prefix_tokens=(0, 0),
    blocks="vision_encoder.layers",
    interpolates="",
    processor="SamImageProcessorPil",
    hidden_states="grids",
    resample=BILINEAR,
    final_norm="",
    unused=("vision_encoder.neck",),
)
_VIT_LIKE = dict(blocks="layers", interpolates="asked", processor=_VIT, unused=_TOKENS)
_BEIT = dict(processor="BeitImageProcessorPil", statistics=HALF, unused=_TOKENS)
_SWIN = dict(
    prefix_tokens=(0, 0),
    blocks="encoder.layers",
    strides=_PYRAMID,
    interpolates="asked",
    processor=_VIT,
    hidden_states="before_merging",
    unused=_TOKENS,
    embeds_tuples=True,
)
_CONVOLUTIONS = _CONVNEXT | dict(patch="", side=224, unused=("pooler",), final_norm="")
_OF_STAGES = _CONVOLUTIONS | dict(hidden_states="stages")

FACTS = {
    # clip-like halves of larger models
    "siglip2": _SIGLIP2,
    "siglip2_vision_model": _SIGLIP2,
    "aimv2": _AIMV2,
    "aimv2_vision_model": _AIMV2,
    "mlcd": _MLCD,
    "mlcd_vision_model": _MLCD,
    "metaclip_2": _METACLIP2,
    "metaclip_2_vision_model": _METACLIP2,
    "altclip": _ALTCLIP,
    "altclip_vision_model": _ALTCLIP,
    "chinese_clip": _CHINESE_CLIP,
    "chinese_clip_vision_model": _CHINESE_CLIP,
    "tipsv2": _TIPS2,
    "tipsv2_vision_model": _TIPS2,
    "blip": _BLIP,
    "blip_vision_model": _BLIP,
    "blip-2": _BLIP2,
    "blip_2_vision_model": _BLIP2,
    "internvl": _INTERNVL,
    "internvl_vision": _INTERNVL,
    # segment anything: blocks of one width, positions of one size, and no class token
    "sam": Facts("SamVision", **_SAM),
    "sam_vision_model": Facts("SamVision", **_SAM),
    "sam_hq": Facts("SamHQVision", **_SAM),
    "sam_hq_vision_model": Facts("SamHQVision", **_SAM),
    # ViTs
    "vit": Facts("ViT", **_VIT_LIKE, statistics=HALF, resample=BILINEAR),
    "vit_mae": Facts("ViTMAE", **_VIT_LIKE),
    "vit_msn": Facts("ViTMSN", **_VIT_LIKE, resample=BILINEAR),
    "deit": Facts("DeiT", (1, 1), **{**_VIT_LIKE, "processor": "DeiTImageProcessorPil"}),
    "ijepa": Facts("IJepa", (0, 0), **_VIT_LIKE),
    "beit": Facts("Beit", blocks="layers", resample=BILINEAR, **_BEIT),
    "data2vec-vision": Facts("Data2VecVision", embeds_tuples=True, **_BEIT),
    "dinov2": Facts("Dinov2", processor=_BIT, **_DINOV2),
    "dinov2_with_registers": Facts("Dinov2WithRegisters", (1, "num_register_tokens"), processor=_BIT, **_DINOV2),
    "dinov3_vit": Facts(
        "DINOv3ViT", (1, "num_register_tokens"), "model.layer", resample=BILINEAR, final_norm="norm", **_DINOV2
    ),
    "pixio": Facts("Pixio", ("n_cls_tokens", 0), "layers", any_size=True, processor=_BIT),
    "radio": Facts(
        "Radio", prefix_tokens=("num_cls_tokens", "num_registers"), any_size=True, statistics=NONE, final_norm=""
    ),
    "vjepa2": Facts(
        "VJEPA2",
        prefix_tokens=(0, 0),
        size="crop_size",
        interpolates="",
        resample=BILINEAR,
        final_norm="encoder.layernorm",
        unused=("predictor",),
    ),
    # a feature map at each stage
    "convnext": Facts("ConvNext", **_CONVNEXT),
    "convnextv2": Facts("ConvNextV2", **_CONVNEXT),
    "dinov3_convnext": Facts(
        "DINOv3ConvNext",
        **_CONVNEXT | dict(blocks="model.stages", patch="", processor=None, resample=BILINEAR, final_norm="layer_norm"),
    ),
    "resnet": Facts("ResNet", **_CONVOLUTIONS),
    "regnet": Facts("RegNet", **_CONVOLUTIONS),
    "cvt": Facts("Cvt", **_OF_STAGES),
    "segformer": Facts(
        "Segformer",
        **_OF_STAGES | dict(blocks="stages", side=512, processor="SegformerImageProcessorPil", resample=BILINEAR),
    ),
    "pvt_v2": Facts("PvtV2", **_OF_STAGES | dict(blocks="encoder.layers", processor="PvtImageProcessorPil")),
    "swin": Facts("Swin", **_SWIN),
    "swinv2": Facts("Swinv2", **_SWIN),
    "hiera": Facts(
        "Hiera",
        prefix_tokens=(0, 0),
        blocks="encoder.stages",
        patch="patch_stride",
        strides=_PYRAMID,
        interpolates="",
        processor=_BIT,
        hidden_states="rerolled",
        final_norm="",
        unused=("pooler",),
        embeds_tuples=True,
    ),
}

# types that exist only as code of their own repository -> what to take in their place
REMOTE = {
    "intern_vit_6b": "a checkpoint of InternVL that transformers knows (internvl, its names end in -hf)",
    "internvl_chat": "a checkpoint of InternVL that transformers knows (internvl, its names end in -hf)",
    "eva_clip": "the same encoder of timm, as timm:eva02_large_patch14_clip_336",
    "MOONSHOT_MoonViT": "another encoder of any size, such as siglip2 (NaFlex)",
    "moonvit": "another encoder of any size, such as siglip2 (NaFlex)",
}
