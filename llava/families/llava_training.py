"""The LLaVA model that a run trains: loaded, given its vision half, and described in its config."""

from llava.constants import DEFAULT_IM_START_TOKEN
from llava.errors import LlavaError
from llava.families.precision import Precision
from llava.families.training import (
    attention_for,
    check_no_adapter,
    quantisation_for,
    readable_weights,
    trains_projector_alone,
    tunable_parts,
)
from llava.images.geometry import parse_grid_pinpoints
from llava.images.processing import processor_sides
from llava.model import builder
from llava.model.families import LANGUAGE_MODELS, model_classes, resolve_architecture
from llava.model.foreign import refuse_foreign
from llava.model.generation import generation_settings
from llava.model.multimodal_encoder.trust import naming
from llava.utils import rank0_print

_SAVED_MODEL_KEYS = (
    *("mm_newline_position", "mm_spatial_pool_mode", "mm_spatial_pool_stride", "mm_use_im_start_end"),
    *("mm_use_im_patch_token", "mm_tunable_parts", "unfreeze_mm_vision_tower", "tune_mm_mlp_adapter"),
)
_SAVED_DATA_KEYS = ("image_aspect_ratio", "add_time_instruction", "force_sample")


def load_model(model_args, data_args, training_args):
    """(model with its vision half, tokenizer), config filled with all that inference needs to know."""
    path = model_args.model_name_or_path
    check_no_adapter(path)
    values = builder.read_config(path)
    architecture = architecture_for(model_args, values)
    model_class, config_class = model_classes(architecture)
    config = builder.make_config(path, config_class, values, rope_overrides(model_args, values))
    dtype = Precision.of(training_args).to_load(training_args, tunable_parts(model_args, training_args))
    with naming(*training_args.run_config.named_towers):
        model, missing = builder.load_weights(
            model_class,
            path,
            with_projector=False,
            config=config,
            dtype=dtype,
            attn_implementation=attention_for(training_args, config, data_args.pack_sequences),
            cache_dir=training_args.cache_dir,
            quantization_config=quantisation_for(training_args),
            generation_config=generation_settings(path, training_args.cache_dir),
        )
    _check_projector(missing, model_args, training_args)
    model.config.use_cache = False
    tokenizer = builder.load_tokenizer(
        path, cache_dir=training_args.cache_dir, model_max_length=training_args.model_max_length, padding_side="right"
    )
    if model_args.vision_tower is not None:
        with readable_weights(model_args.vision_tower):
            model.get_model().initialize_vision_modules(model_args)
        check_new_tokens(model_args, training_args, tokenizer)
        model.initialize_vision_tokenizer(model_args, tokenizer)
    describe(model, model_args, data_args, training_args)
    return model, tokenizer


def _check_projector(missing: list[str], model_args, training_args) -> None:
    """Say which weights a checkpoint with vision does not hold, so that they are random to begin with.

    Raises:
        LlavaError: and they would stay so, since they are neither trained nor read from a file.
    """
    if not missing or model_args.pretrain_mm_mlp_adapter:
        return
    said = f"{model_args.model_name_or_path}: holds no {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
    projector = any(".mm_projector." in name for name in missing)
    if projector and "mm_mlp_adapter" not in tunable_parts(model_args, training_args):
        raise LlavaError(f"{said}, and mm_mlp_adapter is not trained; expected pretrain_mm_mlp_adapter")
    rank0_print(f"note: {said}: new and random to begin with")


def architecture_for(model_args, values) -> str:
    """The model class to train, from `model_class_name` or the checkpoint."""
    refuse_foreign(values, model_args.model_name_or_path)
    if model_args.model_class_name is None:
        return resolve_architecture(values, model_args.model_name_or_path)
    name = f"{model_args.model_class_name}ForCausalLM"
    if name not in LANGUAGE_MODELS:
        expected = ", ".join(known.removesuffix("ForCausalLM") for known in LANGUAGE_MODELS)
        raise LlavaError(f"model_class_name: found {model_args.model_class_name!r}, expected one of {expected}")
    return name


def rope_overrides(model_args, values) -> dict:
    """Config changes for `rope_scaling_factor` and `rope_scaling_type`, both or neither."""
    factor, kind = model_args.rope_scaling_factor, model_args.rope_scaling_type
    if factor is None and kind is None:
        return {}
    if factor is None or kind is None:
        raise LlavaError("rope_scaling_factor and rope_scaling_type: one is set without the other")
    theta = values.get("rope_theta") or (values.get("rope_parameters") or {}).get("rope_theta", 10000.0)
    return {"rope_scaling": None, "rope_parameters": {"rope_type": kind, "factor": factor, "rope_theta": theta}}


def check_new_tokens(model_args, training_args, tokenizer):
    """Refuse to add <im_start> and <im_end> in a run that would neither train nor keep their embeddings."""
    projector_alone = trains_projector_alone(tunable_parts(model_args, training_args))
    if not model_args.mm_use_im_start_end or not (projector_alone or training_args.lora_enable):
        return
    if DEFAULT_IM_START_TOKEN not in tokenizer.get_vocab():
        raise LlavaError(
            "mm_use_im_start_end: adds tokens whose embeddings a run of the projector alone, or of LoRA adapters, "
            "would leave untrained and lose; train mm_language_model whole or leave it out in this stage"
        )


def describe(model, model_args, data_args, training_args):
    """Write into the model's config what LLaVA-NeXT's inference reads from it, and the conversation template."""
    config = model.config
    config.architectures = [type(model).__name__]  # not the language model's, as it came
    config.conversation_template = model_args.version
    config.system_turn = data_args.system_turn
    config.tokenizer_padding_side = "right"
    config.tokenizer_model_max_length = training_args.model_max_length
    if model_args.vision_tower is None:
        return
    for args, keys in ((model_args, _SAVED_MODEL_KEYS), (data_args, _SAVED_DATA_KEYS)):
        for key in keys:
            setattr(config, key, getattr(args, key))
    config.image_grid_pinpoints = None
    if data_args.image_aspect_ratio == "native":
        config.min_pixels, config.max_pixels = data_args.min_pixels, data_args.max_pixels
        if not model.get_vision_tower().any_size:
            raise LlavaError(
                f"image_aspect_ratio native: the tower {config.mm_vision_tower} takes images of one size; expected one "
                "that takes any (hevc_vit, hevc_vit_packing, packed_vision, dinov2), or square, pad or anyres"
            )
    if "anyres" in data_args.image_aspect_ratio:
        side = processor_sides(model.get_vision_tower().image_processor)[1]
        grid = parse_grid_pinpoints(data_args.image_grid_pinpoints, side)
        config.image_grid_pinpoints = data_args.image_grid_pinpoints = [list(pair) for pair in grid]
    config.mm_projector_lr, config.mm_vision_tower_lr = training_args.mm_projector_lr, training_args.mm_vision_tower_lr
