"""The multimodal half of a LLaVA model: encode images, project them, merge them into the text sequence.

Shapes: B rows, L text tokens (an image is one of them), S tokens after the merge, D channels of the language model.
"""

import torch
import torch.nn as nn
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

import llavavit.varlen_attention  # noqa: F401  makes "varlen" an attention of the language model
from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_PATCH_TOKEN,
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
)
from llava.errors import LlavaError
from llava.model.checked_inputs import (
    check_facts,
    check_images,
    check_rows,
    check_text,
    check_vocabulary,
    refuse_stock_names,
    whole_numbers,
    width_and_height,
)
from llava.model.host import HostCopies, needs_no_mask, segments, send, supervised_places
from llava.model.image_encoding import ImageEncoding
from llava.model.llava_generation import LlavaGeneration
from llava.model.llava_loading import LlavaLoading
from llava.model.loss import supervised_loss
from llava.model.ranks import is_partitioned
from llava.model.sequence_merge import match_images, plan_merge
from llava.model.vision_modules import LlavaMetaModel
from llava.model.visual_merge import MergeRules, VisualTokenCounter, merge_visual_tokens, unpad_image

__all__ = ["LlavaMetaForCausalLM", "LlavaMetaModel", "unpad_image"]


class LlavaMetaForCausalLM(LlavaGeneration, LlavaLoading, ImageEncoding):
    """Mixin for the causal language model: vision in `from_pretrained`, `forward`, `generate` and `save_pretrained`.

    A subclass names its `model_class`, a `LlavaMetaModel`.
    """

    model_class = None

    def __init__(self, config):
        PreTrainedModel.__init__(self, config)  # the language model's own would build the plain model first
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_model(self):
        return self.model

    def get_vision_tower(self):
        return self.get_model().get_vision_tower()

    # --- images to visual tokens ---

    def visual_token_counter(self) -> VisualTokenCounter:
        """Function (pixel shape, (width, height), modality) -> tokens that one `<image>` becomes."""
        rules, tower = MergeRules.from_config(self.config), self.get_vision_tower()
        scales = tuple(getattr(tower, "s2_scales", ()))
        return VisualTokenCounter(rules, self._projected_grid, tower.patch_size, self._chooser, scales)

    def _visual_tokens(self, images, modalities, image_sizes, patch_alphas=None, patch_levels=None):
        """The visual tokens of each image: list of [N_i, D], in order."""
        if isinstance(images, torch.Tensor) and images.ndim == 4:  # a plain batch skips merging
            return list(self.encode_images(images, patch_alphas, patch_levels))
        model, rules = self.get_model(), MergeRules.from_config(self.config)
        # fetched on every rank, whatever the batch holds: under ZeRO-3 this is a collective
        newline = model.image_newline if rules.unpad else None
        crops = [image if image.ndim == 4 else image[None] for image in images]
        features = self._encode_crops(crops, modalities, patch_alphas, patch_levels)
        if newline is not None:
            newline = newline.to(features[0].device)  # a model may lie on several devices
        grid_of = self._projected_grid
        merged = []
        for i, (feature, crop) in enumerate(zip(features, crops, strict=True)):
            size = None if image_sizes is None or modalities[i] == "video" else width_and_height(image_sizes[i])
            grid = grid_of(*crop.shape[-2:])[1]
            merged.append(merge_visual_tokens(feature, grid, size, modalities[i], crop.shape[-1], newline, rules))
        if newline is not None and self.training:
            merged[0] = merged[0] + newline * 0.0  # it has a gradient on every rank, whatever this batch merged
        return merged

    def _encode_crops(self, crops, modalities, patch_alphas, patch_levels):
        """[K_i, C, H_i, W_i] of every image, its crops or frames -> its features [K_i, n_i, D], all in one call."""
        whole = [self.get_vision_tower().sees_time and kind == "video" for kind in modalities]
        chooses = self._chooser is not None
        if chooses and any(len(c) > 1 and not clip for c, clip in zip(crops, whole, strict=True)):
            raise LlavaError(f"adaptive_patches: found an image of {max(map(len, crops))} crops, expected one")
        if not chooses and not any(whole) and len({c.shape[1:] for c in crops}) == 1:
            return self.encode_images(torch.cat(crops), patch_alphas).split([len(c) for c in crops])
        units = [part for c, clip in zip(crops, whole, strict=True) for part in ([c] if clip else c)]
        counts = [1 if clip else len(c) for c, clip in zip(crops, whole, strict=True)]
        flat, at, features = self.encode_images(units, patch_alphas, patch_levels), 0, []
        for c, count in zip(crops, counts, strict=True):
            features.append(torch.cat(flat[at : at + count]).unflatten(0, (len(c), -1)))
            at += count
        return features

    def _anchor(self, device):
        """Zero that depends on tower, projector and newline.

        A rank without an image takes part in their collectives; it calls them in the order in which `_visual_tokens`
        does, which ZeRO-3 relies on. And an optimizer sees gradients of zero, as in LLaVA-NeXT: without any it would
        leave weights alone that it moves by its moments, and one process would train otherwise than two.
        """
        newline = self.get_model().image_newline if MergeRules.from_config(self.config).unpad else None
        zero = self.encode_images(*self._blank(device))[0].sum()
        return (zero if newline is None else zero + newline.sum().to(zero.device)) * 0.0

    # --- the merge ---

    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids,
        position_ids,
        attention_mask,
        past_key_values,
        labels,
        images,
        modalities=("image",),
        image_sizes=None,
        patch_alphas=None,
        host=None,
    ):
        """Replace every image token by the visual tokens of its image.

        Args:
            input_ids: [B, L]; IMAGE_TOKEN_INDEX marks an image.
            position_ids: [B, L] or None.
            attention_mask: [B, L] or None; masked tokens are dropped.
            past_key_values: returned as given.
            labels: [B, L] or None; visual tokens get IGNORE_INDEX.
            images: one per image token, in order: [3, H, W] or [K, 3, H, W] each (crops or frames), as a list or a
                5-d tensor; or a plain [N, 3, H, W] batch, whose features are used as they are. A row without image
                tokens may bring one dummy image, of modality "text" or one per such row.
            modalities: "image", "video" or "text" per image; missing ones count as "image".
            image_sizes: (width, height) of each original image; a video may have one for each frame, none is looked at.
            patch_alphas: a float for each image, where the tower chooses patches; None: its own alpha for all.
            host: `HostCopies` of input_ids, attention_mask and labels, as the collator makes them, and patch_levels;
                None: they are read, for which the host waits on a GPU.

        Returns:
            (None, position_ids [B, S], attention_mask [B, S], past_key_values, inputs_embeds [B, S, D], labels [B, S]);
            what was None stays None. Without images, or with a single token, everything is returned as given and
            inputs_embeds is None.

        Raises:
            LlavaError: images and image tokens do not match.
        """
        input_ids, labels = whole_numbers("input_ids", input_ids), whole_numbers("labels", labels)
        text = input_ids, position_ids, attention_mask, past_key_values, labels
        return self._prepare(*text, images, modalities, image_sizes, patch_alphas, host)[:6]

    def _prepare(self, input_ids, position_ids, attention_mask, past_key_values, labels, images, *of_images):
        """`prepare_inputs_labels_for_multimodal`, what `supervised_places` says of the new labels, and the length of
        each row without padding."""
        packed = _packed(of_images[-1])
        step = input_ids.shape[1] == 1 and not _is_one_image(input_ids, past_key_values)
        if not packed and (self.get_vision_tower() is None or images is None or step):
            return input_ids, position_ids, attention_mask, past_key_values, None, labels, None, None
        side = getattr(self.config, "tokenizer_padding_side", "right")
        merged = self._merge(input_ids, attention_mask, labels, side, images, *of_images)
        embeds, new_labels, mask, positions, supervised, lengths = merged
        return (
            None,
            None if position_ids is None and not packed else positions,
            None if attention_mask is None else mask.to(attention_mask.dtype),
            past_key_values,
            embeds,
            new_labels,
            supervised,
            lengths,
        )

    def _merge(
        self, input_ids, attention_mask, labels, side, images, modalities, image_sizes, patch_alphas=None, host=None
    ):
        """Text and images as one sequence, padded on the `side`, or packed where `host.packed` says so.

        Returns:
            inputs_embeds [B, S, D], labels [B, S], attention_mask bool [B, S], position_ids [B, S]; of the labels the
            places and values that `supervised_places` gives, without labels None for both; and the plan's lengths.
        """
        device = input_ids.device
        if host is None:
            host = HostCopies.of(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        masked = None if attention_mask is None else host.attention_mask
        check_rows(host.input_ids, attention_mask=masked, labels=None if labels is None else host.labels)
        check_images(images)
        check_facts(modalities, image_sizes)
        keep = torch.ones_like(host.input_ids) if attention_mask is None else host.attention_mask
        keep, of_images = keep.bool(), (modalities, image_sizes, patch_alphas, host.patch_levels)
        images, *of_images = match_images(host.input_ids, keep, images, *of_images)
        visual, anchor = [], None
        if len(images):
            visual = self._visual_tokens(images, *of_images)
        elif self.get_vision_tower() is not None and (
            self.training or (torch.distributed.is_initialized() and is_partitioned(self))
        ):
            anchor = self._anchor(device)
        plan = plan_merge(
            host.input_ids,
            keep,
            None if labels is None else host.labels,
            [len(tokens) for tokens in visual],
            getattr(self.config, "tokenizer_model_max_length", None),
            side,
            packed=_packed(host),
        )
        check_vocabulary(self, plan.text_ids)
        text = self.get_model().embed_tokens(*send([plan.text_ids], device))
        fits = None if plan.fits is None else plan.fits.nonzero()[:, 0]
        places = (None, None) if labels is None else supervised_places(plan.labels)
        planned = [plan.rows, plan.columns, fits, plan.labels, plan.mask, plan.positions, *places]
        # to where the language model is; the images' device may be another
        rows, columns, fits, labels, mask, positions, *places = send(planned, text.device)
        values = torch.cat([text, *(tokens.to(text) for tokens in visual)])
        if fits is not None:
            values = values.index_select(0, fits)
        embeds = text.new_zeros(*plan.shape, text.shape[-1]).index_put((rows, columns), values)
        if anchor is not None:
            embeds = embeds + anchor.to(embeds)
        return embeds, labels, mask, positions, None if labels is None else places, plan.lengths

    # --- forward and generation ---

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        images=None,
        image_sizes=None,
        modalities=("image",),
        patch_alphas=None,
        host=None,
        logits_to_keep=0,  # named here, since `generate` looks for it: a prefill needs the last position alone
        **kwargs,
    ):
        """As the language model's forward, with images (see `prepare_inputs_labels_for_multimodal`).

        With labels, in training mode or with `num_items_in_batch`, only the loss is computed (`logits` is None): the
        output layer runs on the supervised positions alone. `num_items_in_batch` divides the summed loss; without it,
        the mean over this batch. A batch without labels has loss 0.
        """
        input_ids, labels = whole_numbers("input_ids", input_ids), whole_numbers("labels", labels)
        refuse_stock_names(kwargs)
        if images is None and _packed(host):
            images = []
        loss_alone = labels is not None and (self.training or kwargs.get("num_items_in_batch") is not None)
        if images is None and inputs_embeds is None and self.get_vision_tower() is not None:
            images = [] if self.training or (loss_alone and is_partitioned(self)) else None
        supervised = None
        if inputs_embeds is None and images is not None:
            text = input_ids, position_ids, attention_mask, past_key_values, labels
            prepared = self._prepare(*text, images, modalities, image_sizes, patch_alphas, host)
            _, position_ids, attention_mask, past_key_values, inputs_embeds, labels, supervised, lengths = prepared
            if inputs_embeds is not None:
                input_ids = None
                if _packed(host):
                    attention_mask = self._masks_of_unpadded(inputs_embeds)
                    kwargs |= segments(lengths, self.config._attn_implementation, inputs_embeds.device)
                elif self.training and self._may_drop_mask:
                    attention_mask = self._masks_of_unpadded(inputs_embeds)
                    kwargs |= self._as_one_segment(inputs_embeds)
        if input_ids is not None:
            check_text(self, input_ids, "images: found none, expected one for each <image> of input_ids")
        inputs = dict(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
        )
        if loss_alone:
            count = kwargs.pop("num_items_in_batch", None)
            hidden = self.get_model()(**inputs, use_cache=False, **kwargs)[0]
            return CausalLMOutputWithPast(loss=supervised_loss(self, hidden, labels, count, supervised))
        out = super().forward(**inputs, labels=labels, logits_to_keep=logits_to_keep, **kwargs)
        if labels is not None and not isinstance(out, tuple):  # a mean over nothing is NaN
            supervised = (labels[:, 1:] != IGNORE_INDEX).any()
            out.loss = torch.where(supervised, out.loss, torch.zeros_like(out.loss))
        return out

    def enable_input_require_grads(self):
        """As transformers', also where embeddings give more than one tensor, as those of some encoders do."""
        super().enable_input_require_grads()
        for hook in self._require_grads_hooks:
            hook.hooks_dict_ref()[hook.id] = _first_requires_grad

    def announce_newline(self) -> None:
        """Tell ZeRO-3, once DeepSpeed has the model, of the one weight that this forward takes from another module.

        DeepSpeed finds out by itself when the weight is first used where it lies in parts. That may be long after it
        has noted in which order a step uses the weights, such as behind a checkpoint, and then it ends the run.
        """
        newline = getattr(self.get_model(), "image_newline", None)
        if newline is not None and is_partitioned(self):
            from deepspeed import zero

            zero.register_external_parameter(self, newline)

    @property
    def _may_drop_mask(self):
        """See `needs_no_mask`; the merge has just made the rows."""
        right_padded = getattr(self.config, "tokenizer_padding_side", "right") == "right"
        return right_padded and needs_no_mask(self.config._attn_implementation)

    def _masks_of_unpadded(self, inputs_embeds):
        """The language model's `attention_mask` where none is needed for padding, made without its positions.

        Given None, transformers looks whether the positions of a row start anew, and the host waits for the answer.
        Models with a mask for each type of layer take theirs ready-made; the others look (transformers 5.17 to 5.23).
        """
        made = create_masks_for_generate(self.config, inputs_embeds, attention_mask=None, past_key_values=None)
        return made if isinstance(made, dict) else None

    def _as_one_segment(self, inputs_embeds):
        """What spares a single row flash-attention's look, in every layer, whether it is packed of several samples."""
        if len(inputs_embeds) > 1 or "flash" not in self.config._attn_implementation:
            return {}
        return segments([inputs_embeds.shape[1]], self.config._attn_implementation, inputs_embeds.device)

    # --- tokenizer ---

    def initialize_vision_tokenizer(self, model_args, tokenizer):
        """Add LLaVA's optional image tokens (`mm_use_im_patch_token`, `mm_use_im_start_end`) to tokenizer and model.

        New embeddings are drawn around the mean of the old ones (transformers' mean resizing); the model's embeddings
        grow where needed and never shrink.
        """
        new = [DEFAULT_IMAGE_PATCH_TOKEN] if getattr(model_args, "mm_use_im_patch_token", True) else []
        added = tokenizer.add_tokens(new, special_tokens=True) if new else 0
        if getattr(model_args, "mm_use_im_start_end", False):
            added += tokenizer.add_tokens([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN], special_tokens=True)
        grow_embeddings(self, tokenizer)
        return added


def _first_requires_grad(module, given, output) -> None:
    (output[0] if isinstance(output, (tuple, list)) else output).requires_grad_(True)


def _is_one_image(input_ids, past_key_values) -> bool:
    """Whether a single token is a whole prompt and an image, rather than a step of an answer."""
    held = past_key_values.get_seq_length() if hasattr(past_key_values, "get_seq_length") else 0
    return held == 0 and bool((input_ids == IMAGE_TOKEN_INDEX).any())


def _packed(host: HostCopies | None) -> bool:
    """Whether the rows of a batch are the samples of one."""
    return host is not None and host.packed is not None


def grow_embeddings(model, tokenizer):
    """Make room for every token of the tokenizer; embeddings are never shrunk."""
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=True)
