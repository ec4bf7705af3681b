"""Every key of a run, defined once: the YAML schema, the command line and the key table all derive from these models.

To add a key, add one `key(...)` line to the group that uses it; a key of a part that does not exist here goes into
`REFUSED`. Names and defaults are LLaVA-NeXT's wherever it has
the key. Every field of the installed `transformers.TrainingArguments` is a key as well (see `trainer_fields.py`) and is
repeated here only where this project's default differs.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from llava.config.rules import (
    ABOVE_0,
    COUNT,
    FACTOR,
    FROM_0,
    FROM_1,
    NUMBER,
    OPTIMIZER,
    POSITIVE,
    REPORTS,
    SCALES,
    SHARE_ABOVE_0,
    SHARE_BELOW_1,
    WHOLE,
    Rule,
    one_of,
)


def key(
    default: Any,
    description: str,
    *,
    within: Rule | None = None,
    tower: bool = False,
    tower_part: bool = False,
    checkpoint: str | bool = False,
    aliases: tuple[str, ...] = (),
    refuse: dict[Any, str] | None = None,
):
    """A pydantic field with what this project needs to know about a key.

    within: which values of the type are right; every key that holds numbers has such a rule. tower: may stand in a
    tower YAML. tower_part: describes the tower itself, so a checkpoint's value is not used for another tower.
    checkpoint: read from a checkpoint's config.json, under this name if a string is given. aliases: other names that
    mean the same key. refuse: values that ask for a part that does not exist here, with its name.
    """
    extra = {
        "within": within,
        "tower": tower or tower_part,
        "tower_part": tower_part,
        "checkpoint": checkpoint,
        "aliases": aliases,
        "refuse": refuse or {},
    }
    return Field(default=default, description=description, json_schema_extra={"llava": extra})


class KeyGroup(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ModelKeys(KeyGroup):
    """The model: language model, vision tower, projector, merge, and which parts are trained."""

    model_name_or_path: str = key(
        "facebook/opt-125m", "language model or LLaVA checkpoint to start from: hub id or folder"
    )
    model_class_name: str | None = key(None, "transformers class to use, without its ForCausalLM ending")
    version: str = key("v0", "conversation template", checkpoint="conversation_template")
    mm_tunable_parts: str | None = key(
        None,
        "parts to train, joined by commas: mm_vision_tower, mm_token_compressor, mm_mlp_adapter, mm_language_model; "
        "above the freeze keys",
    )
    freeze_backbone: bool = key(False, "freeze the language model")
    freeze_mm_token_compressor: bool = key(
        False, "freeze the token compressor, which otherwise is trained where the projector is"
    )
    tune_mm_mlp_adapter: bool = key(False, "train the projector only (when mm_tunable_parts is not given)")
    unfreeze_mm_vision_tower: bool = key(False, "train the vision tower (when mm_tunable_parts is not given)")
    unfreeze_language_model: bool = key(False, "train the language model (when mm_tunable_parts is not given)")
    pretrain_mm_mlp_adapter: str | None = key(None, "projector to start from: mm_projector.safetensors or .bin")

    vision_tower: str | None = key(
        None,
        "vision tower: hub id or folder; timm:NAME; a class of your own as FILE.py:Class, pkg.module:Class or an entry "
        "point",
        tower_part=True,
        checkpoint="mm_vision_tower",
        aliases=("mm_vision_tower",),
    )
    mm_vision_tower_type: str | None = key(
        None,
        "the tower's registry id, or a class of your own for the folder in vision_tower; needed only where its config "
        "or name does not tell",
        tower_part=True,
        checkpoint=True,
    )
    tower_args: dict[str, Any] | None = key(
        None,
        "arguments for the constructor of a tower of your own, or of timm.create_model",
        tower_part=True,
        checkpoint=True,
    )
    vision_tower_image: dict[str, Any] | None = key(
        None,
        "pixels of a plain nn.Module as the tower: {size: 224, mean: [...], std: [...], interpolation: bicubic}",
        tower_part=True,
        checkpoint=True,
    )
    vision_tower_weights: str | None = key(
        None,
        "weights of a plain nn.Module as the tower, or beside timm:NAME: a .safetensors file; not given: those it is "
        "made with, or timm's",
        tower_part=True,
        checkpoint=True,
    )
    image_size: int | None = key(
        None,
        "side in pixels at which an encoder of transformers or timm sees a picture, its positions "
        "interpolated; not given: its own",
        tower_part=True,
        checkpoint=True,
        within=POSITIVE,
    )
    vision_tower_stage: int | None = key(
        None,
        "stage of a hierarchical encoder (ConvNeXt, Swin, ...) whose feature map becomes the tokens, from 1; not "
        "given: the last",
        tower_part=True,
        checkpoint=True,
        within=POSITIVE,
    )
    mm_vision_select_layer: int = key(
        -1,
        "hidden state of the tower that is used, counted as Python does",
        tower_part=True,
        checkpoint=True,
        within=WHOLE,
    )
    mm_vision_select_feature: str = key(
        "patch", "tokens of that layer: patch, cls_patch, or a slice kind", tower_part=True, checkpoint=True
    )
    s2: bool = key(False, "multi-scale features (S2)", tower_part=True, checkpoint=True)
    s2_scales: str = key("336,672,1008", "the scales of S2 in pixels", tower_part=True, checkpoint=True, within=SCALES)
    use_token_compression: bool = key(
        False, "compress the tower's tokens with a partial convolution (ToConv)", tower_part=True, checkpoint=True
    )
    compression_input_size: int = key(
        24, "side of the token grid before the compressor", tower_part=True, checkpoint=True, within=POSITIVE
    )
    compression_output_size: int = key(
        12, "side of the token grid after the compressor", tower_part=True, checkpoint=True, within=POSITIVE
    )
    pretrain_token_compressor: str | None = key(
        None, "token compressor to start from: a file of its weights, or the folder of a training run", tower=True
    )
    adaptive_patches: dict[str, Any] | None = key(
        None,
        "large patches where an image holds little (hevc_vit_packing, Qwen2-VL): {method: budget, alpha: 0.3}; method "
        "v1, v2, budget or all, alpha a number or [lowest, highest] to draw from in training; also thresholds, "
        "importance, num_scales",
        tower_part=True,
        checkpoint=True,
    )
    delay_load: bool = key(True, "accepted for LLaVA-NeXT's launch lines: the tower is loaded once, where it is needed")

    mm_projector_type: str = key(
        "linear",
        "projector: linear, mlpNx_gelu, mlpNx_resMx_gelu, identity, pooler, patch_merger, spatial_merge",
        tower=True,
        checkpoint=True,
    )
    mm_patch_merge_type: str = key(
        "flat", "how the crops' tokens are laid out: flat, spatial, spatial_unpad, ...", checkpoint=True
    )
    mm_newline_position: Literal["grid", "frame", "one_token", "no_token"] = key(
        "grid", "where newline tokens go in a video", checkpoint=True
    )
    mm_spatial_pool_stride: int | None = key(
        None,
        "pooling stride over a video frame's tokens, which are pooled by two whatever this key says",
        checkpoint=True,
        within=one_of(2),
    )
    mm_spatial_pool_mode: Literal["bilinear", "average", "max"] = key(
        "bilinear", "how a video frame's tokens are pooled", checkpoint=True
    )
    mm_use_im_start_end: bool = key(False, "put <im_start> and <im_end> around an image", checkpoint=True)
    mm_use_im_patch_token: bool = key(True, "add <im_patch> to the tokenizer", checkpoint=True)

    rope_scaling_factor: float | None = key(
        None, "stretch the language model's rotary positions by this factor", within=FROM_1
    )
    rope_scaling_type: Literal["linear", "dynamic", "yarn"] | None = key(
        None, "kind of rotary scaling, of those that need no more than a factor"
    )


_SPLIT_MODES = {"highres": "the highres image mode", "crop_split": "the crop_split image mode"}


class DataKeys(KeyGroup):
    """The data: where it lies and how images, videos and labels are made from it."""

    data_path: str | None = key(None, "training data: LLaVA JSON or JSONL, /path/{a,b}.json, or a mixture YAML")
    image_folder: str | None = key(None, "folder that image paths are relative to")
    video_folder: str | None = key(None, "folder that video paths are relative to")
    allow_absolute_paths: bool = key(False, "let records name files outside image_folder and video_folder")
    lazy_preprocess: bool = key(False, "accepted for LLaVA-NeXT's launch lines: records are always prepared when drawn")
    is_multimodal: bool = key(False, "set by the trainer when there is a vision tower")
    early_mix_text: bool = key(False, "mix text-only records into batches with images")
    image_aspect_ratio: str = key(
        "square",
        "image handling: square, pad, anyres, anyres_max_N; native (own size, for towers that take any)",
        tower=True,
        checkpoint=True,
        refuse=_SPLIT_MODES,
    )
    min_pixels: int = key(
        56 * 56,
        "native and Qwen2-VL: smaller images are scaled up to this many pixels",
        tower=True,
        checkpoint=True,
        within=POSITIVE,
    )
    max_pixels: int = key(
        1280 * 28 * 28,
        "native and Qwen2-VL: larger images are scaled down to this many pixels",
        tower=True,
        checkpoint=True,
        within=POSITIVE,
    )
    image_grid_pinpoints: str | list[list[int]] | None = key(
        None,
        'resolutions anyres chooses from, as [[width, height], ...] or "(1x1),...,(6x6)"',
        tower=True,
        checkpoint=True,
    )
    patch_selection_method: Literal["all", "v1", "v2", "budget"] | None = key(
        None,
        "Qwen2-VL: published name of adaptive_patches' method; what these four leave out is as in the model's image "
        "processor; all: every patch is kept",
    )
    patch_alpha: float | list[float] | None = key(
        None, "Qwen2-VL: published name of adaptive_patches' alpha", within=FROM_0
    )
    patch_thresholds: list[float] | None = key(
        None, "Qwen2-VL: published name of adaptive_patches' thresholds", within=NUMBER
    )
    patch_importance: Literal["entropy", "laplacian", "reconstruction"] | None = key(
        None, "Qwen2-VL: published name of adaptive_patches' importance"
    )
    video_fps: int = key(1, "frames taken per second of video", within=POSITIVE)
    frames_upbound: int = key(0, "most frames taken from one video; 0: no limit", within=COUNT)
    add_time_instruction: bool = key(False, "tell the model the length of the video and the times of its frames")
    force_sample: bool = key(False, "always take frames_upbound frames")
    supervise: Literal["llava_next", "answers_only"] | None = key(
        None, "which tokens carry labels; not given: llava_next where the template has it, else answers_only"
    )
    system_turn: Literal["template", "record"] = key(
        "template",
        "a record's own system turn: template: dropped for the template's system text, as LLaVA-NeXT does; record: in "
        "place of it",
        checkpoint=True,
    )
    pack_sequences: bool = key(
        False, "several samples share a row, one after the other without padding; attention never crosses them"
    )
    pack_length: int | None = key(
        None,
        "most tokens of a packed row; not given: model_max_length, with pack_scope step as much for each sample of "
        "per_device_train_batch_size",
        within=POSITIVE,
    )
    pack_scope: Literal["step", "buffer"] = key(
        "step",
        "step: the samples of an optimizer step, those it has unpacked, share its rows; buffer: rows are filled from "
        "samples ahead, and a step has as many as there is room for",
    )
    pack_buffer: int = key(1024, "samples that pack_scope buffer looks at together", within=POSITIVE)
    pack_seed: int | None = key(None, "seed of pack_scope buffer's order of rows; not given: data_seed", within=COUNT)


class TrainKeys(KeyGroup):
    """The training run. Every other field of transformers.TrainingArguments is a key too."""

    model_max_length: int = key(
        4096, "longest sequence in tokens, visual tokens included; longer ones are truncated", within=POSITIVE
    )
    mm_projector_lr: float | None = key(None, "learning rate of the projector; not given: learning_rate", within=FROM_0)
    mm_token_compressor_lr: float | None = key(
        None, "learning rate of the token compressor; not given: learning_rate", within=FROM_0
    )
    mm_vision_tower_lr: float | None = key(
        None, "learning rate of the vision tower; not given: learning_rate", within=FROM_0
    )
    mm_vision_tower_trainable_blocks: int | None = key(
        None,
        "how many blocks of the vision tower learn, counted back from the features; what is before them stays frozen. "
        "Not given: all of it",
        within=POSITIVE,
    )
    mm_vision_tower_layer_decay: float = key(
        1.0,
        "layer-wise decay of the vision tower's learning rate, as in BEiT: of n blocks, block i (from 0) has it times "
        "decay^(n - i), the embeddings decay^(n + 1)",
        within=SHARE_ABOVE_0,
    )
    freeze_mm_mlp_adapter: bool = key(False, "freeze the projector (when mm_tunable_parts is not given)")
    freeze_mm_vision_resampler: bool = key(False, "nothing to freeze: there is no resampler")
    group_by_varlen: bool = key(False, "batches of samples of like length")
    group_by_modality_length: bool = key(False, "batches of one modality and like length")
    group_by_modality_length_auto: bool = key(False, "like group_by_modality_length, with shuffled batch order")
    group_lengths: Literal["words", "tokens"] = key(
        "words",
        "length that the group_by keys go by: words: LLaVA-NeXT's estimate from the text; tokens: those of the sample, "
        "its pictures' too, read from their headers before training",
    )
    attn_implementation: str | None = key(
        None, "attention of the language model: eager, sdpa, varlen, flash_attention_2; not given: the best available"
    )
    cache_dir: str | None = key(None, "where models from the hub are kept")
    verbose_logging: bool = key(False, "print every argument before training")

    optim: str = key("adamw_torch", "optimizer", within=OPTIMIZER)
    gradient_checkpointing: bool = key(True, "recompute activations in the backward pass to save memory")
    vision_micro_batch: int | None = key(
        None,
        "most images (crops, frames) that the vision encoder sees in one call; not given: all of a batch. Same "
        "numbers, less memory",
        within=POSITIVE,
    )
    torch_compile_tower: bool = key(
        False, "compile the blocks of the vision encoder; torch_compile: those of the language model too"
    )
    remove_unused_columns: bool = key(False, "must stay False: the collator needs the whole record")
    auto_find_batch_size: bool = key(False, "halve the batch size until it fits into memory")
    logging_nan_inf_filter: bool = key(
        False, "transformers' filter of losses that are not finite; their steps are skipped and not logged without it"
    )
    max_bad_steps: int = key(
        10,
        "steps in a row with a loss, gradient or input that is not finite, which end the run; each is skipped",
        within=POSITIVE,
    )
    loss_spike_factor: float = key(
        5.0,
        "tell of a loss that is more than this times the median of the steps before, with its records; 0: never",
        within=FACTOR,
    )
    peak_tflops: float | None = key(
        None,
        "what one device can do at most, in TFLOP/s of bf16, for perf/mfu in the log; not given: by its name, on CUDA",
        within=ABOVE_0,
    )
    report_to: str | list[str] = key(
        "none", "where metrics are reported: none, wandb, tensorboard, ...", within=REPORTS
    )

    verify_checkpoints: Literal["full", "sizes"] = key(
        "full", "how a checkpoint is held against its manifest before a run goes on from it: full reads all of it"
    )
    save_grace_seconds: float = key(
        60, "seconds from SIGTERM, SIGHUP, SIGUSR1 or Ctrl-C until a checkpoint must have been begun", within=ABOVE_0
    )

    eval_data_path: str | None = key(None, "records to evaluate on with eval_strategy steps or epoch; as data_path")
    eval_image_folder: str | None = key(None, "folder of the evaluation's images; not given: image_folder")
    eval_exact_match: bool = key(False, "evaluation: also answer the questions, and log how many answers are right")
    eval_limit: int | None = key(None, "evaluation: most records; not given: all", within=POSITIVE)
    eval_max_new_tokens: int = key(16, "evaluation: longest answer, in tokens", within=POSITIVE)
    eval_blank_images: bool = key(False, "evaluation: ask again with blank images (with eval_exact_match)")

    overwrite_output_dir: bool = key(False, "train anew although output_dir holds a finished run or checkpoints")
    logging_dir: str | None = key(
        None, "tensorboard's folder (sets TENSORBOARD_LOGGING_DIR, as transformers 5 wants it)"
    )

    bits: int = key(
        16, "4 or 8: hold the language model quantised by bitsandbytes, under LoRA (QLoRA)", within=one_of(16, 8, 4)
    )
    double_quant: bool = key(True, "quantise the quantisation constants (with bits 4)")
    quant_type: Literal["nf4", "fp4"] = key("nf4", "4-bit data type (with bits 4)")
    lora_enable: bool = key(False, "train low-rank adapters in the language model in place of its weights")
    lora_r: int = key(64, "LoRA: rank (with lora_enable)", within=POSITIVE)
    lora_alpha: int = key(16, "LoRA: scale (with lora_enable)", within=POSITIVE)
    lora_dropout: float = key(0.05, "LoRA: dropout (with lora_enable)", within=SHARE_BELOW_1)
    lora_weight_path: str = key("", "LoRA: folder of an adapter to start from (with lora_enable)")
    lora_bias: Literal["none", "all", "lora_only"] = key("none", "LoRA: which biases train (with lora_enable)")


GROUPS: dict[str, type[KeyGroup]] = {"model": ModelKeys, "data": DataKeys, "train": TrainKeys}

# published name -> member of adaptive_patches, with which it is one setting
PATCH_KEYS = {
    "patch_selection_method": "method",
    "patch_alpha": "alpha",
    "patch_thresholds": "thresholds",
    "patch_importance": "importance",
}

# Keys of LLaVA-NeXT whose part does not exist here: any value but the default is an error that names the part.
# {the key that they stand behind in the table of keys: {part: {key: default, or (type, default)}}}
_TEXT, _NUMBER, _COUNT = (str | None, None), (float | None, None), (int | None, None)
REFUSED: dict[str, dict[str, dict[str, Any]]] = {
    "tune_mm_mlp_adapter": {"the vision resampler": {"tune_mm_vision_resampler": False}},
    "mm_vision_tower_type": {"a second source of tower weights": {"vision_tower_pretrained": _TEXT}},
    "rope_scaling_type": {
        "the vision resampler": {
            **{"mm_resampler_type": _TEXT, "mm_mask_drop_mode": "fixed", "mm_mask_drop_skip_percentage": 0.0},
            **{"mm_mask_drop_ratio": 0.25, "mm_mask_drop_ratio_upper": _NUMBER, "mm_mask_drop_ratio_lower": _NUMBER},
            "mm_spatial_pool_out_channels": _COUNT,
        },
        "the perceiver resampler": {
            **{"mm_perceiver_depth": 3, "mm_perceiver_latents": 32, "mm_perceiver_ff_mult": (float, 4)},
            "mm_perceiver_pretrained": _TEXT,
        },
        "the Q-Former resampler": {"mm_qformer_depth": 3, "mm_qformer_latents": 32, "mm_qformer_pretrained": _TEXT},
        "position skipping": {"use_pos_skipping": False, "pos_skipping_range": 4096},
        "slow-fast video": {"add_faster_video": False, "faster_token_stride": 10},
    },
    "image_grid_pinpoints": {
        "the crop_split image mode": {"image_crop_resolution": _COUNT, "image_split_resolution": _COUNT}
    },
    "lora_bias": {
        "MPT": {"mpt_attn_impl": (str | None, "triton")},
        "MeZO training": {"trainer_mode": "regular", "zo_eps": 1e-3, "zo_num_directions": 1},
    },
}
# of them, what a checkpoint's config is refused for; the others had no effect where these are unset
REFUSED_IN_CHECKPOINTS = ("mm_resampler_type", "tune_mm_vision_resampler", "add_faster_video", "use_pos_skipping")
