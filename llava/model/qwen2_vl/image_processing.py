"""Qwen2-VL's image processor that keeps large patches where a picture holds little."""

import os
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers.image_processing_utils import BatchFeature
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorKwargs,
    Qwen2VLImageProcessorPil,
)

from llava.config.patch_choice import NUM_SCALES, PUBLISHED, THRESHOLDS, check_alpha, check_thresholds, naming
from llava.errors import LlavaError
from llava.model.adaptive_patches import PatchChoice, PatchTokenizer, kept_patches, pooled_patches
from llava.model.qwen2_vl.layout import MERGE

# beginning of released models' names -> what their image processors say; the rest is the class's default
_SIZES = {"size": {"shortest_edge": 3136, "longest_edge": 12845056}}
RELEASED = {"Qwen/Qwen2-VL-": _SIZES, "Qwen/Qwen2.5-VL-": _SIZES}


class AdaptiveQwen2VLImageProcessorKwargs(Qwen2VLImageProcessorKwargs, total=False):
    # of any type: `PatchChoice` checks them, and takes numbers of numpy and torch too
    patch_selection_method: Any
    alpha: Any
    patch_thresholds: Any
    patch_importance: Any
    adaptive_patches: Any


class AdaptiveQwen2VLImageProcessor(Qwen2VLImageProcessorPil):
    """As transformers' Pillow image processor of Qwen2-VL, with patches of 14, 28 and 56 pixels.

    A patch of 28 or 56 pixels is average-pooled to 14 and becomes one row of `pixel_values`, one vision token.
    `image_grid_thw` stays the full grid, and `image_patch_levels` says what became of it: for every base patch, row by
    row and image by image, the level (1, 2, 3) of the patch that covers it. Method: APT (arXiv 2510.18091).

    Args (also of a call; saved with the processor under the published names):
        adaptive_patches: a `PatchChoice`, or its mapping ({"method": "budget", "alpha": 0.3}); None, the default, keeps
            all base patches, and everything is as in transformers. Of a range of alphas it has the middle.
        patch_selection_method, alpha, patch_thresholds, patch_importance: its published names, member by member.

    Raises:
        LlavaError: a choice that cannot be, or arguments of both forms that contradict each other.

    With patches to select, `device="cuda"` in a call selects, pools and normalises there what the host has resized, and
    leaves `pixel_values` there; the selection is the same.
    """

    patch_selection_method = None
    alpha = 1.0
    patch_thresholds = list(THRESHOLDS)  # noqa: RUF012, as transformers' own defaults
    patch_importance = "entropy"
    valid_kwargs = AdaptiveQwen2VLImageProcessorKwargs
    model_input_names = ["pixel_values", "image_grid_thw", "image_patch_levels"]  # noqa: RUF012

    def __init__(self, **kwargs):
        super().__init__(**_published(kwargs))

    @classmethod
    def from_dict(cls, image_processor_dict, **kwargs):
        return super().from_dict(image_processor_dict, **_published(kwargs))  # what is given stands above the file

    def preprocess(self, images, **kwargs) -> BatchFeature:
        return super().preprocess(images, **_published(kwargs))

    @property
    def adaptive_patches(self) -> PatchChoice | None:
        """What the four published attributes say together; set, it sets those that its method uses."""
        return PatchChoice.from_published(**{name: getattr(self, name) for name in PUBLISHED.values()})

    @adaptive_patches.setter
    def adaptive_patches(self, choice) -> None:
        for name, value in _published({"adaptive_patches": choice}).items():
            setattr(self, name, value)

    def completed(self, given: dict, names: dict[str, str]) -> PatchChoice | None:
        """Some members of a choice, the others as here; `names` are what messages call them."""
        return PatchChoice.completed(given, {member: getattr(self, name) for member, name in PUBLISHED.items()}, names)

    def to_dict(self) -> dict:
        """What is saved; it names transformers' class, which reads the same file and keeps all patches."""
        return _plain(super().to_dict()) | {"image_processor_type": "Qwen2VLImageProcessor"}

    def _preprocess(self, images, *, return_tensors=None, device=None, **settings) -> BatchFeature:
        choice = PatchChoice.from_published(**{name: settings.pop(name) for name in PUBLISHED.values()})
        if choice is None:
            return super()._preprocess(images, return_tensors=return_tensors, **settings)
        use = SimpleNamespace(**settings)
        patch_size = use.patch_size
        if use.merge_size != MERGE:
            raise LlavaError(f"merge_size: found {use.merge_size}, expected {MERGE} with adaptive patches")
        # it looks at pixels of 0..1
        selector = PatchTokenizer.from_choice(choice, patch_size, mean=[0.0] * 3, std=[1.0] * 3)
        rows, grids, maps = [], [], []
        for image in images:
            if use.do_resize:
                image = self.resize(image, size=use.size, resample=use.resample, factor=patch_size * MERGE)
            image = np.array(image, dtype=np.uint8 if image.dtype == np.uint8 else np.float32)
            pixels = torch.from_numpy(image)[None].contiguous().to(device)  # channel by channel, which is read faster
            # one read from the device: how many patches are kept of each size decides on shapes
            levels = select(pixels, selector, scale=1 / 255 if use.do_rescale else 1.0).cpu()
            # pooled before they are rescaled and normalised: both are then done for what is kept of the image alone
            patches = pooled_patches(pixels, kept_patches(levels, order="cells"), patch_size)
            if use.do_rescale:
                patches = patches.double().mul_(use.rescale_factor).float()  # in float64, as transformers has it
            if use.do_normalize:
                mean, std = (patches.new_tensor(values)[:, None, None] for values in (use.image_mean, use.image_std))
                patches = (patches - mean) / std
            # a picture is a clip whose frames are alike
            clips = patches[:, :, None].expand(-1, -1, use.temporal_patch_size, -1, -1)
            rows.append(clips.reshape(len(patches), -1))
            grids.append([1, *levels.shape[1:]])
            maps.append(levels.flatten().numpy())
        rows = torch.cat(rows)
        data = {
            "pixel_values": rows if return_tensors == "pt" else rows.cpu().numpy(),
            "image_grid_thw": np.array(grids, dtype=np.int64),
            "image_patch_levels": np.concatenate(maps),
        }
        return BatchFeature(data=data, tensor_type=return_tensors)


def load_image_processor(path: str) -> tuple[AdaptiveQwen2VLImageProcessor, bool]:
    """The image processor of a folder or hub id, and whether it is as published: for a released model that is not
    here, nothing is asked of the hub.

    Raises:
        LlavaError: there is none.
    """
    known = [] if os.path.isdir(path) else [RELEASED[name] for name in RELEASED if path.startswith(name)]
    try:
        return AdaptiveQwen2VLImageProcessor.from_pretrained(path, local_files_only=bool(known)), False
    except (OSError, ValueError) as error:
        if not known:
            raise LlavaError(f"{path}: no image processor ({str(error).splitlines()[0][:160]})") from None
        return AdaptiveQwen2VLImageProcessor(**known[0]), True


def _published(kwargs: dict) -> dict:
    """Arguments with the published names in place of `adaptive_patches`."""
    if "adaptive_patches" not in kwargs:
        return _plain(kwargs)
    rest = {name: value for name, value in kwargs.items() if name != "adaptive_patches"}
    choice = PatchChoice.from_mapping(kwargs["adaptive_patches"])
    if choice is not None and choice.num_scales != NUM_SCALES:
        raise LlavaError(f"adaptive_patches: num_scales: found {choice.num_scales}, expected {NUM_SCALES} (Qwen2-VL)")
    said = {"patch_selection_method": None} if choice is None else choice.to_published()
    for name, value in said.items():
        if rest.get(name, value) != value:
            raise LlavaError(f"adaptive_patches: found {value!r} and {name} {rest[name]!r}, expected one of the two")
    return rest | said


def _plain(kwargs: dict) -> dict:
    """Arguments whose alpha and thresholds are plain floats, as a saved file has them."""
    known = {"alpha": check_alpha, "patch_thresholds": partial(check_thresholds, num_scales=NUM_SCALES)}
    with naming(PUBLISHED):
        given = {name: check(kwargs[name]) for name, check in known.items() if kwargs.get(name) is not None}
    return kwargs | {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}


def select(pixels: torch.Tensor, selector: PatchTokenizer, scale: float) -> torch.Tensor:
    """Levels [1, h, w] of one image [1, C, H, W]; pixels times `scale` are 0..1."""
    height, width = pixels.shape[2:]
    cell = selector.base_patch_size * MERGE
    if height % cell or width % cell:
        raise LlavaError(f"an image of {width}x{height} pixels, expected multiples of {cell} where do_resize is off")
    if pixels.dtype != torch.uint8 or scale != 1 / 255:
        pixels = pixels.float() * scale
    return selector.construct_masks(selector.compute_importance_maps(pixels))[1]
