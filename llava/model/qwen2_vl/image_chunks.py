"""`vision_micro_batch` for the Qwen-VL models: their encoder takes the patches of all images one after the other."""

import torch

from llava.errors import LlavaError
from llava.model.qwen2_vl.layout import PatchLayout
from llava.model.vision_chunks import ChunkedVision, plus


class ChunkedImages(ChunkedVision):
    """In front of a model whose `get_image_features` calls the encoder once."""

    def get_image_features(self, pixel_values, image_grid_thw=None, image_patch_levels=None, **kwargs):
        """As the model's own, in chunks of `vision_micro_batch` images.

        Raises:
            LlavaError: no image_grid_thw, or one of another number of patches.
        """
        if image_grid_thw is None:
            raise LlavaError("image_grid_thw: found none, expected (frames, height, width) in patches of each image")
        if image_patch_levels is None and image_grid_thw.device.type == "cpu":  # elsewhere it would have to be read
            patches = int(image_grid_thw.prod(1).sum())
            if len(pixel_values) != patches:
                raise LlavaError(f"pixel_values: found {len(pixel_values)} rows, expected {patches} patches")
        together = super().get_image_features

        def encode_these(pixels, grids, levels):
            return together(pixels, grids, **kwargs if levels is None else kwargs | {"image_patch_levels": levels})

        if self.vision_micro_batch is None:
            return encode_these(pixel_values, image_grid_thw, image_patch_levels)
        grids, levels = image_grid_thw.cpu(), image_patch_levels
        sizes = grids.prod(1).tolist()
        kept = sizes if levels is None else PatchLayout.from_levels(levels, grids).lengths
        pixels = pixel_values.split(kept)
        levels = None if levels is None else levels.split(sizes)

        def encode(first, last):
            some = None if levels is None else torch.cat(levels[first:last])
            return encode_these(torch.cat(pixels[first:last]), grids[first:last], some)

        def blank():
            side = self.visual.spatial_merge_size
            patches = pixel_values.new_zeros(side**2, pixel_values.shape[1])
            some = None if levels is None else levels[0].new_ones(side**2)
            found = encode_these(patches, grids.new_tensor([[1, side, side]]), some)
            return sum(part.sum() for layer in _of_layers(found) for part in layer)

        return self.in_chunks([1] * len(grids), encode, blank, _join, pixel_values.device)


def _of_layers(found) -> list:
    """The features that the language model gets, [M_i, D] of each image: those of its input, then DeepStack's."""
    deep = getattr(found, "deepstack_features", None) or []
    return [found.pooler_output, *([layer] if isinstance(layer, torch.Tensor) else layer for layer in deep)]


def _join(parts: list, zero):
    found = parts[0]
    layers = [_of_layers(part) for part in parts]
    found.pooler_output = tuple(plus([image for part in layers for image in part[0]], zero))
    if len(layers[0]) > 1:
        found.deepstack_features = [
            torch.cat([image for part in layers for image in part[i]]) for i in range(1, len(layers[0]))
        ]
    found.last_hidden_state = torch.cat([part.last_hidden_state for part in parts])
    return found
