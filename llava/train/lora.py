"""What a run with LoRA does beside `llava.model.lora`: its checks, quantised weights, its precision."""

import torch

from llava.errors import LlavaError
from llava.model.builder import quantisation
from llava.model.lora import add_lora, is_lora, restore_lora


def check_lora(training_args, parts: set[str]) -> None:
    """Refuse LoRA in a run that leaves the language model as it is."""
    if training_args.lora_enable and "mm_language_model" not in parts:
        raise LlavaError(
            f"lora_enable: adapters go into the language model, but {', '.join(sorted(parts))} alone is to be trained; "
            "expected mm_language_model among mm_tunable_parts, or no lora_enable"
        )


def check_no_adapter(path: str) -> None:
    """Refuse an adapter as the model to start from."""
    if is_lora(path):
        raise LlavaError(
            f"model_name_or_path: {path} is a LoRA adapter, expected a model: merge it (python -m "
            "llava.tools.merge_lora), or name its base here and the adapter in lora_weight_path"
        )


def quantisation_for(training_args):
    """How the frozen language model is held under QLoRA (arXiv 2305.14314); None with `bits` 16."""
    if training_args.bits == 16:
        return None
    if training_args.bits not in (4, 8):
        raise LlavaError(f"bits: found {training_args.bits}, expected 16, 8 or 4")
    if not training_args.lora_enable:
        raise LlavaError(f"bits: {training_args.bits} trains adapters over a quantised model, expected lora_enable too")
    half = torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else torch.float32
    return quantisation(
        f"bits {training_args.bits}",
        training_args.bits,
        compute_dtype=half,
        quant_type=training_args.quant_type,
        double_quant=training_args.double_quant,
    )


def adapt(model, model_args, training_args):
    """The model with LoRA adapters: new ones, or those of `lora_weight_path`."""
    model = add_lora(
        model,
        r=training_args.lora_r,
        alpha=training_args.lora_alpha,
        dropout=training_args.lora_dropout,
        base=model_args.model_name_or_path,
    )
    if training_args.lora_weight_path:
        restore_lora(model, training_args.lora_weight_path)
    return model


def keep_trained_in_float32(model):
    """Beside half-precision frozen weights, which autocast takes as they are."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
