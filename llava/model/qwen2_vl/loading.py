"""Loading a Qwen2-VL or Qwen2.5-VL folder, stock or ours, or a LoRA adapter over one."""

import torch

from llava.errors import LlavaError
from llava.model.builder import base_of_adapter, best_attention, load_weights, read_config
from llava.model.lora import is_lora, load_lora
from llava.model.qwen2_vl.modeling import (
    AdaptiveQwen2_5_VLForConditionalGeneration,
    AdaptiveQwen2VLForConditionalGeneration,
)
from llava.model.qwen2_vl.processing import AdaptiveQwen2_5_VLProcessor, AdaptiveQwen2VLProcessor

KINDS = {  # model_type -> model and processor
    "qwen2_vl": (AdaptiveQwen2VLForConditionalGeneration, AdaptiveQwen2VLProcessor),
    "qwen2_5_vl": (AdaptiveQwen2_5_VLForConditionalGeneration, AdaptiveQwen2_5_VLProcessor),
}


def kind_of(path: str, where: str):
    """(model class, processor class) of a folder or hub id; `where` says in the message what named it.

    Raises:
        LlavaError: another kind of model.
    """
    found = read_config(path).get("model_type")
    if found not in KINDS:
        raise LlavaError(f"{where}: {path}: found model_type {found!r}, expected {' or '.join(map(repr, KINDS))}")
    return KINDS[found]


def load_processor(path: str, **kwargs):
    """The processor of a folder or hub id; `kwargs` as its `from_pretrained`.

    Raises:
        LlavaError: a file is missing, or the tokenizer lacks Qwen2-VL's image tokens.
    """
    try:
        processor = kind_of(path, "model")[1].from_pretrained(path, **kwargs)
    except (OSError, ValueError) as error:
        raise LlavaError(f"{path}: no processor ({str(error).splitlines()[0][:160]})") from None
    tokenizer = processor.tokenizer
    vocabulary = tokenizer.get_vocab()
    lacking = [token for token in ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>") if token not in vocabulary]
    if lacking:
        raise LlavaError(f"{path}: its tokenizer lacks {', '.join(lacking)}, expected Qwen2-VL's")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def load_qwen2_vl(model_path: str, model_base: str | None = None, device: str = "cpu", dtype=torch.float32):
    """(model, processor) for inference.

    Args:
        model_path: folder or hub id of a model, or the folder of a LoRA adapter, which is merged into its base.
        model_base: the model under an adapter; None: the one it was trained on.
        device, dtype: the model's.

    Raises:
        LlavaError: not a Qwen2-VL, or weights that are missing or do not fit.
    """
    kind = kind_of(model_path, "model-path")
    adapted, base = is_lora(model_path), model_path
    if adapted:
        base = base_of_adapter(model_path, model_base)
        kind = kind_of(base, "model-base")
    elif model_base is not None:
        raise LlavaError(f"model-base: {model_path} is no LoRA adapter, expected no base")
    model = load_weights(
        kind[0],
        base,
        with_projector=True,
        dtype=dtype,
        attn_implementation=best_attention(dtype, device == "cpu"),
    )[0]
    if adapted:
        model = load_lora(model, model_path).merge_and_unload()
    return model.to(device).eval(), load_processor(model_path)
