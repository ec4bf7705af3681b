"""The command line: LLaVA-NeXT's launch lines, HfArgumentParser's ways of writing flags, old names, absent parts."""

import pytest

from llava.config import resolve
from llava.config.keys import REFUSED, REFUSED_IN_CHECKPOINTS
from llava.config.old_names import OLD_NAMES
from llava.config.schema import all_keys, own_keys
from llava.errors import LlavaError
from tests.config.launch_lines import CLIP, LAUNCH_LINES, LLAVA_NEXT_DEFAULTS, SIGLIP


def one_line_error(argv: list[str]) -> str:
    with pytest.raises(LlavaError) as error:
        resolve(argv)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_pretrain_clip_launch_line():
    run = resolve(LAUNCH_LINES["pretrain_clip.sh"])
    assert run["vision_tower"] == CLIP
    assert (run["version"], run["mm_tunable_parts"], run["mm_vision_select_layer"]) == ("plain", "mm_mlp_adapter", -2)
    assert (run["learning_rate"], run["weight_decay"], run["warmup_steps"]) == (1e-3, 0.0, 0.03)
    assert (run["eval_strategy"], run["save_strategy"], run["save_steps"]) == ("no", "no", 50000)
    assert (run["bf16"], run["tf32"], run["gradient_checkpointing"]) == (True, True, True)
    assert (run["report_to"], run["model_max_length"], run["attn_implementation"]) == ("wandb", 8192, "sdpa")
    assert run["mm_use_im_patch_token"] is False
    assert run.notices == []


@pytest.mark.parametrize("script", ["finetune_ov.sh", "finetune_si.sh"])
def test_finetune_launch_lines(script):
    run = resolve(LAUNCH_LINES[script])
    assert run["vision_tower"] == SIGLIP
    assert run["mm_tunable_parts"] == "mm_vision_tower,mm_mlp_adapter,mm_language_model"
    assert (run["learning_rate"], run["mm_vision_tower_lr"]) == (1e-5, 2e-6)
    assert (run["image_aspect_ratio"], run["image_grid_pinpoints"]) == ("anyres_max_9", "(1x1),...,(6x6)")
    assert (run["mm_patch_merge_type"], run["frames_upbound"], run["save_total_limit"]) == ("spatial_unpad", 32, 1)
    assert (run["torch_compile"], run["torch_compile_backend"]) == (True, "inductor")
    assert (run["group_by_modality_length"], run["dataloader_drop_last"]) == (True, True)
    assert (run["gradient_accumulation_steps"], run["per_device_train_batch_size"]) == (2, 1)
    given = {word[2:].partition("=")[0] for word in LAUNCH_LINES[script] if word.startswith("--")}
    assert {OLD_NAMES[name].target if name in OLD_NAMES else name for name in given} == {
        name for name in run.settings if run.source(name) == "command line"
    }


def test_every_llava_next_flag_has_its_default():
    run = resolve([])
    assert {name: run[name] for name in LLAVA_NEXT_DEFAULTS} == LLAVA_NEXT_DEFAULTS


def test_every_llava_next_flag_is_accepted_with_its_default():
    words = [f"--{name}={value}" for name, value in LLAVA_NEXT_DEFAULTS.items() if value is not None]
    run = resolve(words)
    for name, value in LLAVA_NEXT_DEFAULTS.items():
        assert run[name] == value
        assert run.source(name) == ("default" if value is None else "command line")


def test_own_keys_have_descriptions():
    assert all(key.description for key in own_keys().values())


def test_keys_that_only_refuse_stand_behind_keys_that_exist():
    names = [name for parts in REFUSED.values() for entries in parts.values() for name in entries]
    assert len(names) == len(set(names)) == 26 and set(REFUSED_IN_CHECKPOINTS) <= set(names)
    assert {name for name, key in own_keys().items() if key.only_default} == set(names)
    order = list(own_keys())
    assert order[order.index("tune_mm_mlp_adapter") + 1] == "tune_mm_vision_resampler"


@pytest.mark.parametrize("name", [key.name for key in own_keys().values() if key.only_default])
def test_a_key_of_a_part_that_does_not_exist_takes_its_default_alone(name):
    key = own_keys()[name]
    value = {bool: "true", int: "77", float: "0.77", str: "other"}[key.kinds[0]]
    with pytest.raises(LlavaError, match=f"{name} is .*, but {key.only_default} is not available in this version"):
        resolve([f"--{name}={value}"])
    assert resolve([f"--{name}={'none' if key.default is None else key.default}"])[name] == key.default


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--bf16"], "bf16", True),
        (["--bf16", "False"], "bf16", False),
        (["--bf16=1"], "bf16", True),
        (["--bf16", "no"], "bf16", False),
        (["--no_gradient_checkpointing"], "gradient_checkpointing", False),
        (["--no-delay-load"], "delay_load", False),
        (["--mm-vision-tower-lr", "2e-6"], "mm_vision_tower_lr", 2e-6),
        (["--learning_rate", "1"], "learning_rate", 1.0),
        (["--mm_vision_select_layer", "-2"], "mm_vision_select_layer", -2),
        (["--mm_projector_lr", "None"], "mm_projector_lr", None),
        (["--report_to", "wandb", "tensorboard"], "report_to", ["wandb", "tensorboard"]),
        (["--report_to", "none"], "report_to", "none"),
        (["--label_names", "labels"], "label_names", ["labels"]),
        (["--mm_vision_tower", "x"], "vision_tower", "x"),
        (["--seed", "1", "--seed", "2"], "seed", 2),
        (["--run_name", "7"], "run_name", "7"),
        (["--tf32", "--seed", "1"], "tf32", True),
        (["--deepspeed", "scripts/zero2.json"], "deepspeed", "scripts/zero2.json"),
        (["--local_rank=0"], "local_rank", 0),
        (["--lora_weight_path", ""], "lora_weight_path", ""),
        (["--lora_enable", "True"], "lora_enable", True),
        (["--mm_tunable_parts=mm_token_compressor"], "mm_tunable_parts", "mm_token_compressor"),
        (["--image_grid_pinpoints", "[(336, 672), (672, 336)]"], "image_grid_pinpoints", "[(336, 672), (672, 336)]"),
    ],
)
def test_ways_of_writing_a_flag(words, name, value):
    found = resolve(words)[name]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--mm_projector_typ", "linear"], ["command line", "mm_projector_typ", "'mm_projector_type'"]),
        (["--evaluation_strateg", "no"], ["'evaluation_strategy'"]),
        (["--learning_rate", "fast"], ["command line", "learning_rate", "'fast'", "expected number"]),
        (["--mm_vision_select_layer", "two"], ["mm_vision_select_layer", "'two'", "expected whole number"]),
        (["--bf16", "maybe"], ["bf16", "'maybe'", "expected true or false"]),
        (["--mm_newline_position", "middle"], ["'middle'", "one of grid, frame, one_token, no_token"]),
        (["--output_dir", "--bf16"], ["--output_dir needs a value"]),
        (["--seed", "1", "2"], ["'2'", "neither"]),
        (["a.yaml", "b.yaml"], ["two config files", "a.yaml", "b.yaml"]),
        (["a.yaml"], ["a.yaml", "no such config file"]),
        (["--tower", "missing.yaml"], ["command line", "missing.yaml"]),
        (["--mm_tunable_parts", "mm_vision_towr"], ["mm_tunable_parts", "'mm_vision_towr'"]),
        (["--image_grid_pinpoints", "336"], ["image_grid_pinpoints", "expected"]),
        (["--bf16", "--fp16"], ["fp16", "bf16", "command line"]),
    ],
)
def test_faults(words, parts):
    message = one_line_error(words)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--mm_resampler_type", "spatial_pool"], "resampler"),
        (["--mm_resampler_type", "qformer"], "resampler"),
        (["--tune_mm_vision_resampler", "True"], "resampler"),
        (["--mm_tunable_parts", "mm_vision_resampler"], "mm_vision_resampler"),
        (["--mm_perceiver_depth", "6"], "perceiver"),
        (["--mm_qformer_latents", "64"], "Q-Former"),
        (["--mm_mask_drop_ratio", "0.5"], "resampler"),
        (["--trainer_mode", "zo"], "MeZO"),
        (["--mpt_attn_impl", "torch"], "MPT"),
        (["--add_faster_video"], "slow-fast"),
        (["--use_pos_skipping", "True"], "position skipping"),
        (["--image_aspect_ratio", "highres"], "highres"),
        (["--image_aspect_ratio", "crop_split"], "crop_split"),
    ],
)
def test_absent_parts_are_refused(words, part):
    message = one_line_error(words)
    assert part in message
    assert "not available in this version" in message


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--evaluation_strategy", "steps"], "eval_strategy", "steps"),
        (["--warmup_ratio", "0.03"], "warmup_steps", 0.03),
        (["--warmup_ratio", "0.03", "--warmup_steps", "100"], "warmup_steps", 100),
        (["--warmup_ratio", "0.03", "--warmup_steps", "0"], "warmup_steps", 0.03),
        (["--group_by_length", "True"], "train_sampling_strategy", "group_by_length"),
        (["--group_by_length", "False"], "train_sampling_strategy", "random"),
        (["--no_cuda"], "use_cpu", True),
        (["--per_gpu_train_batch_size", "3"], "per_device_train_batch_size", 3),
        (["--push_to_hub_token", "x"], "hub_token", "x"),
        (["--adafactor"], "optim", "adafactor"),
        (["--split_batches", "True"], "accelerator_config", {"split_batches": True}),
        (["--logging_dir", "logs"], "logging_dir", "logs"),
        (["--overwrite_output_dir"], "overwrite_output_dir", True),
    ],
)
def test_old_names_are_translated(words, name, value):
    run = resolve(words)
    assert run[name] == value
    assert run.notices == []


@pytest.mark.parametrize(
    "words",
    [["--save_safetensors", "False"], ["--jit_mode_eval"], ["--use_ipex", "True"], ["--fp16_backend", "auto"]],
)
def test_old_names_without_effect_are_told_once(words):
    run = resolve(words)
    (notice,) = run.notices
    assert words[0].removeprefix("--") in notice


def test_every_name_of_transformers_4_40_is_known():
    assert set(OLD_NAMES) - set(all_keys()) == set(OLD_NAMES)  # a name that is a field again needs no translation
    for name in ("evaluation_strategy", "warmup_ratio", "logging_dir", "overwrite_output_dir", "save_safetensors"):
        assert name in OLD_NAMES or name in all_keys()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"method": "v2", "alpha": 0.8}', {"method": "v2", "alpha": 0.8}),
        ("{method: budget, alpha: [0.2, 0.6]}", {"method": "budget", "alpha": [0.2, 0.6]}),
        ("{method: v1}", {"method": "v1"}),
        ("none", None),
    ],
)
def test_a_mapping_in_one_word(text, value):
    assert resolve(["--adaptive_patches", text])["adaptive_patches"] == value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{method: v2"], "adaptive_patches is '{method: v2', neither JSON"),
        (["{method: v2}"], "command line: adaptive_patches: alpha: missing"),
        (["0.3"], "adaptive_patches is '0.3', expected mapping"),
    ],
)
def test_adaptive_patches_refused(words, message):
    assert message in one_line_error(["--adaptive_patches", *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--image_aspect_ratio", "anyres"], "expected square, pad or native"),
        (["--mm_projector_type", "pooler"], "mm_projector_type 'pooler'"),
        (["--use_token_compression"], "found use_token_compression"),
        (["--mm_vision_tower_type", "clip+toconv"], "found use_token_compression"),
    ],
)
def test_what_adaptive_patches_do_not_go_with(words, message, capsys):
    """The model's family refuses it, in training and where the run is shown."""
    from llava.config.__main__ import main

    with pytest.raises(SystemExit):
        main(["show", "--adaptive_patches", "{method: v1}", "--version", "qwen_1_5", *words])
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and "\n" not in error
