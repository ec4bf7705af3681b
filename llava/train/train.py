"""Train a LLaVA model: `python -m llava.train.train [CONFIG.yaml] [--key value ...]`.

Also `python llava/train/train_mem.py <flags>`, as LLaVA-NeXT is launched. The same code runs as one CPU process and
under `torchrun` or `deepspeed` on many GPUs.
"""

import contextlib
import json
import os
import re
import shutil
import time
from pathlib import Path

from llava.errors import LlavaError, report_errors
from llava.utils import is_rank0, rank0_print


@report_errors
def train(argv=None):
    """Train as the arguments say, resume where a checkpoint lies in `output_dir`, save; see `llava.config`."""
    from llava.train.arguments import parse_args

    args = parse_args(argv)
    check_llava_run(args[2].run_config)
    run(*args, make=make_llava)


def check_llava_run(settings):
    """Refuse what only Qwen2-VL has."""
    for name in ("patch_selection_method", "patch_alpha", "patch_thresholds", "patch_importance"):
        if settings[name] is not None:
            raise LlavaError(
                f"{settings.source(name)}: {name} is {settings[name]!r}, which is for Qwen2-VL; expected none here, or "
                "scripts/finetune_qwen2_vl.sh"
            )


def run(model_args, data_args, training_args, make, trainer_class=None):
    """One run, of any kind of model.

    Args:
        model_args, data_args, training_args: of `parse_args`.
        make: called with these three; gives the model, the tokenizer or processor, and the data set and collator by
            the names that `Trainer` has for them.
        trainer_class: a `LLaVATrainer` or a subclass of it.
    """
    try:
        _train(model_args, data_args, training_args, make, trainer_class)
    finally:
        leave_process_group()


def leave_process_group():
    """End this process's part in a distributed run; without it the process may abort at its exit."""
    import torch

    # a process that ends inside its group aborts under ZeRO-2
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gloo = torch.distributed.get_backend() == "gloo"
        torch.distributed.destroy_process_group()
        if gloo:  # its threads let go of the last tensors a moment late, and abort if Python is shutting down by then
            time.sleep(0.5)


def _train(model_args, data_args, training_args, make, trainer_class):
    from transformers import set_seed

    from llava.train.llava_trainer import LLaVATrainer
    from llava.train.lora import adapt, check_lora, keep_trained_in_float32
    from llava.train.parts import set_trainable, tunable_parts

    if training_args.verbose_logging:
        for key, setting in training_args.run_config.settings.items():
            rank0_print(f"{key}: {setting.value} ({setting.source})")
    if training_args.eval_strategy != "no":
        raise LlavaError(
            f"eval_strategy is {training_args.eval_strategy.value}, expected no: there is no evaluation during "
            "training; python -m llava.eval.exact_match evaluates a checkpoint"
        )
    out = training_args.output_dir
    if training_args.overwrite_output_dir:
        with training_args.main_process_first(local=False, desc="removing the earlier run"):
            if is_rank0():
                remove_run(out)
    elif finished_steps(out) is not None:
        rank0_print(f"{out}: already trained ({finished_steps(out)} steps); --overwrite_output_dir trains again")
        return
    if training_args.deepspeed:
        import deepspeed

        deepspeed.init_distributed()  # ZeRO-3 asks for the world size while the model is built
    parts = tunable_parts(model_args, training_args)
    check_lora(training_args, parts)
    set_seed(training_args.seed)  # projector, newline token, new embeddings and adapters are drawn here
    model, processing_class, data = make(model_args, data_args, training_args)
    if training_args.lora_enable:
        model = adapt(model, model_args, training_args)
    set_trainable(model, parts, training_args.lora_bias)
    if training_args.lora_enable and not training_args.deepspeed:
        keep_trained_in_float32(model)

    trainer_class = trainer_class or LLaVATrainer
    trainer = trainer_class(model=model, processing_class=processing_class, args=training_args, parts=parts, **data)
    checkpoint = checkpoint_to_resume(training_args.resume_from_checkpoint, out)
    if checkpoint is not None:
        if training_args.deepspeed:
            check_own(checkpoint, out)
        rank0_print(f"resuming from {checkpoint}")
        trainer.read_bad_records(checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    save(trainer, out)


def remove_run(out: str) -> None:
    """Remove an earlier run's state and checkpoints from its folder, and nothing else."""
    folder = Path(out)
    (folder / "trainer_state.json").unlink(missing_ok=True)
    for checkpoint in folder.glob("checkpoint-*"):
        if (checkpoint / "trainer_state.json").is_file():
            shutil.rmtree(checkpoint)


def checkpoint_to_resume(asked: str | None, out: str) -> str | None:
    """The checkpoint a run goes on from: the one `asked` for, else the last in `out` that was written to its end.

    `asked` may also be "true" (the last one, as without it) or "false" (none).
    """
    if asked is not None and asked.lower() not in ("true", "false"):
        if not os.path.isfile(os.path.join(asked, "trainer_state.json")):
            raise LlavaError(
                f"resume_from_checkpoint: {asked}: found no trainer_state.json, expected a run's checkpoint-N folder"
            )
        return asked
    if asked is not None and asked.lower() == "false":
        return None
    whole = [path.parent for path in Path(out).glob("checkpoint-*/trainer_state.json")]  # a checkpoint's last file
    numbered = [path for path in whole if path.name.removeprefix("checkpoint-").isdecimal()]
    return str(max(numbered, key=lambda path: int(path.name.removeprefix("checkpoint-")))) if numbered else None


def check_own(checkpoint: str, out: str) -> None:
    """DeepSpeed's state is a pickle, which runs code when it is read: only this run's own folder is trusted."""
    if Path(out).resolve() not in Path(checkpoint).resolve().parents:
        raise LlavaError(
            f"resume_from_checkpoint: {checkpoint} is not in output_dir {out}, expected one of the run's own "
            "checkpoints: DeepSpeed's state is unpickled; to go on from a model use model_name_or_path"
        )


def finished_steps(out: str) -> int | None:
    """Steps of a run that has ended in this folder, else None."""
    path = os.path.join(out, "trainer_state.json")
    if not os.path.isfile(path):
        return None
    with open(path) as file:
        return json.load(file)["global_step"]


def make_llava(model_args, data_args, training_args):
    """(LLaVA model, tokenizer, data)."""
    model, tokenizer = load_model(model_args, data_args, training_args)
    return model, tokenizer, make_data(model, tokenizer, model_args, data_args, training_args)


def weights_dtype(training_args):
    """The dtype a run holds its model in.

    DeepSpeed keeps float32 master weights beside bf16 ones, frozen weights need none; else autocast does the rest.
    """
    import torch

    low = training_args.bf16 and (training_args.deepspeed or training_args.lora_enable)
    return torch.bfloat16 if low else torch.float32


def load_model(model_args, data_args, training_args):
    """(model with its vision half, tokenizer), config filled with all that inference needs to know."""
    from llava.conversation import get_template
    from llava.model import builder
    from llava.model.families import model_classes
    from llava.train.lora import check_no_adapter, quantisation_for

    path = model_args.model_name_or_path
    get_template(model_args.version)  # an unknown template is refused before any weight is read
    check_image_options(model_args.mm_patch_merge_type, data_args.image_aspect_ratio)
    check_no_adapter(path)
    values = builder.read_config(path)
    architecture = architecture_for(model_args, values)
    model_class, config_class = model_classes(architecture)
    config = builder.make_config(path, config_class, values, rope_overrides(model_args, values))
    dtype = weights_dtype(training_args)
    with readable_weights(path):
        model = model_class.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation=attention_for(training_args, config),
            cache_dir=training_args.cache_dir,
            quantization_config=quantisation_for(training_args),
        )
    model.config.use_cache = False
    tokenizer = builder.load_tokenizer(
        path, cache_dir=training_args.cache_dir, model_max_length=training_args.model_max_length, padding_side="right"
    )
    if model_args.vision_tower is not None:
        with readable_weights(model_args.vision_tower):
            model.get_model().initialize_vision_modules(model_args)
        model.get_vision_tower().to(dtype=dtype)
        model.get_model().mm_projector.to(dtype=dtype)
        check_new_tokens(model_args, training_args, tokenizer)
        model.initialize_vision_tokenizer(model_args, tokenizer)
    describe(model, model_args, data_args, training_args)
    return model, tokenizer


def attention_for(training_args, config=None) -> str:
    """The attention that the run asks for, else the best available; `config` is the model's."""
    import torch
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from llava.model import builder

    asked = training_args.attn_implementation
    known = ["eager", *(name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in name)]
    if asked is not None and asked not in known and "/" not in asked:  # with a slash: a kernel on the hub
        raise LlavaError(f"attn_implementation: found {asked!r}, expected one of {', '.join(known)}")
    dtype = torch.bfloat16 if training_args.bf16 or training_args.fp16 else torch.float32
    return builder.best_attention(dtype, training_args.device.type == "cpu", config, asked)


@contextlib.contextmanager
def readable_weights(source: str):
    """Weights that are missing or cut short are a fault of `source`, told in one line."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise LlavaError(f"{source}: its weights cannot be read ({str(error).splitlines()[0][:160]})") from None


def check_image_options(merge_type: str, aspect_ratio: str):
    """Refuse what LLaVA-NeXT would silently take for something else: its code looks for parts of these words."""
    first, *more = merge_type.split("_")
    known = first == "spatial" and set(more) <= {"unpad", "nobase", "maxpool2x2"}
    if merge_type != "flat" and not known:
        raise LlavaError(
            f"mm_patch_merge_type: found {merge_type!r}, expected flat or spatial with _unpad, _nobase, _maxpool2x2"
        )
    if not re.fullmatch(r"square|pad|native|anyres(_max_[1-9]\d*)?", aspect_ratio):
        raise LlavaError(
            f"image_aspect_ratio: found {aspect_ratio!r}, expected square, pad, native, anyres or anyres_max_N"
        )


def architecture_for(model_args, values) -> str:
    """The model class to train, from `model_class_name` or the checkpoint."""
    from llava.model.families import LANGUAGE_MODELS, resolve_architecture

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
    from llava.constants import DEFAULT_IM_START_TOKEN
    from llava.train.parts import is_adapter_only, tunable_parts

    adapter_only = is_adapter_only(tunable_parts(model_args, training_args))
    if not model_args.mm_use_im_start_end or not (adapter_only or training_args.lora_enable):
        return
    if DEFAULT_IM_START_TOKEN not in tokenizer.get_vocab():
        raise LlavaError(
            "mm_use_im_start_end: adds tokens whose embeddings a run of the projector alone, or of LoRA adapters, "
            "would leave untrained and lose; train mm_language_model whole or leave it out in this stage"
        )


def describe(model, model_args, data_args, training_args):
    """Write into the model's config what LLaVA-NeXT's inference reads from it, and the conversation template."""
    from llava.mm_utils import NativeResolution, parse_grid_pinpoints, processor_sides

    config = model.config
    config.architectures = [type(model).__name__]  # not the language model's, as it came
    config.conversation_template = model_args.version
    config.tokenizer_padding_side = "right"
    config.tokenizer_model_max_length = training_args.model_max_length
    if model_args.vision_tower is None:
        return
    for key in ("mm_newline_position", "mm_spatial_pool_mode", "mm_spatial_pool_stride", "mm_use_im_start_end"):
        setattr(config, key, getattr(model_args, key))
    for key in ("mm_use_im_patch_token", "mm_tunable_parts", "unfreeze_mm_vision_tower", "tune_mm_mlp_adapter"):
        setattr(config, key, getattr(model_args, key))
    for key in ("image_aspect_ratio", "add_time_instruction", "force_sample"):
        setattr(config, key, getattr(data_args, key))
    config.image_grid_pinpoints = None
    if data_args.image_aspect_ratio == "native":
        config.min_pixels, config.max_pixels = data_args.min_pixels, data_args.max_pixels
        if not model.get_vision_tower().any_size:
            raise LlavaError(
                f"image_aspect_ratio native: the tower {config.mm_vision_tower} takes images of one size; expected one "
                "that takes any (hevc_vit, hevc_vit_packing), or square, pad or anyres"
            )
    data_args.native_resolution = NativeResolution.from_config(config)
    if "anyres" in data_args.image_aspect_ratio:
        side = processor_sides(model.get_vision_tower().image_processor)[1]
        grid = parse_grid_pinpoints(data_args.image_grid_pinpoints, side)
        config.image_grid_pinpoints = data_args.image_grid_pinpoints = [list(pair) for pair in grid]
    config.mm_projector_lr, config.mm_vision_tower_lr = training_args.mm_projector_lr, training_args.mm_vision_tower_lr


def make_data(model, tokenizer, model_args, data_args, training_args):
    """Dataset and collator, checked as a whole before training."""
    from llava.data import make_supervised_data_module

    if data_args.data_path is None:
        raise LlavaError("data_path: missing; expected LLaVA JSON or JSONL, or a mixture YAML")
    tower = model.get_vision_tower()
    module = make_supervised_data_module(
        tokenizer,
        data_args,
        image_processor=tower and tower.image_processor,
        version=model_args.version,
        model_max_length=training_args.model_max_length,
        count_visual_tokens=tower and model.visual_token_counter(),
        seed=training_args.seed,
    )
    records = module["train_dataset"].records
    seen = next((i for i, record in enumerate(records) if record.get("image") or record.get("video")), None)
    if tower is None and seen is not None:
        raise LlavaError(f"{records.describe(seen)}: found an image or video, but vision_tower is not set")
    return module


def save(trainer, out: str):
    """Leave the trained model in `out`: all of it, or after LLaVA's stage 1 the projector alone."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.config.get_text_config().use_cache = True
    if trainer.keeps_projector_alone:
        trainer.save_adapter(out)
        if is_rank0():
            trainer.save_description(out)
    else:
        trainer.save_model(out)
    if is_rank0():
        with open(os.path.join(out, "run_config.json"), "w") as file:
            json.dump(trainer.args.run_config.to_dict(), file, indent=2)
    trainer.accelerator.wait_for_everyone()
    trainer.save_state()  # last: its presence says that the run has ended
    if trainer.bad_records:
        rank0_print(f"records left out: {len(trainer.bad_records)}")
    stats = trainer.train_dataset.stats
    if stats["truncated"]:
        rank0_print(f"samples cut to model_max_length: {stats['truncated']}, {stats['no_label']} of them left no label")
    rank0_print(f"saved to {out}")


if __name__ == "__main__":
    train()
