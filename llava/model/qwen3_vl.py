"""Qwen3-VL as transformers has it, with what its forward would read from the device worked out on the host."""

import torch
import transformers as stock
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel, Qwen3VLTextModel, Qwen3VLVisionModel
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from llava.model.host import HostCopies, segments, send
from llava.model.loss import supervised_training
from llava.model.qwen2_vl import host_plan
from llava.model.qwen2_vl.generation import QwenGeneration, checked_ids
from llava.model.qwen2_vl.image_chunks import ChunkedImages
from llava.model.stock import SavesStockNames, named_as


@named_as(Qwen3VLVisionModel)
class VisionModel(Qwen3VLVisionModel):
    def forward(self, hidden_states, grid_thw, **kwargs):
        """As transformers'; `grid_thw` on the host costs nothing, on a GPU one wait."""
        grid_thw = grid_thw.cpu()
        planned = host_plan.of_grids(self, grid_thw, hidden_states.device, packed=False)
        between = get_vision_interpolation_indices_and_weights(
            grid_thw,
            num_grid_per_side=self.num_grid_per_side,
            mode=self.interpolation_mode,
            align_corners=self.interpolation_align_corners,
            spatial_merge_size=self.config.spatial_merge_size,
        )
        between = send([*between], hidden_states.device)
        planned |= dict(zip(("interp_indices", "interp_weights"), between, strict=True))
        return super().forward(hidden_states, grid_thw=grid_thw, **planned | kwargs)


@named_as(Qwen3VLTextModel)
class TextModel(Qwen3VLTextModel):
    def _deepstack_process(self, hidden_states, visual_pos_masks, visual_embeds):
        """As transformers'; in place of the mask [B, L] also the places [M] in B * L, whose number the host knows."""
        if visual_pos_masks.dtype == torch.bool:
            return super()._deepstack_process(hidden_states, visual_pos_masks, visual_embeds)
        places = visual_pos_masks.to(hidden_states.device)
        visual_embeds = visual_embeds.to(hidden_states.device, hidden_states.dtype)
        return hidden_states.flatten(0, 1).index_add(0, places, visual_embeds).view_as(hidden_states)


@named_as(Qwen3VLModel)
class Model(ChunkedImages, Qwen3VLModel):
    def get_rope_index(self, input_ids, *tensors, **kwargs):
        return host_plan.rope_index(super().get_rope_index, input_ids, *tensors, **kwargs)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        pixel_values=None,
        pixel_values_videos=None,
        image_grid_thw=None,
        video_grid_thw=None,
        mm_token_type_ids=None,
        host: HostCopies | None = None,
        **kwargs,
    ):
        """As transformers'; `host` as in `_AdaptiveModel` of Qwen2-VL. A batch with videos takes transformers' way."""
        if input_ids is not None:
            given = {"position_ids": position_ids, "attention_mask": attention_mask, "past_key_values": past_key_values}
            input_ids, mm_token_type_ids = checked_ids(
                self, input_ids, (image_grid_thw, video_grid_thw), types=mm_token_type_ids, host=host, **given
            )
        if pixel_values is None or pixel_values_videos is not None or input_ids is None or inputs_embeds is not None:
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                pixel_values=pixel_values,
                pixel_values_videos=pixel_values_videos,
                image_grid_thw=image_grid_thw,
                video_grid_thw=video_grid_thw,
                mm_token_type_ids=mm_token_type_ids,
                **kwargs,
            )
        host = host or HostCopies.of(
            input_ids=input_ids,
            attention_mask=attention_mask,
            mm_token_type_ids=mm_token_type_ids,
            image_grid_thw=image_grid_thw,
        )
        shown = self.get_image_features(pixel_values, host.image_grid_thw, return_dict=True)
        inputs_embeds, places = host_plan.put_images(
            self.get_input_embeddings()(input_ids),
            torch.cat(shown.pooler_output),
            host.input_ids,
            self.config.image_token_id,
        )
        if position_ids is None and mm_token_type_ids is not None and host_plan.starts_anew(self, past_key_values):
            position_ids = host_plan.positions(self, host, inputs_embeds.device)
        elif position_ids is None:
            position_ids = self.compute_3d_position_ids(
                input_ids=input_ids,
                inputs_embeds=inputs_embeds,
                image_grid_thw=image_grid_thw,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                mm_token_type_ids=mm_token_type_ids,
            )
        deep = shown.deepstack_features
        return self.language_model(
            input_ids=None,
            attention_mask=host_plan.mask_for(self, attention_mask, host),
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            visual_pos_masks=places,
            # of each layer; transformers 5.23 has them image by image
            deepstack_visual_embeds=[x if isinstance(x, torch.Tensor) else torch.cat(x) for x in deep],
            **kwargs
            | segments(host and host.packed, self.language_model.config._attn_implementation, inputs_embeds.device),
        )


@supervised_training("host")
@named_as(stock.Qwen3VLForConditionalGeneration)
class Qwen3VLForConditionalGeneration(QwenGeneration, SavesStockNames, stock.Qwen3VLForConditionalGeneration):
    def __init__(self, config):
        super().__init__(config)
        self.model.__class__ = Model  # the same weights
        self.model.visual.__class__ = VisionModel
        self.model.language_model.__class__ = TextModel
