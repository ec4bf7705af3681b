"""Pixels of an encoder of transformers: by the Pillow processor of its type, or by this project's own rule.

Either way a picture has exactly the size that the encoder sees. The margin that some published processors resize to and
then cut off belongs to classification, and would cut text off at a picture's edges.
"""

from .hf_facts import Facts


def processor_class(facts: Facts):
    """The class whose objects make the pixels.

    The type's own where all that it does is to resize, crop, rescale and normalise. Those with a size or a layout of
    their own (ConvNeXt's margin, InternVL's tiles, SAM's padding, NaFlex's rows of patches) cannot show every size that
    is asked for; there, and where transformers has none for Pillow, CLIP's does it with the statistics and the
    interpolation of the type.
    """
    import transformers
    from transformers.image_processing_backends import PilBackend

    found = getattr(transformers, facts.processor, None) if facts.processor else None
    plain = found is not None and found.resize is PilBackend.resize and found._preprocess is PilBackend._preprocess
    return found if plain else transformers.CLIPImageProcessorPil


def read_processor(source: str, facts: Facts, side: int):
    """The processor for pictures of `side` x `side` pixels.

    Args:
        source: folder or hub id of the encoder. Statistics, interpolation and whether the shape is squashed or cropped
            come from its preprocessor_config.json; where it has none, from `facts`, and the picture is cropped.
    """
    from transformers.image_processing_base import ImageProcessingMixin

    mean, std = facts.statistics
    try:
        values = ImageProcessingMixin.get_image_processor_dict(source)[0]
    except (OSError, ValueError):
        values = {}
    square = {"height": side, "width": side}
    squashed = bool(values) and _squashed(values.get("size"), facts)
    return processor_class(facts)(
        size=square if squashed else {"shortest_edge": side},
        crop_size=square,
        do_resize=True,
        do_center_crop=not squashed,
        do_rescale=True,
        resample=values.get("resample", facts.resample),
        image_mean=values.get("image_mean") or list(mean),
        image_std=values.get("image_std") or list(std),
        do_normalize=values.get("do_normalize", True),
        rescale_factor=values.get("rescale_factor", 1 / 255),
    )


def _squashed(size, facts: Facts) -> bool:
    """Whether a published size says that a picture's aspect is given up, rather than its edges."""
    import transformers

    if isinstance(size, dict):
        return "shortest_edge" not in size
    own = getattr(
        transformers, facts.processor or "", None
    )  # an older file has a number, which each type reads its way
    return getattr(own, "default_to_square", True) is not False
