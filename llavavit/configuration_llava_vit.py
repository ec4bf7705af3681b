"""Configs of the HEVC-ViT encoders: LlavaViT (padded), its packed twin, and OneVision-Encoder, the released name."""

from transformers import PreTrainedConfig

LAYER_NORM_TYPES = ("layer_norm", "rms_norm")
_COUNTS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_channels", "image_size", "patch_size"),
)
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI CLIP's statistics, which these encoders were trained with
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


class LlavaViTConfig(PreTrainedConfig):
    """Config of `LlavaViTModel`.

    Args:
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: as in any ViT; the width of a head must
            be a multiple of 32, so that its rotary frequencies split 4:6:6 over time, height and width.
        num_channels: channels of a pixel.
        image_size: side in pixels of the images the model is usually given; it takes others too.
        patch_size: side of a patch in pixels.
        hidden_act: activation of the MLPs.
        layer_norm_eps: of every norm.
        layer_norm_type: "layer_norm" or "rms_norm".
        attention_dropout: dropout on the attention weights in training.
        initializer_range: spread of random weights.
        rope_theta: base of the rotary frequencies.
        use_head: whether there are a last norm and a pooling head.
        head_norm_eps: eps of the pooling head's norm; None: `layer_norm_eps`. The models were trained with another one.

    Raises:
        ValueError: a size that is no count, an eps or theta that is no number above 0, a width of heads or a
            `layer_norm_type` that the model has no form for.
    """

    model_type = "llava_vit"

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 448
    patch_size: int = 16
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    layer_norm_type: str = "layer_norm"
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    rope_theta: float = 10000.0
    use_head: bool = True
    head_norm_eps: float | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        for name in _COUNTS:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: found {value!r}, expected a whole number from 1")
        for name in ("layer_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or value <= 0:
                raise ValueError(f"{name}: found {value!r}, expected a number above 0")
        if self.hidden_size % self.num_attention_heads or self.head_dim % 32:
            raise ValueError(
                f"hidden_size {self.hidden_size} with num_attention_heads {self.num_attention_heads}: "
                "expected heads of a width that is a multiple of 32"
            )
        if self.layer_norm_type not in LAYER_NORM_TYPES:
            raise ValueError(
                f"layer_norm_type: found {self.layer_norm_type!r}, expected one of {', '.join(LAYER_NORM_TYPES)}"
            )

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads


class LlavaViTPackingConfig(LlavaViTConfig):
    """Config of `LlavaViTPackingModel`: as `LlavaViTConfig`, and two keys that the published config has.

    Args:
        temporal_patch_size, spatial_merge_size: 1, the only value there is a model for.
    """

    model_type = "llava_vit_packing"

    temporal_patch_size: int = 1
    spatial_merge_size: int = 1

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        for name in ("temporal_patch_size", "spatial_merge_size"):
            if getattr(self, name) != 1:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected 1")


class OneVisionEncoderConfig(LlavaViTConfig):
    """Config of `OneVisionEncoderModel`, with the defaults of the released encoder (ViT-L/14).

    Args:
        rope_temporal_size: frames of the grid that `visible_indices` count in for video; None: the clip's own.
    """

    model_type = "onevision_encoder"

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    patch_size: int = 14
    rope_temporal_size: int | None = 64


def _size(patch: int, hidden: int, heads: int, layers: int, intermediate: int) -> dict:
    return {
        "patch_size": patch,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "intermediate_size": intermediate,
    }


# The published sizes. Two go by the name huge: the weights tell which one is meant.
SIZES = {
    "hf_llava_vit_small_ln": (_size(16, 384, 6, 6, 1536),),
    "hf_llava_vit_base_ln": (_size(16, 768, 12, 12, 3072),),
    "hf_llava_vit_large_ln": (_size(14, 1024, 16, 24, 4096),),
    "hf_llava_vit_huge_ln": (_size(14, 1536, 16, 27, 4608), _size(14, 1280, 20, 32, 5120)),
    "hf_llava_vit_giant_ln": (_size(14, 1536, 16, 40, 6144),),
}


def named_config(name: str, config_class=LlavaViTConfig, **changes) -> LlavaViTConfig:
    """Config of a published size: `named_config("hf_llava_vit_large_ln", LlavaViTPackingConfig, image_size=336)`.

    Raises:
        ValueError: no such name.
    """
    if name not in SIZES:
        raise ValueError(f"model name: found {name!r}, expected one of {', '.join(SIZES)}")
    return config_class(**SIZES[name][0] | changes)
