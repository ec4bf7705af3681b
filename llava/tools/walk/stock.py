"""What transformers' own processors count for the same photo."""

from types import SimpleNamespace

from llava.images.geometry import parse_grid_pinpoints
from llava.images.processing import processor_sides


def stock_count(geometry, image_size: tuple[int, int]) -> tuple[str, int] | None:
    """(class, visual tokens) of transformers' processor for a photo of (width, height); None where it has none.

    LLaVA-NeXT cuts a map's unpadded side with int(x), transformers with int(round(x, 7)): where x falls short of a
    whole number by a rounding error, transformers keeps a row or column pair more.
    """
    rules = geometry.rules
    if not geometry.stock or rules.mm_patch_merge_type != "spatial_unpad" or "anyres" not in rules.image_aspect_ratio:
        return None
    crop_side, base_side = processor_sides(geometry.processor)
    tokens, grid = geometry.token_grid(crop_side, crop_side)
    if grid is None:
        return None
    pinpoints = [[h, w] for w, h in parse_grid_pinpoints(rules.image_grid_pinpoints, base_side)]
    width, height = image_size
    # made without tokenizer and files: the count needs none of them
    if rules.max_crops is None:
        from transformers import LlavaNextProcessor as Processor

        processor = Processor.__new__(Processor)
        processor.patch_size, processor.num_additional_image_tokens = geometry.patch, 0
    else:
        from transformers import LlavaOnevisionProcessor as Processor

        processor = Processor.__new__(Processor)
        processor.num_image_tokens, processor.vision_aspect_ratio = tokens, f"anyres_max_{rules.max_crops}"
    processor.image_processor = SimpleNamespace(image_grid_pinpoints=pinpoints)
    return Processor.__name__, processor._get_number_of_features(height, width, crop_side, crop_side)
