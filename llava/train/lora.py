"""The adapters of a run with LoRA."""

from llava.model.lora import add_lora, restore_lora


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
