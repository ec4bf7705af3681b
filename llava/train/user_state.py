"""Helpers of LLaVA's train.py around a model's weights, for programs that call them."""

import torch

from llava.model.checkpoint import gathered, projector_state, save_projector, whole


def maybe_zero_3(param, ignore_status: bool = False, name: str | None = None) -> torch.Tensor:
    """A copy of a parameter on the CPU, whole under ZeRO-3 too (every rank must call it); the rest is not read."""
    with whole([param]):
        return param.detach().cpu().clone()


def get_mm_adapter_state_maybe_zero_3(named_params, keys_to_match) -> dict[str, torch.Tensor]:
    """Copies of the parameters whose names hold one of `keys_to_match`."""
    return gathered((name, value) for name, value in named_params if any(key in name for key in keys_to_match))


def get_peft_state_maybe_zero_3(named_params, bias: str) -> dict[str, torch.Tensor]:
    """Copies of LoRA's parameters, and of biases: "none", "all", or "lora_only", those of adapted layers."""
    from llava.errors import LlavaError

    if bias not in ("none", "all", "lora_only"):
        raise LlavaError(f"lora_bias: found {bias!r}, expected none, all or lora_only")
    named = list(named_params)
    # peft puts the adapted layer itself into a module of its own beside the adapters
    adapted = {name.split("lora_")[0] for name, _ in named if "lora_" in name}
    biases = {layer + end for layer in adapted for end in ("bias", "base_layer.bias")}
    keeps = {"none": lambda name: False, "all": lambda name: "bias" in name, "lora_only": biases.__contains__}[bias]
    return gathered((name, value) for name, value in named if "lora_" in name or keeps(name))


def get_peft_state_non_lora_maybe_zero_3(named_params, require_grad_only: bool = True) -> dict[str, torch.Tensor]:
    """Copies of the parameters that are not LoRA's: those that are trained, or all."""
    others = ((name, value) for name, value in named_params if "lora_" not in name)
    return gathered((name, value) for name, value in others if value.requires_grad or not require_grad_only)


def find_all_linear_names(model) -> list[str]:
    """Last parts of the names of the language model's linear layers but the output layer, for LoRA; sorted."""
    outside = ("mm_projector", "vision_tower", "vision_resampler")
    found = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not any(part in name for part in outside)
    }
    return sorted(found - {"lm_head"})


def safe_save_model_for_hf_trainer(trainer, output_dir: str) -> None:
    """Save a trainer's model; after a stage that trains the projector alone only that, as mm_projector.safetensors, and
    the config."""
    args = trainer.args
    parts = [part.strip() for part in (getattr(args, "mm_tunable_parts", None) or "").split(",") if part.strip()]
    if not getattr(args, "tune_mm_mlp_adapter", False) and parts != ["mm_mlp_adapter"]:
        trainer.save_model(output_dir)
        return
    state = projector_state(trainer.model.named_parameters())
    if args.should_save:
        trainer.model.config.save_pretrained(output_dir)
        save_projector(state, output_dir)


def smart_tokenizer_and_embedding_resize(special_tokens_dict: dict, tokenizer, model) -> None:
    """Add special tokens; each new embedding, and row of the output layer, is the mean of the old ones."""
    added = tokenizer.add_special_tokens(special_tokens_dict)
    model.resize_token_embeddings(len(tokenizer))
    if added:
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            weight = layer.weight.data
            weight[-added:] = weight[:-added].mean(dim=0, keepdim=True)
