"""What a run with LoRA does beside `llava.model.lora`: its check and its adapters."""

from llava.errors import LlavaError
from llava.model.lora import add_lora, restore_lora


def check_lora(training_args, parts: set[str]) -> None:
    """Refuse LoRA in a run that leaves the language model as it is."""
    if training_args.lora_enable and "mm_language_model" not in parts:
        raise LlavaError(
            f"lora_enable: adapters go into the language model, but {', '.join(sorted(parts))} alone is to be trained; "
            "expected mm_language_model among mm_tunable_parts, or no lora_enable"
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
