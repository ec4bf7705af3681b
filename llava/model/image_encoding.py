"""Tower and projector of a LLaVA model: from images to the tokens that are merged into the text.

Shapes: N images (or crops), n tokens of an image, D channels of the language model.
"""

import torch

from llava.errors import LlavaError
from llava.model.host import send
from llava.model.multimodal_projector.builder import MERGERS, ProjectedGrid
from llava.model.vision_chunks import ChunkedVision, plus


class ImageEncoding(ChunkedVision):
    """Mixin for a model that has `get_vision_tower()`, and a projector in `get_model()`."""

    @property
    def _projected_grid(self):
        kind = getattr(self.config, "mm_projector_type", None) or "linear"
        return ProjectedGrid(self.get_vision_tower().token_grid, kind)

    @property
    def _chooser(self):
        """How the tower chooses patches, None where it keeps all."""
        return self.get_vision_tower().patch_chooser

    def encode_images(self, images, patch_alphas=None, patch_levels=None):
        """Tower and projector, in any dtype; in one call each, or in chunks of `vision_micro_batch`.

        Args:
            images: [N, C, H, W]; or a list of [C, H, W], and of clips [T, C, H, W] where the tower sees time.
            patch_alphas: one for each image, where the tower chooses patches; None: its own.
            patch_levels: what it would choose, where that is known (`PatchChooser.levels_of`).

        Returns:
            [N, n, D]; or a list of [n_i, D], a clip's frames one after the other; always a list with adaptive patches.
        """
        if patch_alphas is not None and self._chooser is None:
            raise LlavaError(f"patch_alphas: found {len(patch_alphas)}, expected none: the tower keeps all patches")

        def encode(first, last):
            of_images = (part and part[first:last] for part in (patch_alphas, patch_levels))
            return self._encode_together(images[first:last], *of_images)

        def join(parts, zero):
            if isinstance(parts[0], torch.Tensor):
                return torch.cat(plus(parts, zero))
            return plus([features for part in parts for features in part], zero)

        frames = [len(image) if image.ndim == 4 else 1 for image in images]
        return self.in_chunks(frames, encode, lambda: self._encode_together(*self._blank())[0].sum(), join, self.device)

    def _encode_together(self, images, patch_alphas=None, patch_levels=None):
        """`encode_images` in one call of the tower and one of the projector."""
        tower, projector = self.get_vision_tower(), self.get_model().mm_projector
        kind = getattr(self.config, "mm_projector_type", None) or "linear"
        if self._chooser is not None:
            return self._encode_chosen(images, kind, patch_alphas, patch_levels)
        if isinstance(images, torch.Tensor):
            features = tower(self._as_wide(images)).to(self.dtype)
            grid = {"grid": tower.token_grid(*images.shape[-2:])[1]} if kind in MERGERS else {}
            return projector(features, **grid)
        packed = tower([*map(self._as_wide, images)], packed=True).to(
            self.dtype
        )  # one call for all of them, in the projector too
        frames = [image.shape[0] if image.ndim == 4 else 1 for image in images]
        if kind in MERGERS:
            grids = [tower.token_grid(*image.shape[-2:])[1] for image in images]
            packed = projector(packed, grids=[grid for grid, n in zip(grids, frames, strict=True) for _ in range(n)])
        else:
            packed = projector(packed)
        count_of = self._projected_grid
        return list(packed.split([count_of(*i.shape[-2:])[0] * n for i, n in zip(images, frames, strict=True)]))

    def _as_wide(self, image):
        """The image, in no narrower dtype than the model's: a tower's features come in the image's."""
        return image.to(torch.promote_types(image.dtype, self.dtype))

    def _encode_chosen(self, images, kind, patch_alphas, patch_levels):
        """`encode_images` on the patches that the tower keeps; tower and projector are called once whatever comes."""
        tower, projector = self.get_vision_tower(), self.get_model().mm_projector
        chosen = tower.choose_patches(images, patch_alphas, patch_levels)
        packed = tower(images, packed=True, chosen=chosen).to(self.dtype)
        if kind not in MERGERS:
            return list(projector(packed).split(chosen.lengths))
        count_of = self._projected_grid
        for image in images:
            count_of(*image.shape[-2:])  # refuses an odd side
        order, tokens = chosen.merged()
        (order,) = send([order], packed.device)
        return list(projector(packed, order=order).split(tokens))

    def _blank(self, device=None):
        """A black image, as the arguments of `encode_images`."""
        side = self.get_vision_tower().image_size
        levels = None  # any will do: found by the tower, they would be read from the device
        if self._chooser is not None:
            levels = [torch.ones(*[side // self._chooser.patch] * 2, dtype=torch.uint8)]
        return torch.zeros(1, 3, side, side, device=device or self.device), None, levels
