"""`PatchTokenizer`: from normalised images to the patches that are kept of them."""

from collections.abc import Mapping

import torch

from llava.config import patch_choice as choice
from llava.config.patch_choice import PatchChoice, check_importance, check_thresholds, check_together
from llava.errors import LlavaError
from llava.model.adaptive_patches.importance import patch_entropy, patch_laplacian, patch_reconstruction_error
from llava.model.adaptive_patches.layout import check_pixels, patch_grid, pooled
from llava.model.adaptive_patches.selection import (
    alphas_of,
    budget_selection,
    select_all_patches,
    select_patches_by_threshold,
    select_patches_by_threshold_v2,
    token_counts,
)

MEASURES = (patch_entropy, patch_laplacian, patch_reconstruction_error)
IMPORTANCES = dict(zip(choice.IMPORTANCES, MEASURES, strict=True))
METHODS = (*choice.METHODS, "all")


class PatchTokenizer:
    """Importance, selection and patches of images with one set of choices.

        maps = tokenizer.compute_importance_maps(images)
        masks, levels, tokens = tokenizer.construct_masks(maps)
        patches = tokenizer.construct_patch_groups(images, masks)

    Args:
        num_scales: how many patch sizes, each twice the one before.
        base_patch_size: the smallest, in pixels.
        thresholds: for v1, one for each size above the base, the smaller size first; [3.0, 2.0] is published for
            entropy. The other selections do not use them.
        mean, std: what the images were normalised with, one number a channel, of pixels as 0..1.
        method: the selection, v1 (the default), v2, budget or all; or, as published, the importance.
        patch_selection_method: the selection's published name.
        alpha: v2: threshold over the mean importance; budget: share of the base patches; v1 and all do not use it.
        importance: entropy (the default), laplacian, reconstruction (also called upsample_mse).
        patch_importance: its other published name.
        image_size: published; kept as it is given, since every call tells the size of its images.
        laplacian_aggregate: published; only mean, its default, exists here.

    Raises:
        LlavaError: values that cannot be or that contradict each other. The reconstruction error of every base patch is
            0, and a budget is spent by that of base patches, so these two do not go together.

    After `construct_masks` with budget, `last_budget_info` holds the figures of `budget_selection`: tensors [B] by the
    names base_tokens, base_small_tokens, budget, k, alpha and used_tokens; None with the other selections.
    """

    def __init__(
        self,
        num_scales: int,
        base_patch_size: int,
        thresholds,
        mean,
        std,
        method: str | None = None,
        patch_selection_method: str | None = None,
        alpha: float = 1.0,
        importance: str | None = None,
        *,
        patch_importance: str | None = None,
        image_size=None,
        laplacian_aggregate: str = "mean",
    ):
        if not isinstance(method, str | None):
            raise LlavaError(
                f"method: found {method!r}, expected a name; image_size, if it is given, is a keyword here"
            )
        if laplacian_aggregate != "mean":
            raise LlavaError(f"laplacian_aggregate: found {laplacian_aggregate!r}, expected mean")
        self.image_size = image_size
        importance = _either("importance", importance, "patch_importance", patch_importance, default=None)
        for name, value in {"num_scales": num_scales, "base_patch_size": base_patch_size}.items():
            if (choice.whole_number(value) or 0) < 1:
                raise LlavaError(f"{name}: found {value!r}, expected a positive whole number")
        num_scales, base_patch_size = int(num_scales), int(base_patch_size)
        measure = None if method is None or method in METHODS else check_importance(method, "method", also=METHODS)
        if importance is not None:
            importance = check_importance(importance)
        selection = method if measure is None else None
        self.importance = _either("method", measure, "importance", importance, default="entropy")
        self.method = _either("method", selection, "patch_selection_method", patch_selection_method, default="v1")
        self._check_method(self.method)
        if thresholds is not None or self.method == "v1":
            thresholds = check_thresholds(thresholds, num_scales)
        self.num_scales, self.base_patch_size, self.thresholds = num_scales, base_patch_size, thresholds
        self.mean, self.std = _channels("mean", mean), _channels("std", std)
        if len(self.mean) != len(self.std) or 0 in self.std:
            raise LlavaError(f"mean, std: found {mean!r}, {std!r}, expected as many of each, and no std of 0")
        self.alpha = alphas_of(alpha, 1)[0]
        self.last_budget_info: dict[str, torch.Tensor] | None = None

    @classmethod
    def from_choice(cls, choice: PatchChoice, base_patch_size: int, mean, std) -> "PatchTokenizer":
        """With the settings of a `PatchChoice`; of a range of alphas, the middle."""
        alpha = 1.0 if choice.middle is None else choice.middle
        method = {"method": choice.method, "importance": choice.importance, "alpha": alpha}
        return cls(choice.num_scales, base_patch_size, choice.thresholds, mean, std, **method)

    def _check_method(self, method) -> None:
        if method not in METHODS:
            raise LlavaError(f"patch_selection_method: found {method!r}, expected {', '.join(METHODS)}")
        check_together(method, self.importance)

    def compute_importance_maps(self, images) -> dict[int, torch.Tensor]:
        """{size: float64 [B, ceil(H/size), ceil(W/size)]} of images [B, C, H, W], normalised or uint8 pixels.

        A list of images [C, H, W] of one size is a batch too.

        Normalised pixels go back to whole numbers of 0..255, so that a picture has one importance whatever it was
        normalised with. That needs float32: bfloat16 does not tell neighbouring grey levels apart.
        """
        if isinstance(images, (list, tuple)) and len({getattr(image, "shape", None) for image in images}) == 1:
            images = torch.stack([torch.as_tensor(image) for image in images])
        if not isinstance(images, torch.Tensor) or images.ndim != 4 or images.shape[1] != len(self.mean):
            found = list(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
            raise LlavaError(f"images: found {found}, expected a tensor [B, {len(self.mean)}, H, W]")
        if images.dtype == torch.uint8:
            return IMPORTANCES[self.importance](images, self.base_patch_size, self.num_scales)
        mean, std = (images.new_tensor(x, dtype=torch.float32)[:, None, None] for x in (self.mean, self.std))
        pixels = images.float().mul(std).add_(mean).mul_(255).round_().clamp_(0, 255)
        return IMPORTANCES[self.importance](pixels, self.base_patch_size, self.num_scales)

    def construct_masks(self, maps, alpha=None, patch_selection_method: str | None = None, thresholds=None):
        """Select patches.

        Args:
            maps: as `compute_importance_maps` makes them; also arrays or nested lists, and [h, w] of a single image.
            alpha: in place of the tokenizer's own: a number, or one for each image.
            patch_selection_method: in place of the tokenizer's own: v1, v2, budget or all.
            thresholds: in place of the tokenizer's own.

        Returns:
            masks {size: bool [B, h, w]}, levels uint8 [B, H1, W1], and a list with the tokens of each image.

        Raises:
            LlavaError: values that cannot be. alpha and thresholds are used by their methods alone, as published.
        """
        maps = _batched(maps)
        if isinstance(maps, dict) and set(maps) != set(self._sizes()):
            raise LlavaError(f"maps: found sizes {sorted(maps)}, expected {self._sizes()}")
        method = self.method if patch_selection_method is None else patch_selection_method
        self._check_method(method)
        self.last_budget_info = None
        alpha = self.alpha if alpha is None else alpha
        thresholds = self.thresholds if thresholds is None else check_thresholds(thresholds, self.num_scales)
        if method == "v1":
            masks, levels = select_patches_by_threshold(maps, thresholds)
        elif method == "v2":
            masks, levels = select_patches_by_threshold_v2(maps, alpha)
        elif method == "budget":
            masks, levels, self.last_budget_info = budget_selection(maps, alpha)
        else:
            masks, levels = select_all_patches(maps)
        return masks, levels, token_counts(masks).tolist()

    def construct_patch_groups(self, images, masks) -> dict[int, torch.Tensor]:
        """Pixels of the kept patches, larger ones average-pooled to the base patch p.

        Returns:
            {size: [n, C, p, p]} in the order of the images and row-major within each; for one order over all sizes see
            `kept_patches` and `pooled_patches`.

        Raises:
            LlavaError: images that end inside a base patch, masks of another grid.
        """
        check_pixels(images, self.base_patch_size)
        groups = {}
        for level, size in enumerate(self._sizes(), start=1):
            grid = len(images), *(-(-side // size) for side in images.shape[2:])
            if size not in masks or tuple(masks[size].shape) != grid:
                found = list(masks[size].shape) if size in masks else "none"
                raise LlavaError(f"masks: size {size}: found {found}, expected {list(grid)} for these images")
            patches = patch_grid(images, size)
            whole, rest = masks[size][:, : patches.shape[1], : patches.shape[2]], masks[size]
            if int(whole.sum()) != int(rest.sum()):
                raise LlavaError(f"masks: size {size}: found a patch that sticks out over the image")
            groups[size] = pooled(patches[whole.bool()], level)
        return groups

    def _sizes(self) -> list[int]:
        return [self.base_patch_size << level for level in range(self.num_scales)]


def _either(name: str, value, other: str, other_value, default):
    """The one of two that is given; `LlavaError` where they contradict each other."""
    given = [x for x in (value, other_value) if x is not None]
    if len(given) == 2 and value != other_value:
        raise LlavaError(f"{name}, {other}: found {value!r} and {other_value!r}, expected one of them")
    return given[0] if given else default


def _batched(maps):
    """Importance maps as tensors [B, h, w]; what is none is left to the selection to refuse."""
    if not isinstance(maps, Mapping):
        return maps
    try:
        tensors = {size: torch.as_tensor(values) for size, values in maps.items()}
    except (TypeError, ValueError) as error:
        raise LlavaError(f"maps: found no tensors, arrays or lists of numbers ({error})") from None
    return {size: values[None] if values.ndim == 2 else values for size, values in tensors.items()}


def _channels(name: str, values) -> list[float]:
    try:
        return [float(value) for value in values]
    except (TypeError, ValueError):
        raise LlavaError(f"{name}: found {values!r}, expected one number a channel") from None
