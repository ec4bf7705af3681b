"""Qwen3-VL as transformers has it: learned positions in the vision encoder, whose middle layers feed the first layers
of the language model too (DeepStack, arXiv 2406.04334). All patches are kept, and no system text is added."""

import functools

from llava.config.keys import PATCH_KEYS
from llava.families.base import Family
from llava.families.qwen2_vl import Qwen2VL


class Qwen3VL(Qwen2VL):
    name, title = "qwen3_vl", "Qwen3-VL"
    model_types = ("qwen3_vl",)
    parts = Qwen2VL.parts | {"mm_mlp_adapter": ("model.visual.merger.", "model.visual.deepstack_merger_list.")}
    refused = Qwen2VL.refused | dict.fromkeys(("adaptive_patches", *PATCH_KEYS), "Qwen3-VL keeps all patches")
    keys = Qwen2VL.keys.difference(refused)
    system = None
    choose_patches, patch_choice = Family.choose_patches, Family.patch_choice

    def classes(self):
        return _classes()

    def set_run_choice(self, images, settings):
        return None


@functools.cache
def _classes():
    import transformers as stock

    from llava.model.qwen2_vl.processing import PillowProcessor
    from llava.model.qwen3_vl import Qwen3VLForConditionalGeneration

    class Qwen3VLProcessor(PillowProcessor, stock.Qwen3VLProcessor):
        stock_class, image_class = stock.Qwen3VLProcessor, stock.Qwen2VLImageProcessorPil

    return Qwen3VLForConditionalGeneration, Qwen3VLProcessor
