"""`generate` of a LLaVA model: the prompt becomes embeddings of text and images, and transformers goes on from it."""

import torch

from llava.constants import IMAGE_TOKEN_INDEX
from llava.errors import LlavaError
from llava.model.checked_inputs import check_rows, refuse_stock_names, whole_numbers
from llava.model.checkpoint import whole
from llava.model.generation_options import EMBEDDED, check_options, option, padding_mask


class LlavaGeneration:
    """Mixin of `LlavaMetaForCausalLM`, in front of transformers' `GenerationMixin`."""

    @torch.no_grad()
    def generate(
        self,
        inputs=None,
        images=None,
        image_sizes=None,
        modalities=("image",),
        input_ids=None,
        patch_alphas=None,
        **kwargs,
    ):
        """New tokens only, [B, new].

        Args:
            inputs: [B, L] prompt ids, also accepted as `input_ids`; padded on either side, with `attention_mask` 0 on
                padding. Without a mask the pad id at the ends of rows is padding.
            images, image_sizes, modalities, patch_alphas: as `prepare_inputs_labels_for_multimodal`.
            **kwargs: as transformers' `generate`; which of them are taken is in docs/generation.md.

        Raises:
            LlavaError: an option that is not taken; inputs that do not fit together; rows of different lengths without
                a mask where the pad id also ends answers.
        """
        ids = inputs if inputs is not None else input_ids
        if ids is None or "inputs_embeds" in kwargs:
            raise LlavaError("generate: give prompt ids as inputs or input_ids (inputs_embeds is not accepted)")
        if inputs is not None and input_ids is not None:
            raise LlavaError("generate: found inputs and input_ids, expected one of them")
        check_options(self, EMBEDDED, kwargs)
        refuse_stock_names(kwargs)
        ids = whole_numbers("input_ids", ids).to(self.device)
        mask, positions = kwargs.pop("attention_mask", None), kwargs.pop("position_ids", None)
        mask = padding_mask(self, ids, kwargs) if mask is None else mask
        _check_prompts(ids, mask, positions)
        guidance = option(self, "guidance_scale", kwargs)
        if guidance not in (None, 1) and kwargs.get("negative_prompt_ids") is None:
            answers = max(option(self, name, kwargs) or 1 for name in ("num_beams", "num_return_sequences"))
            # as transformers does with a prompt of tokens
            kwargs["negative_prompt_ids"] = _last_tokens(ids, mask).repeat_interleave(answers, dim=0)
        images = [] if images is None else images
        newline = getattr(self.get_model(), "image_newline", None)
        with whole([] if newline is None else [newline]):  # outside of a forward ZeRO-3 fetches modules' weights alone
            merged = self._merge(ids, mask, None, "left", images, modalities, image_sizes, patch_alphas)
        _check_length(self, merged[0].shape[1], kwargs)
        return super().generate(inputs_embeds=merged[0], attention_mask=merged[2].long(), **kwargs)


def _check_prompts(ids, mask, positions) -> None:
    check_rows(ids, attention_mask=mask)
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(ids.device).bool()
    if not ids.numel() or not bool(real.any(1).all()):
        raise LlavaError(f"input_ids: found {list(ids.shape)} with a row of no tokens, expected a prompt in each row")
    if positions is None:
        return
    plain = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    counted = (real.long().cumsum(1) - 1).clamp(min=0)
    given = positions.to(ids.device).expand_as(ids) if positions.shape[-1] == ids.shape[1] else None
    if given is None or not any(bool((given == rule)[real].all()) for rule in (plain, counted)):
        raise LlavaError("generate: position_ids: found others than attention_mask says, expected none")


def _check_length(model, prompt: int, options: dict) -> None:
    longest = option(model, "max_length", options)
    if longest is not None and longest <= prompt and option(model, "max_new_tokens", options) is None:
        raise LlavaError(f"max_length: found {longest}, expected more than the {prompt} tokens of prompt and images")


def _last_tokens(ids, mask):
    """[B, 1]: the last token of each prompt."""
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    at = places.masked_fill(mask.to(ids.device) == 0, -1) if mask is not None else places
    last = ids.gather(1, at.amax(1, keepdim=True))
    if bool((last == IMAGE_TOKEN_INDEX).any()):
        raise LlavaError("negative_prompt_ids: found none, expected some, since a prompt ends with an <image>")
    return last
