"""Qwen2-VL and Qwen2.5-VL that spend vision tokens where the picture has content: stock checkpoints, adaptive patches
(APT)."""

from llava.model.qwen2_vl.image_processing import AdaptiveQwen2VLImageProcessor
from llava.model.qwen2_vl.modeling import (
    AdaptiveQwen2_5_VLForConditionalGeneration,
    AdaptiveQwen2VLForConditionalGeneration,
)
from llava.model.qwen2_vl.processing import AdaptiveQwen2_5_VLProcessor, AdaptiveQwen2VLProcessor

__all__ = [
    "AdaptiveQwen2VLForConditionalGeneration",
    "AdaptiveQwen2VLImageProcessor",
    "AdaptiveQwen2VLProcessor",
    "AdaptiveQwen2_5_VLForConditionalGeneration",
    "AdaptiveQwen2_5_VLProcessor",
]
