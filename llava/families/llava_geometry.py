"""What LLaVA does with a photo, as far as its config says: found without any weights."""

import json
import os
from dataclasses import dataclass
from types import SimpleNamespace

from llava.config.own_tower import own_classes, same_class
from llava.config.resolve import CHECKPOINT
from llava.errors import LlavaError
from llava.families.geometry import Geometry, View
from llava.families.llava_layout import vision_layout

# LLaVA-NeXT as published (CLIP ViT-L/14 at 336 pixels), for a call that names nothing else
GRID = "[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]"
CROP, PATCH = 336, 14


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
    return config_geometry(run_config(run), run.config or "the command line", crop, patch)


def run_config(run) -> SimpleNamespace:
    """The vision side of the config that a resolved run's model will have.

    Raises:
        LlavaError: the run names no tower.
    """
    values = {name: run[name] for name in run.settings}
    if not values.get("vision_tower"):
        raise LlavaError(f"{run.config or 'command line'}: names no vision_tower, expected one")
    stored = _stored_tower(values["model_name_or_path"], values["vision_tower"])
    cfg = SimpleNamespace(**{**values, "mm_vision_tower": values["vision_tower"], **stored})
    own = next((key for key in ("vision_tower", "mm_vision_tower_type") if own_classes(values[key])), None)
    if own and run.source(own) == CHECKPOINT:
        cfg._name_or_path = values["model_name_or_path"]  # whose word alone runs no code
    return cfg


def _stored_tower(checkpoint: str | None, tower: str) -> dict:
    """The tower's configs out of a checkpoint folder that a run starts from, where it is the same tower."""
    path = os.path.join(checkpoint or "", "config.json")
    if not checkpoint or not os.path.isfile(path):
        return {}
    with open(path, encoding="utf-8") as file:
        content = json.load(file)
    had = content.get("mm_vision_tower")
    if had != tower and not same_class(had, tower):
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
    from llava.model.multimodal_encoder.builder import tower_type

    try:
        layout = vision_layout(cfg, crop, patch)
    except LlavaError as error:
        if crop is None and "no usable" in str(error):
            raise LlavaError(f"{error}; --crop and --patch (in pixels) stand in for it") from None
        raise
    tower, rules, token_grid = layout.tower, layout.rules, layout.token_grid
    kind, compressor = tower_type(cfg, cfg.mm_vision_tower), tower.token_compressor
    parts = [f"{cfg.mm_vision_tower} ({kind}), patch {tower.patch_size} px"]
    if compressor is not None:
        parts.append(
            f"compressed {compressor.input_grid_size}x{compressor.input_grid_size} -> "
            f"{compressor.output_grid_size}x{compressor.output_grid_size}"
        )
    chooser = tower.patch_chooser
    if chooser is not None:
        parts.append(f"adaptive patches ({chooser.choice.description})")
    parts.append(f"projector {token_grid.kind}" + (", which merges four tokens to one" if token_grid.merges else ""))
    return CropGeometry(
        source=source,
        handling=f"{rules.image_aspect_ratio}, merged as {rules.mm_patch_merge_type}",
        processor=tower.image_processor,
        rules=rules,
        token_grid=token_grid,
        native=layout.native,
        patch=tower.patch_size,
        layout="; ".join(parts),
        stock=kind in ("clip", "siglip") and compressor is None and not token_grid.merges,
        choice=chooser and chooser.choice,
        chooser=chooser,
    )
