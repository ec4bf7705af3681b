"""The vision side of a LLaVA model as its config describes it, found without any weights, and what must fit together.

The tower is built by the class that a training run would take, on PyTorch's meta device, so that its token layout,
compression and image processor are the real ones. Sizes are (width, height) in pixels.
"""

import contextlib
from dataclasses import dataclass

from llava.errors import LlavaError

# (crop, patch) of towers in this project's own configs that no released LLaVA checkpoint has
KNOWN = {"lmms-lab-encoder/onevision-encoder-large": (448, 14)}


@dataclass(frozen=True)
class VisionLayout:
    """Attributes:
    tower: without weights.
    rules: `MergeRules`.
    token_grid: `ProjectedGrid` of tower and projector.
    native: `NativeResolution`, or None.
    """

    tower: object
    rules: object
    token_grid: object
    native: object

    @property
    def pixels(self):
        from llava.images.processing import PixelOptions

        return PixelOptions(self.rules.image_aspect_ratio, self.rules.image_grid_pinpoints, self.native)

    @property
    def counter(self):
        from llava.model.visual_merge import VisualTokenCounter

        return VisualTokenCounter(self.rules, self.token_grid, self.tower.patch_size)

    @property
    def crop(self) -> int:
        """Side of the square that the image processor makes."""
        from llava.images.processing import processor_sides

        return processor_sides(self.tower.image_processor)[0]


def vision_layout(cfg, crop: int | None = None, patch: int | None = None) -> VisionLayout:
    """The layout that a model's config, or anything with its attributes, describes.

    Args:
        cfg: its `image_grid_pinpoints` are parsed and its `mm_vision_config` filled in.
        crop, patch: pixels, for a tower whose own config is out of reach.

    Raises:
        LlavaError: settings that do not go together, or a tower whose config cannot be had.
    """
    from llava.images.geometry import parse_grid_pinpoints
    from llava.images.processing import processor_sides
    from llava.model.multimodal_encoder.plain_config import config_values
    from llava.model.multimodal_projector.builder import ProjectedGrid
    from llava.model.vision_settings import check_combination, check_merge_options
    from llava.model.visual_merge import MergeRules, native_resolution

    rules = MergeRules.from_config(cfg)
    check_merge_options(rules.mm_patch_merge_type, rules.image_aspect_ratio)
    check_combination(cfg)
    tower = empty_tower(cfg, crop, patch)
    cfg.mm_vision_config = config_values(tower.config)
    if rules.native and not tower.any_size:
        raise LlavaError(
            f"image_aspect_ratio native: the tower {cfg.mm_vision_tower} takes images of one size; expected one that "
            "takes any (hevc_vit, hevc_vit_packing, packed_vision, dinov2), or square, pad or anyres"
        )
    side = tower.image_size
    if rules.native and tower.token_grid(side, side)[1] is None:
        raise LlavaError(
            f"image_aspect_ratio native: mm_vision_select_feature {tower.select_feature} of {cfg.mm_vision_tower} has "
            "a class token, which has no place in rows of tokens; expected patch"
        )
    if "anyres" in rules.image_aspect_ratio:  # a range is counted in crops of the whole image's side, as in training
        cfg.image_grid_pinpoints = parse_grid_pinpoints(
            getattr(cfg, "image_grid_pinpoints", None), processor_sides(tower.image_processor)[1]
        )
        rules = MergeRules.from_config(cfg)
    projector = getattr(cfg, "mm_projector_type", None) or "linear"
    return VisionLayout(tower, rules, ProjectedGrid(tower.token_grid, projector), native_resolution(cfg))


def empty_tower(cfg, crop: int | None = None, patch: int | None = None):
    """The config's vision tower without weights.

    Raises:
        LlavaError: its config cannot be had (`OutOfReach`, if it is no folder here), or it cannot be built so.
    """
    import torch

    from llava.model.multimodal_encoder.builder import TOWERS, build_vision_tower, tower_type
    from llava.model.multimodal_encoder.published import PUBLISHED

    name = cfg.mm_vision_tower
    if (crop is None) != (patch is None):
        raise LlavaError("--crop and --patch: only used together, expected both or neither")
    if crop is None and getattr(cfg, "mm_vision_config", None) is None:  # what is known needs no network
        crop, patch = KNOWN.get(name, (None, None))
        if name in PUBLISHED:
            cfg.mm_vision_config, cfg.mm_image_processor_config = PUBLISHED[name]
    if crop is not None:
        kind = tower_type(cfg, name)
        if kind not in TOWERS:
            raise LlavaError(f"--crop and --patch: {kind} is a class of its own, which says them; expected neither")
        processor_class = TOWERS[kind].load().processor_class
        by_edge = "shortest_edge" in dict(processor_class().size)
        square = {"height": crop, "width": crop}
        cfg.mm_vision_config = {"image_size": crop, "patch_size": patch}
        cfg.mm_image_processor_config = {"size": {"shortest_edge": crop} if by_edge else square, "crop_size": square}
    with torch.device("meta"), _whole():
        return build_vision_tower(cfg, delay_load=True)


@contextlib.contextmanager
def _whole():
    """Under ZeRO-3 transformers would split what is built over the ranks."""
    from transformers.integrations import deepspeed

    if not deepspeed.is_deepspeed_zero3_enabled():
        yield
        return
    holder = deepspeed._hf_deepspeed_config_weak_ref()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed.set_hf_deepspeed_config(holder)


def check_layout(layout: VisionLayout, kind: str) -> None:
    """Whether pictures of a kind, "image" or "video", become visual tokens at all; what they show does not matter.

    The pixels' shapes are those of the tower's image processor, and the tokens are counted by the merge itself.

    Raises:
        LlavaError: the settings fit no picture.
    """
    from llava.images.processing import pixel_shape

    _check_crop(layout)
    if kind == "video":
        sizes = [(layout.crop, layout.crop)]
    elif layout.native is not None:
        sizes = [(4 * layout.crop, layout.crop), (layout.crop, layout.crop)]
    else:
        sizes = [tuple(size) for size in layout.rules.image_grid_pinpoints or ()] or [(layout.crop, layout.crop)]
        _check_grid(layout)
    count = layout.counter
    for size in sizes:
        shape = pixel_shape(size, layout.tower.image_processor, layout.pixels, pictures=2 if kind == "video" else 1)
        shape = (2, *shape[-3:]) if kind == "video" else shape
        try:
            count(shape, size, kind)
        except RuntimeError as error:  # a grid that is too small to be pooled
            width, height = shape[-1], shape[-2]
            raise LlavaError(
                f"mm_patch_merge_type {layout.rules.mm_patch_merge_type!r}: found {width}x{height} pixels, a grid of "
                f"{layout.token_grid(height, width)[1]} tokens, which cannot be merged so ({error})"
            ) from None


def _check_crop(layout: VisionLayout) -> None:
    """The image processor's square is one that the encoder takes."""
    tower, side = layout.tower, layout.crop
    patch = tower.patch_size
    if tower.any_size and side % patch:
        raise LlavaError(
            f"vision tower {tower.vision_tower_name}: its image processor makes {side}x{side} pixels, expected a "
            f"multiple of its patch of {patch}"
        )
    if not tower.any_size and side != tower.image_size:
        raise LlavaError(
            f"vision tower {tower.vision_tower_name}: its image processor makes {side}x{side} pixels, expected "
            f"{tower.image_size}x{tower.image_size}"
        )


def _check_grid(layout: VisionLayout) -> None:
    """Crops that are put back as one map cover a resolution exactly; kind flat just lines them up."""
    rules, side = layout.rules, layout.crop
    if "anyres" not in rules.image_aspect_ratio or rules.mm_patch_merge_type == "flat":
        return
    odd = next((pair for pair in rules.image_grid_pinpoints if pair[0] % side or pair[1] % side), None)
    if odd is not None:
        raise LlavaError(
            f"image_grid_pinpoints: found {odd[0]}x{odd[1]} pixels, expected multiples of {side}, the side of a crop "
            f"of the tower {layout.tower.vision_tower_name}"
        )
