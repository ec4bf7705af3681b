"""What LLaVA does with a photo, as far as its config says: found without any weights.

The tower is built by the class that a training run would take, on PyTorch's meta device, so that its token layout,
compression and image processor are the real ones.
"""

import json
import os
from dataclasses import dataclass
from types import SimpleNamespace

from llava.errors import LlavaError
from llava.families.geometry import Geometry, View

# LLaVA-NeXT as published (CLIP ViT-L/14 at 336 pixels), for a call that names nothing else
GRID = "[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]"
CROP, PATCH = 336, 14
# (crop, patch) of towers in this project's own configs that no released LLaVA checkpoint has
KNOWN = {"lmms-lab-encoder/onevision-encoder-large": (448, 14)}


@dataclass(frozen=True, kw_only=True)
class CropGeometry(Geometry):
    """Of a tower with LLaVA-NeXT's image handling; `chooser` is its `PatchChooser`, or None."""

    chooser: object = None

    def view(self, photo, alone=True):
        from llava.images.processing import process_image
        from llava.model.multimodal_encoder.patch_choice import count_tokens

        aspect_ratio = self.rules.image_aspect_ratio if alone else "pad"
        pixels = process_image(photo, self.processor, aspect_ratio, self.rules.image_grid_pinpoints, self.native)
        made = f"pixel_values {list(pixels.shape)}"
        pixels = pixels if pixels.ndim == 4 else pixels[None]
        if self.chooser is None:
            return View(pixels, made)
        levels = self.chooser.levels(pixels)
        return View(pixels, made, levels[0], count_tokens(levels, self.merges))


def geometry(path, run=None, *, grid=None, crop=None, patch=None, image_aspect_ratio=None, mm_patch_merge_type=None):
    """As `Family.geometry`, and without a path LLaVA-NeXT as published.

    Args:
        grid: candidate resolutions of a CLIP-like tower of `crop` and `patch` pixels, in place of the path's.
        crop, patch: without a grid, pixels of a tower whose own config is out of reach.
        image_aspect_ratio, mm_patch_merge_type: in place of the checkpoint's.
    """
    if run is not None:
        return run_geometry(run, crop, patch)
    named = {"image_aspect_ratio": image_aspect_ratio, "mm_patch_merge_type": mm_patch_merge_type}
    named = {name: value for name, value in named.items() if value is not None}
    if path is not None and grid is None:
        return checkpoint_geometry(path, crop, patch, named)
    crop, patch = CROP if crop is None else crop, PATCH if patch is None else patch
    if grid is None and crop != CROP:
        raise LlavaError(f'--crop {crop}: expected a --grid of that crop, for example "(1x1),...,(2x2)"')
    source = "LLaVA-NeXT as published" if grid is None else "--grid"
    return plain_geometry(grid or GRID, crop, patch, source=source, **named)


def plain_geometry(
    grid: str,
    crop: int,
    patch: int,
    image_aspect_ratio: str = "anyres",
    mm_patch_merge_type: str = "spatial_unpad",
    source: str = "--grid",
) -> CropGeometry:
    """A CLIP-like tower of `crop` pixels in patches of `patch`, with `grid` as its candidate resolutions."""
    from transformers import CLIPImageProcessorPil

    from llava.images.geometry import parse_grid_pinpoints
    from llava.model.multimodal_encoder.base import FixedGrid
    from llava.model.vision_settings import check_merge_options
    from llava.model.visual_merge import MergeRules

    check_merge_options(mm_patch_merge_type, image_aspect_ratio)
    if not 0 < patch <= crop:
        raise LlavaError(f"--crop, --patch: found {crop}, {patch}, expected pixels, the patch not above the crop")
    if image_aspect_ratio == "native":
        raise LlavaError("image_aspect_ratio native: needs a tower's own rules; expected --config or --model-path")
    rules = MergeRules(
        mm_patch_merge_type=mm_patch_merge_type,
        image_aspect_ratio=image_aspect_ratio,
        image_grid_pinpoints=[list(pair) for pair in parse_grid_pinpoints(grid, crop)],
    )
    return CropGeometry(
        source=source,
        handling=f"{image_aspect_ratio}, merged as {mm_patch_merge_type}",
        processor=CLIPImageProcessorPil(size={"shortest_edge": crop}, crop_size={"height": crop, "width": crop}),
        rules=rules,
        token_grid=FixedGrid(crop // patch),
        native=None,
        patch=patch,
        layout=f"patch {patch} px",
        stock=True,
    )


def run_geometry(run, crop: int | None = None, patch: int | None = None) -> CropGeometry:
    """What a training run would do; `run` is a resolved `llava.config` run, `crop` and `patch` as `config_geometry`."""
    values = {name: run[name] for name in run.settings}
    if not values.get("vision_tower"):
        raise LlavaError(f"{run.config or 'command line'}: names no vision_tower, expected one")
    cfg = SimpleNamespace(**values, mm_vision_tower=values["vision_tower"])
    stored = _stored_tower(values["model_name_or_path"], values["vision_tower"])
    return config_geometry(SimpleNamespace(**{**vars(cfg), **stored}), run.config or "the command line", crop, patch)


def _stored_tower(checkpoint: str | None, tower: str) -> dict:
    """The tower's configs out of a checkpoint folder that a run starts from, where it is the same tower."""
    path = os.path.join(checkpoint or "", "config.json")
    if not checkpoint or not os.path.isfile(path):
        return {}
    with open(path, encoding="utf-8") as file:
        content = json.load(file)
    if content.get("mm_vision_tower") != tower:
        return {}
    return {key: content.get(key) for key in ("mm_vision_config", "mm_image_processor_config")}


def checkpoint_geometry(path: str, crop: int | None = None, patch: int | None = None, changes=None) -> CropGeometry:
    """What a checkpoint does; folder or hub id. `changes`: config values to use in place of its own."""
    from llava.model.builder import make_config, read_config
    from llava.model.families import model_classes, resolve_architecture

    values = read_config(path)
    _, config_class = model_classes(resolve_architecture(values, path))
    config = make_config(path, config_class, values, changes)
    if not getattr(config, "mm_vision_tower", None):
        raise LlavaError(f"{path}: names no vision tower, expected a checkpoint of a model that sees")
    return config_geometry(config, path, crop, patch)


def config_geometry(cfg, source: str, crop: int | None = None, patch: int | None = None) -> CropGeometry:
    """From a model's config, or anything with its attributes.

    Args:
        crop, patch: pixels, for a tower whose own config is out of reach.
    """
    from llava.images.geometry import parse_grid_pinpoints
    from llava.images.processing import processor_sides
    from llava.model.multimodal_encoder.builder import tower_type
    from llava.model.multimodal_projector.builder import MERGERS, ProjectedGrid
    from llava.model.vision_settings import check_combination, check_merge_options
    from llava.model.visual_merge import MergeRules, native_resolution

    rules = MergeRules.from_config(cfg)
    check_merge_options(rules.mm_patch_merge_type, rules.image_aspect_ratio)
    check_combination(cfg)
    tower = empty_tower(cfg, crop, patch)
    cfg.mm_vision_config = tower.config.to_dict()
    if rules.native and not tower.any_size:
        raise LlavaError(f"image_aspect_ratio native: the tower {cfg.mm_vision_tower} takes images of one size")
    if "anyres" in rules.image_aspect_ratio:  # a range is counted in crops of the whole image's side, as in training
        cfg.image_grid_pinpoints = parse_grid_pinpoints(
            getattr(cfg, "image_grid_pinpoints", None), processor_sides(tower.image_processor)[1]
        )
        rules = MergeRules.from_config(cfg)
    projector = getattr(cfg, "mm_projector_type", None) or "linear"
    kind, compressor = tower_type(cfg, cfg.mm_vision_tower), tower.token_compressor
    parts = [f"{cfg.mm_vision_tower} ({kind}), patch {tower.config.patch_size} px"]
    if compressor is not None:
        parts.append(
            f"compressed {compressor.input_grid_size}x{compressor.input_grid_size} -> "
            f"{compressor.output_grid_size}x{compressor.output_grid_size}"
        )
    chooser = tower.patch_chooser
    if chooser is not None:
        parts.append(f"adaptive patches ({chooser.choice.description})")
    parts.append(f"projector {projector}" + (", which merges four tokens to one" if projector in MERGERS else ""))
    return CropGeometry(
        source=source,
        handling=f"{rules.image_aspect_ratio}, merged as {rules.mm_patch_merge_type}",
        processor=tower.image_processor,
        rules=rules,
        token_grid=ProjectedGrid(tower.token_grid, projector),
        native=native_resolution(cfg),
        patch=tower.config.patch_size,
        layout="; ".join(parts),
        stock=kind in ("clip", "siglip") and compressor is None and projector not in MERGERS,
        choice=chooser and chooser.choice,
        chooser=chooser,
    )


def empty_tower(cfg, crop: int | None = None, patch: int | None = None):
    """The config's vision tower without weights.

    Raises:
        LlavaError: its config is out of reach; `crop` and `patch`, if given, stand in for it.
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
        processor_class = TOWERS[tower_type(cfg, name)].load().processor_class
        by_edge = "shortest_edge" in dict(processor_class().size)
        square = {"height": crop, "width": crop}
        cfg.mm_vision_config = {"image_size": crop, "patch_size": patch}
        cfg.mm_image_processor_config = {"size": {"shortest_edge": crop} if by_edge else square, "crop_size": square}
    try:
        with torch.device("meta"):
            return build_vision_tower(cfg, delay_load=True)
    except LlavaError as error:
        if crop is None and "no usable" in str(error):
            raise LlavaError(f"{error}; --crop and --patch (in pixels) stand in for it") from None
        raise
