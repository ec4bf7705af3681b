"""What the Qwen-VL models are given, in any form that transformers 4 or 5 made, and what `generate` refuses."""

import torch

from llava.errors import LlavaError
from llava.model.checked_inputs import check_rows, check_text, whole_numbers
from llava.model.generation_options import ALWAYS, WITH_IMAGES, check_options, padding_mask

IMAGE, VIDEO = 1, 2  # in mm_token_type_ids


def token_types(config, input_ids, *grids, given=None):
    """mm_token_type_ids [B, L], which processors of transformers 4 do not make: 1 on image tokens, 2 on video tokens.

    Args:
        config: names the two tokens.
        grids: of images and of videos; without any the types are as `given`.
        given: the types, where they came along.
    """
    if given is not None:
        return given.long()
    if input_ids is None or all(grid is None for grid in grids):
        return None
    types = torch.zeros_like(input_ids)
    for kind, token in ((IMAGE, config.image_token_id), (VIDEO, config.video_token_id)):
        types = types.masked_fill(input_ids == token, kind)
    return types


def check_for_positions(input_ids, attention_mask, mm_token_type_ids, past_key_values) -> None:
    """Of a batch with images, whose positions are counted by mask and types: these are [B, L], as the ids are."""
    if past_key_values is None or past_key_values.get_seq_length() == 0:  # else they are for what the cache holds, too
        check_rows(input_ids, attention_mask=attention_mask, mm_token_type_ids=mm_token_type_ids)


def checked_ids(model, input_ids, grids, *, types, host, position_ids, attention_mask, past_key_values):
    """(`input_ids` as int64, `token_types`) of a forward pass.

    Args:
        grids: of images and of videos.
        types, ...: of the forward pass.
        host: its `HostCopies`, which spare a GPU the wait; None: `input_ids` are looked at.

    Raises:
        LlavaError: ids that are no tokens, or types and mask that are not theirs.
    """
    input_ids = whole_numbers("input_ids", input_ids)
    types = token_types(model.config, input_ids, *grids, given=types)
    on_host = None if host is None else host.input_ids
    check_text(model, input_ids if on_host is None else on_host)
    if position_ids is None and any(grid is not None for grid in grids):
        check_for_positions(input_ids, attention_mask, types, past_key_values)
    return input_ids, types


class QwenGeneration:
    """In front of a class of transformers that generates."""

    def generate(self, inputs=None, *args, **kwargs):
        """As transformers'; token ids of any integers, with or without mm_token_type_ids.

        Raises:
            LlavaError: an option that would fail halfway, or answer something else, with images; rows padded on the
                right, which transformers answers from their padding; rows without a mask that may be padded.
        """
        grids = kwargs.get("image_grid_thw"), kwargs.get("video_grid_thw")
        options = kwargs | ({"generation_config": args[0]} if args else {})
        check_options(self, ALWAYS if all(grid is None for grid in grids) else WITH_IMAGES, options)
        inputs, ids = whole_numbers("inputs", inputs), whole_numbers("input_ids", kwargs.get("input_ids"))
        if ids is not None:
            kwargs["input_ids"] = ids
        ids = inputs if ids is None else ids
        if ids is not None:
            _check_padding(self, ids, kwargs.get("attention_mask"), options)
        types = token_types(self.config, ids, *grids, given=kwargs.get("mm_token_type_ids"))
        if types is not None:
            kwargs["mm_token_type_ids"] = types
        return super().generate(inputs, *args, **kwargs)


def _check_padding(model, ids, mask, options: dict) -> None:
    mask = padding_mask(model, ids, options) if mask is None else mask
    if mask is not None and mask.ndim == 2 and bool((mask[:, -1] == 0).any()):
        raise LlavaError("input_ids: found rows padded on the right, expected the left: padding_side='left'")
