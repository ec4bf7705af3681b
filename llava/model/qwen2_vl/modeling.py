"""Qwen2-VL and Qwen2.5-VL on the patches that were kept of an image.

The weights, and the numbers where all patches are base patches, are those of transformers' models. What differs is
where tokens are: a vision token sits at the middle of its patch, attends to the kept patches of its image (in most
layers of Qwen2.5-VL: of the window that its middle is in), and a large one stands in the merger for the four that it
replaces; the language model sees the merged tokens at their places in the full grid.

What both have in common is in the classes whose names begin with an underscore, before transformers' own.
"""

import itertools

import torch
import torch.nn as nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_utils import PreTrainedModel
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLModel,
    Qwen2_5_VLTextModel,
)
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VLForConditionalGeneration,
    Qwen2VLModel,
    Qwen2VLTextModel,
)

from llava.errors import LlavaError
from llava.model.host import HostCopies, segments
from llava.model.loss import supervised_training
from llava.model.qwen2_vl import host_plan
from llava.model.qwen2_vl.generation import IMAGE, VIDEO, QwenGeneration, checked_ids
from llava.model.qwen2_vl.image_chunks import ChunkedImages
from llava.model.qwen2_vl.layout import MERGE, PatchLayout
from llava.model.qwen2_vl.vision import AdaptiveQwen2_5_VisionTransformer, AdaptiveQwen2VisionTransformer
from llava.model.stock import SavesStockNames


class _AdaptiveModel:
    """Vision encoder and language model without the output layer."""

    vision_class = text_class = None

    def __init__(self, config):
        PreTrainedModel.__init__(self, config)  # transformers' own would build the stock encoder first
        if config.vision_config.spatial_merge_size != MERGE:
            raise LlavaError(f"spatial_merge_size: found {config.vision_config.spatial_merge_size}, expected {MERGE}")
        self.visual = self.vision_class._from_config(config.vision_config)
        self.language_model = self.text_class._from_config(config.text_config)
        self.rope_deltas = None
        self.post_init()

    def get_image_features(self, pixel_values, image_grid_thw=None, image_patch_levels=None, **kwargs):
        """As transformers'; `pooler_output` holds [M_i, D] for each image."""
        if image_patch_levels is None:
            return super().get_image_features(pixel_values, image_grid_thw, **kwargs)
        layout = PatchLayout.from_levels(image_patch_levels, image_grid_thw)
        if len(pixel_values) != len(layout.centres):
            raise LlavaError(f"pixel_values: found {len(pixel_values)} rows, expected {len(layout.centres)} patches")
        features = self.visual(pixel_values.type(self.visual.dtype), layout=layout)
        features.pooler_output = features.pooler_output.split(layout.tokens)
        return features

    def get_rope_index(
        self,
        input_ids,
        mm_token_type_ids,
        image_grid_thw=None,
        video_grid_thw=None,
        attention_mask=None,
        image_patch_levels=None,
        second_per_grid_ts=None,
        **kwargs,
    ):
        """Positions [3, B, L] over (time, row, column), and what later positions are ahead of their index, [B, 1].

        An image token has the row and column of its cell (of the top left one, for a 56-pixel patch); the text after
        an image starts where it starts with all patches kept.
        """
        if second_per_grid_ts is not None:
            kwargs["second_per_grid_ts"] = second_per_grid_ts
        if image_patch_levels is None:
            compute = super().get_rope_index
        else:
            compute, kwargs["image_patch_levels"] = self._adaptive_rope_index, image_patch_levels
        return host_plan.rope_index(
            compute,
            input_ids,
            mm_token_type_ids,
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            attention_mask=attention_mask,
            **kwargs,
        )

    def _adaptive_rope_index(
        self,
        input_ids,
        mm_token_type_ids,
        image_grid_thw,
        video_grid_thw,
        attention_mask,
        image_patch_levels,
        second_per_grid_ts=None,
        **kwargs,
    ):
        """`get_rope_index` for kept patches, on the host."""
        layout = PatchLayout.from_levels(image_patch_levels, image_grid_thw)
        images = zip(layout.cells.split(layout.tokens), image_grid_thw.tolist(), strict=True)
        videos = zip(
            [] if video_grid_thw is None else video_grid_thw, self._intervals(second_per_grid_ts), strict=False
        )
        positions = input_ids.new_zeros(3, *input_ids.shape)
        deltas = []
        for row, types in enumerate(mm_token_type_ids):
            keep = torch.ones_like(types, dtype=torch.bool) if attention_mask is None else attention_mask[row].bool()
            found = self._row_positions(types[keep], images, videos)
            positions[:, row, keep] = found.to(positions)
            deltas.append(int(found.max()) + 1 - found.shape[1])
        return positions, input_ids.new_tensor(deltas)[:, None]

    def _intervals(self, second_per_grid_ts):
        """What the time moves on by from one frame to the next, for each video."""
        per_second = getattr(self.config.vision_config, "tokens_per_second", None)
        if per_second is None:  # Qwen2-VL counts frames
            return itertools.repeat(1)
        seconds = itertools.repeat(1) if second_per_grid_ts is None else second_per_grid_ts
        return (per_second * second for second in seconds)

    def _row_positions(self, types, images, videos):
        """[3, L] of one row's tokens, of which `types` says what they are; takes its media from the two iterators."""
        parts, at = [], 0
        kinds, counts = types.unique_consecutive(return_counts=True)
        for kind, count in zip(kinds.tolist(), counts.tolist(), strict=True):
            if kind == IMAGE:
                cells, (_, height, width) = next(images, (None, (0, 0, 0)))
                if cells is None or len(cells) != count:
                    raise LlavaError(
                        f"input_ids: found {count} image tokens in a row, expected "
                        f"{'no more images' if cells is None else len(cells)}, as image_patch_levels says"
                    )
                parts.append(torch.cat([cells.new_zeros(1, count), cells.T]) + at)
                at += max(height, width) // MERGE
            elif kind == VIDEO:
                video = next(videos, None)
                if video is None:
                    raise LlavaError("input_ids: found more videos than video_grid_thw or second_per_grid_ts has")
                (frames, height, width), interval = video
                sides = [torch.arange(length) for length in (frames, height // MERGE, width // MERGE)]
                sides[0] = (sides[0] * interval).long()
                parts.append(torch.stack(torch.meshgrid(*sides, indexing="ij")).flatten(1) + at)
                at += max(height, width) // MERGE
            else:
                parts.append(torch.arange(at, at + count).expand(3, -1))
                at += count
        return torch.cat(parts, 1)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        pixel_values=None,
        image_grid_thw=None,
        video_grid_thw=None,
        mm_token_type_ids=None,
        image_patch_levels=None,
        host: HostCopies | None = None,
        **kwargs,
    ):
        """As transformers'.

        Args:
            image_patch_levels: [sum of h * w] for images of which some patches are kept.
            host: copies of input_ids, attention_mask, mm_token_type_ids, image_grid_thw and image_patch_levels, as the
                collator makes them; None: they are read, for which the host waits on a GPU. With `packed` the one row
                is that many samples, which neither see each other nor count each other's positions.
        """
        if input_ids is not None:
            given = {"position_ids": position_ids, "attention_mask": attention_mask, "past_key_values": past_key_values}
            input_ids, mm_token_type_ids = checked_ids(
                self, input_ids, (image_grid_thw, video_grid_thw), types=mm_token_type_ids, host=host, **given
            )
        if pixel_values is not None and input_ids is not None:
            host = host or HostCopies.of(
                input_ids=input_ids,
                attention_mask=attention_mask,
                mm_token_type_ids=mm_token_type_ids,
                image_grid_thw=image_grid_thw,
                image_patch_levels=image_patch_levels,
            )
            if inputs_embeds is None:
                inputs_embeds = self.get_input_embeddings()(input_ids)
            features = self.get_image_features(pixel_values, host.image_grid_thw, host.image_patch_levels).pooler_output
            inputs_embeds, _ = host_plan.put_images(
                inputs_embeds, torch.cat(features), host.input_ids, self.config.image_token_id
            )
            anew = host_plan.starts_anew(self, past_key_values) and mm_token_type_ids is not None
            if position_ids is None and anew:
                position_ids = host_plan.positions(
                    self,
                    host,
                    inputs_embeds.device,
                    video_grid_thw=video_grid_thw,
                    image_patch_levels=host.image_patch_levels,
                    second_per_grid_ts=kwargs.get("second_per_grid_ts"),
                )
            attention_mask, pixel_values = host_plan.mask_for(self, attention_mask, host), None
            kwargs |= segments(
                host and host.packed, self.language_model.config._attn_implementation, inputs_embeds.device
            )
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            mm_token_type_ids=mm_token_type_ids,
            **kwargs,
        )


class AdaptiveQwen2VLModel(ChunkedImages, _AdaptiveModel, Qwen2VLModel):
    """Qwen2-VL without the output layer."""

    vision_class, text_class = AdaptiveQwen2VisionTransformer, Qwen2VLTextModel


class AdaptiveQwen2_5_VLModel(ChunkedImages, _AdaptiveModel, Qwen2_5_VLModel):
    """Qwen2.5-VL without the output layer."""

    vision_class, text_class = AdaptiveQwen2_5_VisionTransformer, Qwen2_5_VLTextModel


class _AdaptiveGeneration(QwenGeneration, SavesStockNames):
    """A model with its output layer."""

    model_class = stock_class = None

    def __init__(self, config):
        PreTrainedModel.__init__(self, config)
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs):
        """As transformers'; weights have the published names, and the folder names transformers' class for others."""
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            self.config.architectures = [self.stock_class.__name__]
            self.config.save_pretrained(save_directory)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Rows several times, for beams and several answers; images too where transformers has not encoded them yet."""
        images = {name: model_kwargs.get(name) for name in ("pixel_values", "image_grid_thw", "image_patch_levels")}
        if expand_size == 1 or any(value is None for value in images.values()):
            return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)
        pixels, grids, levels = images.values()
        layout = PatchLayout.from_levels(levels, grids)
        per_row = (input_ids == self.config.image_token_id).sum(1).cumsum(0)
        per_image = torch.tensor(layout.tokens, device=per_row.device).cumsum(0)
        rows = torch.searchsorted(per_row, per_image)  # the row that an image belongs to
        order = [i for row in range(len(input_ids)) for i in (rows == row).nonzero()[:, 0].tolist() * expand_size]
        expanded = {"image_grid_thw": grids[order]}
        parts = {"pixel_values": (pixels, layout.lengths), "image_patch_levels": (levels, grids.prod(1).tolist())}
        for name, (values, lengths) in parts.items():
            values = values.split(lengths)
            expanded[name] = torch.cat([values[i] for i in order])
        rest = {name: value for name, value in model_kwargs.items() if name not in images}
        input_ids, rest = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **rest)
        return input_ids, rest | expanded


@supervised_training("image_patch_levels", "host")
class AdaptiveQwen2VLForConditionalGeneration(_AdaptiveGeneration, Qwen2VLForConditionalGeneration):
    """Qwen2-VL that takes what `AdaptiveQwen2VLProcessor` makes; loads stock checkpoints, and saves such.

    Without `image_patch_levels`, [sum of h * w] over the images, it is transformers' model. Vision tokens are the kept
    patches; the language model gets one token for each kept 28- or 56-pixel patch and for each four base patches of a
    28-pixel cell.
    """

    model_class, stock_class = AdaptiveQwen2VLModel, Qwen2VLForConditionalGeneration


@supervised_training("image_patch_levels", "host")
class AdaptiveQwen2_5_VLForConditionalGeneration(_AdaptiveGeneration, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL that takes what `AdaptiveQwen2_5_VLProcessor` makes, as `AdaptiveQwen2VLForConditionalGeneration`."""

    model_class, stock_class = AdaptiveQwen2_5_VLModel, Qwen2_5_VLForConditionalGeneration


# checkpoints have older names, which transformers translates by the class
for stock, ours in (
    (Qwen2VLModel, AdaptiveQwen2VLModel),
    (Qwen2VLForConditionalGeneration, AdaptiveQwen2VLForConditionalGeneration),
    (Qwen2_5_VLModel, AdaptiveQwen2_5_VLModel),
    (Qwen2_5_VLForConditionalGeneration, AdaptiveQwen2_5_VLForConditionalGeneration),
):
    mapping = get_checkpoint_conversion_mapping(stock.__name__)
    register_checkpoint_conversion_mapping(ours.__name__, mapping, overwrite=True)
