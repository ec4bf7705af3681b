"""Fine-tune Qwen2-VL with adaptive patches: `python llava/train/train_qwen2_vl.py [CONFIG.yaml] [--key value ...]`.

Or Qwen2.5-VL. Keys, data, resumption, LoRA, DeepSpeed and launchers are those of `llava.train.train`. The parts are the
vision encoder (mm_vision_tower), its merger (mm_mlp_adapter) and the language model; a run leaves a stock folder.
"""

import os

from llava.errors import LlavaError, report_errors
from llava.utils import rank0_print

# keys with a meaning here; the other keys of LLaVA's models and data are refused
MODEL_KEYS = {
    "model_name_or_path",
    "mm_tunable_parts",
    "freeze_backbone",
    "tune_mm_mlp_adapter",
    "unfreeze_mm_vision_tower",
    "unfreeze_language_model",
    "delay_load",
    "adaptive_patches",
}
DATA_KEYS = {
    "data_path",
    "image_folder",
    "allow_absolute_paths",
    "lazy_preprocess",
    "is_multimodal",
    "early_mix_text",
    "min_pixels",
    "max_pixels",
    "patch_selection_method",
    "patch_alpha",
    "patch_thresholds",
    "patch_importance",
    "supervise",
}

SIDES = (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels"))  # pixels, whatever the names say


@report_errors
def train(argv=None):
    """As `llava.train.train.train`, for a Qwen2-VL in `model_name_or_path`."""
    from llava.train.arguments import parse_args

    args = parse_args(argv)
    check_qwen2_vl_run(args[2].run_config)
    from llava.train.qwen2_vl_trainer import Qwen2VLTrainer
    from llava.train.train import run

    run(*args, make=make_qwen2_vl, trainer_class=Qwen2VLTrainer)


def check_qwen2_vl_run(settings) -> None:
    """Refuse keys that say nothing about Qwen2-VL, and settings of the patches that contradict each other."""
    from llava.config.schema import own_keys

    if settings.tower is not None:
        raise LlavaError(f"tower {settings.tower}: Qwen2-VL has a vision encoder of its own, expected no tower config")
    for name, key in own_keys().items():
        known = {"model": MODEL_KEYS, "data": DATA_KEYS}.get(key.group, own_keys().keys() - {"mm_token_compressor_lr"})
        if name not in known and settings[name] != key.default:
            raise LlavaError(
                f"{settings.source(name)}: {name} is {settings[name]!r}, but Qwen2-VL has a vision encoder, projector, "
                f"chat template and image sizes of its own; expected no {name}"
            )
    if settings["supervise"] == "llava_next":
        raise LlavaError("supervise: found llava_next, expected answers_only: Qwen2-VL's template has no other here")
    if "mm_token_compressor" in (settings["mm_tunable_parts"] or ""):
        raise LlavaError("mm_tunable_parts: names mm_token_compressor, which Qwen2-VL does not have")


def make_qwen2_vl(model_args, data_args, training_args):
    """(model, processor, data set and collator)."""
    from llava.data.qwen2_vl import check_chat_template
    from llava.model.builder import load_weights
    from llava.model.qwen2_vl.loading import kind_of
    from llava.train.lora import check_no_adapter, quantisation_for
    from llava.train.train import attention_for, weights_dtype

    path = model_args.model_name_or_path
    check_no_adapter(path)
    model_class = kind_of(path, "model_name_or_path")[0]
    processor, alpha = make_processor(path, data_args, training_args)
    check_chat_template(processor, path)
    data = make_data(processor, alpha, data_args, training_args)  # before the weights, which take longer
    model = load_weights(
        model_class,
        path,
        with_projector=True,
        dtype=weights_dtype(training_args),
        attn_implementation=attention_for(training_args),
        cache_dir=training_args.cache_dir,
        quantization_config=quantisation_for(training_args),
    )[0]
    model.config.get_text_config().use_cache = False
    return model, processor, data


def make_processor(path: str, data_args, training_args):
    """The model's processor with the run's sizes and selection, and the range that alpha is drawn from, or None.

    The image processor, which is saved with the model, has the middle of such a range.
    """
    from llava.config.checks import patch_names
    from llava.data.qwen2_vl import AlphaRange
    from llava.model.qwen2_vl.loading import load_processor

    processor = load_processor(path, cache_dir=training_args.cache_dir)
    processor.tokenizer.model_max_length = training_args.model_max_length
    processor.tokenizer.padding_side = "right"
    images, settings = processor.image_processor, training_args.run_config
    given = {side: settings[key] for side, key in SIDES if settings.source(key) != "default"}
    images.size = {**dict(images.size), **given}
    if images.size["shortest_edge"] > images.size["longest_edge"]:
        raise LlavaError(
            f"min_pixels and max_pixels: found {images.size['shortest_edge']} and {images.size['longest_edge']} (keys, "
            f"or the image processor of {path}), expected the first not above the second"
        )
    if settings.source("adaptive_patches") == "default":
        choice = images.adaptive_patches
    else:
        choice = images.completed(settings["adaptive_patches"] or {"method": "all"}, patch_names(settings))
    images.adaptive_patches = choice
    saved = f" (saved: {choice.middle})" if choice and choice.draws else ""
    rank0_print(f"patches: {choice.description + saved if choice else 'all'}")
    return processor, AlphaRange(*choice.alpha, seed=training_args.seed) if choice and choice.draws else None


def make_data(processor, alpha, data_args, training_args) -> dict:
    """Data set and collator, the records checked as a whole before training."""
    from llava.data.dataset import MediaOptions
    from llava.data.qwen2_vl import Qwen2VLCollator, Qwen2VLDataset
    from llava.data.records import load_records
    from llava.data.validate import validate_records

    if data_args.data_path is None:
        raise LlavaError("data_path: missing; expected LLaVA JSON or JSONL, or a mixture YAML")
    records = load_records(data_args.data_path, training_args.seed)
    clip = next((index for index, record in enumerate(records) if record.get("video")), None)
    if clip is not None:
        raise LlavaError(f"{records.describe(clip)}: found a video, expected images or text (Qwen2-VL's training)")
    options = MediaOptions.from_args(data_args)
    validate_records(
        records,
        version="qwen_1_5",  # the same turns as Qwen2-VL's template
        image_folder=options.image_folder,
        allow_absolute_paths=options.allow_absolute_paths,
        check_paths=int(os.environ.get("LOCAL_RANK", "0")) in (-1, 0),
    )
    rank0_print(f"{len(records):,} records from {', '.join(dict.fromkeys(part.path for part in records.parts))}")
    images, tokenizer = processor.image_processor, processor.tokenizer
    dataset = Qwen2VLDataset(records, processor, options, model_max_length=training_args.model_max_length, alpha=alpha)
    collator = Qwen2VLCollator(
        pad_token_id=tokenizer.pad_token_id,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        patch_values=3 * images.temporal_patch_size * images.patch_size**2,
        levels=images.adaptive_patches is not None,
    )
    return {"train_dataset": dataset, "data_collator": collator}


if __name__ == "__main__":
    train()
