"""The HEVC-ViT encoders (LlavaViT, OneVision-Encoder) for transformers 5, in a padded and a packed form.

Importing this package makes the three model types known to `AutoConfig` and `AutoModel`.
"""

from transformers import AutoConfig, AutoModel

from .configuration_llava_vit import (
    SIZES,
    LlavaViTConfig,
    LlavaViTPackingConfig,
    OneVisionEncoderConfig,
    named_config,
)
from .modeling_llava_vit import LlavaViTModel, OneVisionEncoderModel
from .modeling_llava_vit_packing import LlavaViTPackingModel
from .varlen_attention import varlen_attention

__all__ = [
    "SIZES",
    "LlavaViTConfig",
    "LlavaViTModel",
    "LlavaViTPackingConfig",
    "LlavaViTPackingModel",
    "OneVisionEncoderConfig",
    "OneVisionEncoderModel",
    "named_config",
    "varlen_attention",
]

for _config, _model in (
    (LlavaViTConfig, LlavaViTModel),
    (LlavaViTPackingConfig, LlavaViTPackingModel),
    (OneVisionEncoderConfig, OneVisionEncoderModel),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
