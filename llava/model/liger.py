"""Liger's Triton kernels (arXiv 2410.10989; package `liger_kernel`, CUDA only) in a model that is trained.

RMSNorm, rotary positions and SwiGLU or GeGLU: a LLaVA model is patched by Liger's own function for the language model
that it derives from, the language model of a Qwen-VL model layer by layer. Liger's fused loss would replace the model's
forward, and with it the vision: it is taken into `supervised_loss` instead.
"""

import inspect
import sys

import torch

from llava.errors import LlavaError
from llava.model.chunked_loss import call_once, is_plain
from llava.model.families import LLAVA_TYPES

LOSS = "fused_linear_cross_entropy"  # Liger's name, in `liger_kernel_config` too
BEHIND = ("logit_scale", "logits_scaling", "final_logit_softcapping")  # what `output_logits` looks for


def apply_liger(model, config: dict | None = None) -> None:
    """Put the kernels into a model without adapters, in place.

    Args:
        config: `liger_kernel_config`: kernel -> whether it is used; not named: as Liger does.

    Raises:
        LlavaError: a model that Liger does not know, or a kernel that it does not have for it.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    row = LLAVA_TYPES.get(model.config.model_type)
    kind = model.config.model_type if row is None else row.model_type
    patch = MODEL_TYPE_TO_APPLY_LIGER_FN.get(kind)
    if patch is None:
        raise LlavaError(
            f"use_liger_kernel: the installed liger_kernel has no kernels for {kind}, expected a newer one"
        )
    if row is None:  # Liger's own looks for names that transformers' Qwen-VL models no longer have
        patch = _patch_layers
    known = inspect.signature(patch).parameters
    kernels, chosen = sorted({*known, LOSS} - {"model", "cross_entropy"}), dict(config or {})
    for name in chosen:
        if name not in kernels:
            raise LlavaError(f"liger_kernel_config: found {name!r}, expected {', '.join(kernels)}")
    model.uses_liger_loss = chosen.pop(LOSS, True)
    patch(model=model, **chosen, **{name: False for name in ("cross_entropy", LOSS) if name in known})


def _patch_layers(model, rope: bool = True, rms_norm: bool = True, swiglu: bool = True) -> None:
    """The language model of a vision-language model, from Liger's parts; the vision encoder stays as it is."""
    from liger_kernel.transformers import monkey_patch

    text = model.model.language_model
    norms = ("input_layernorm", "post_attention_layernorm")
    for layer in text.layers:
        found = [getattr(layer, name) for name in norms]
        found += [getattr(layer.self_attn, name) for name in ("q_norm", "k_norm") if hasattr(layer.self_attn, name)]
        for norm in found if rms_norm else ():
            monkey_patch._patch_rms_norm_module(norm)
        if swiglu:
            monkey_patch._patch_swiglu_module(layer.mlp, monkey_patch.LigerSwiGLUMLP)
    if rms_norm:
        monkey_patch._patch_rms_norm_module(text.norm)
    if rope:  # the three axes' positions are one cosine and sine by then
        attention = sys.modules[type(text.layers[0].self_attn).__module__]
        attention.apply_rotary_pos_emb = monkey_patch.liger_rotary_pos_emb


def fuses_loss(model) -> bool:
    """Whether Liger's fused loss stands for the model's output layer, what its family does behind it, and the loss."""
    if not getattr(model, "uses_liger_loss", False) or not is_plain(model.get_output_embeddings()):
        return False
    config = model.config.get_text_config()
    return all(getattr(config, name, None) is None for name in BEHIND)


def fused_loss(model, hidden_ND: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Summed cross entropy of one row or more, by Liger; the gradients are computed with it, chunk by chunk."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    layer = model.get_output_embeddings()

    def forward(hidden, targets):
        return liger_fused_linear_cross_entropy(hidden, layer.weight, targets, layer.bias, reduction="sum")

    return call_once(layer, forward, hidden_ND, targets_N)
