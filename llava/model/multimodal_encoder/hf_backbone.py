"""A CLIP- or SigLIP-shaped encoder of transformers under LLaVA-NeXT's weight names.

transformers 5 dropped the `vision_model.` level from these encoders' own names, LLaVA-NeXT checkpoints have it. Holding
the encoder's parts one level down, under `vision_model`, gives the published names without any renaming, and lets the
forward stop at the last layer whose output is used.
"""

import contextlib

import torch
import torch.nn as nn
from transformers.modeling_outputs import BaseModelOutput

from llava.errors import LlavaError


class _Parts(nn.Module):
    """The named children of a transformers vision encoder, and nothing else of it."""

    def __init__(self, encoder: nn.Module, keep_layers: int, drop: tuple[str, ...]):
        super().__init__()
        encoder = getattr(encoder, "vision_model", encoder)  # transformers' older nesting
        del encoder.encoder.layers[keep_layers:]
        for name, child in encoder.named_children():
            if name not in drop:
                self.add_module(name, child)


class Backbone(nn.Module):
    """Vision encoder that returns any of its hidden states.

    Args:
        encoder: a transformers CLIPVisionModel, SiglipVisionModel or one of the same make.
        keep_layers: encoder layers that exist here; the rest is removed.
        drop: names of children that are removed.
    """

    def __init__(self, encoder: nn.Module, keep_layers: int, drop: tuple[str, ...] = ()):
        super().__init__()
        self.config, self._no_split_modules = encoder.config, encoder._no_split_modules
        self.vision_model = _Parts(encoder, keep_layers, drop)

    def forward(self, pixel_values: torch.Tensor, indices: list[int] | None = None, output_hidden_states: bool = False):
        """Hidden states [B, T, D] of images [B, C, H, W], by their indices (0: the embeddings, i: after layer i).

        Without indices it is called as transformers' encoder is, and returns all of them as `hidden_states` of a
        `BaseModelOutput`, with which LLaVA's code calls a tower's `feature_select`.
        """
        if indices is None:
            states = self(pixel_values, list(range(len(self.vision_model.encoder.layers) + 1)))
            return BaseModelOutput(states[-1], tuple(states) if output_hidden_states else None)
        parts = self.vision_model
        side = self.config.image_size
        if pixel_values.shape[-2:] != (side, side):
            raise LlavaError(
                f"the vision tower takes images of {side}x{side} pixels, got {tuple(pixel_values.shape[-2:])}; "
                "check the image processor's size"
            )
        hidden = parts.embeddings(pixel_values)
        if hasattr(parts, "pre_layrnorm"):  # transformers' spelling
            hidden = parts.pre_layrnorm(hidden)
        states = {0: hidden}
        for i, layer in enumerate(parts.encoder.layers[: max(indices)], start=1):
            hidden = layer(hidden, None)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
            states[i] = hidden
        return [states[i] for i in indices]

    def reset_buffers(self):
        """Recompute what no checkpoint holds: transformers 5 leaves such buffers uninitialised when it loads."""
        embeddings = self.vision_model.embeddings
        ids = torch.arange(embeddings.position_embedding.num_embeddings, device=embeddings.position_ids.device)
        embeddings.position_ids = ids[None]

    def unused(self, indices: list[int]):
        """Modules whose weights have no part in these hidden states; they never get a gradient."""
        yield from self.vision_model.encoder.layers[max(indices) :]
        if hasattr(self.vision_model, "post_layernorm"):
            yield self.vision_model.post_layernorm


@contextlib.contextmanager
def quiet_loading():
    """Silence transformers' list of unexpected keys (the text half of a CLIP checkpoint) while an encoder loads."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
