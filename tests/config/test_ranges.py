"""Numbers out of range and unknown words end in one line while a run is resolved; what is 0 for "off" does not."""

import importlib.util
import json
import math
import typing

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llava.config import resolve, rules
from llava.config.__main__ import main
from llava.config.schema import all_keys, convert
from llava.config.trainer_fields import trainer_fields
from llava.errors import LlavaError
from llava.train.toconv.config import KEYS as TOCONV_KEYS

NUMERIC = (int, float, list[float], list[int])
NUMBERS = [key.name for key in all_keys().values() if set(key.kinds) & set(NUMERIC) and not key.only_default]
RIGHT_AND_WRONG = {
    "POSITIVE": ([1, 7, 2**40], [0, -1, 2**63]),
    "COUNT": ([0, 1, 2**40], [-1, -5]),
    "POSITIVE_OR_ALL": ([-1, 1, 100], [0, -2]),
    "RANK": ([-1, 0, 7], [-2]),
    "SEED": ([0, 42, 2**32 - 1], [-1, 2**32]),
    "SECONDS": ([1, 1800, 10**9], [0, -1, 10**9 + 1]),
    "WHOLE": ([-2, 0, 5], [2**63, -(2**64)]),
    "NUMBER": ([-3.5, 0.0, 2.0], []),
    "FROM_0": ([0.0, 1e-9, 5.0, 1e30], [-1e-9, -1.0, 1.1e30]),
    "FROM_1": ([1.0, 2.5], [0.0, 0.99, -2.0]),
    "FACTOR": ([0.0, 1.0, 5.0], [-1.0, 0.5, 1e-9]),
    "ABOVE_0": ([1e-12, 5.0], [0.0, -1.0]),
    "EPSILON": ([1e-8, 1e-30, 1.0], [0.0, 1e-40, -1e-8]),
    "SHARE": ([0.0, 0.5, 1.0], [-0.1, 1.1]),
    "SHARE_BELOW_1": ([0.0, 0.5, 0.999], [1.0, 1.5, -0.1]),
    "INTERVAL": ([0.1, 1.0, 1, 500, 500.0], [0, 0.0, -1, 1.5, -0.5]),
    "WARMUP": ([0, 0.0, 0.03, 1.0, 100], [-1, -0.1, 1.5, 2.25]),
    "SCALES": (["336", "336,672,1008", "336, 672"], ["", "0", "336,-672", "336,x", "336,,672", "1.5"]),
    "SHARE_ABOVE_0": ([0.1, 1, 1.0], [0, 1.1, -0.5]),
    "REPORTS": (["none", "all", "wandb", ["wandb", "tensorboard"]], ["", "wandbb", ["wandb", "x"], "None"]),
    "OPTIMIZER": (["adamw_torch", "adafactor", "adamw_bnb_8bit"], ["adam", "", "ADAMW_TORCH"]),
    "LOG_LEVEL": (["passive", "error"], ["loud", ""]),
}
# words of a command line, and what is expected in place of their number or word
WRONG = [
    ("per_device_train_batch_size 0", "positive whole number"),
    ("gradient_accumulation_steps 0", "positive whole number"),
    ("model_max_length 0", "positive whole number"),
    ("model_max_length -1", "positive whole number"),
    ("adam_beta1 -0.1", "share from 0 and below 1"),
    ("adam_beta2 1.5", "share from 0 and below 1"),
    ("adam_epsilon 0", "number from 1e-30"),
    ("learning_rate nan", "number from 0"),
    ("learning_rate -1", "number from 0"),
    ("learning_rate inf", "number from 0"),
    ("mm_vision_tower_lr -1e-6", "number from 0"),
    ("mm_token_compressor_lr nan", "number from 0"),
    ("video_fps 0", "positive whole number"),
    ("frames_upbound -5", "whole number from 0"),
    ("lora_r 0", "positive whole number"),
    ("lora_alpha 0", "positive whole number"),
    ("lora_dropout 1.5", "share from 0 and below 1"),
    ("mm_projector_lr -1", "number from 0"),
    ("rope_scaling_factor 0", "number from 1"),
    ("rope_scaling_factor 2 --rope_scaling_type foo", "one of linear, dynamic, yarn"),
    ("rope_scaling_factor 2 --rope_scaling_type llama3", "one of linear, dynamic, yarn"),
    ("rope_scaling_factor 2 --rope_scaling_type longrope", "one of linear, dynamic, yarn"),
    ("num_train_epochs -1", "number from 0"),
    ("num_train_epochs 0", "one of them positive"),
    ("max_steps 0", "-1 or a positive whole number"),
    ("max_steps -2", "-1 or a positive whole number"),
    ("save_total_limit 0", "positive whole number"),
    ("seed -1", "whole number from 0 to 4294967295"),
    ("data_seed 4294967296", "whole number from 0 to 4294967295"),
    ("dataloader_num_workers -1", "whole number from 0"),
    ("dataloader_prefetch_factor 2", "workers, or none of what is for them"),
    ("dataloader_persistent_workers", "workers, or none of what is for them"),
    ("dataloader_num_workers 1 --dataloader_prefetch_factor 0", "positive whole number"),
    ("save_steps 0", "positive whole number of steps, or a share of all below 1"),
    ("eval_steps 1.5", "positive whole number of steps, or a share of all below 1"),
    ("logging_steps -1", "positive whole number of steps, or a share of all below 1"),
    ("warmup_steps 1.5", "whole number of steps from 0, or a share of all below 1"),
    ("warmup_ratio 1.5", "share from 0 to 1"),
    ("warmup_ratio nan", "share from 0 to 1"),
    ("per_gpu_train_batch_size 0", "positive whole number"),
    ("max_grad_norm -1", "number from 0"),
    ("weight_decay -0.1", "number from 0"),
    ("neftune_noise_alpha nan", "number from 0"),
    ("eval_delay -1", "number from 0"),
    ("torch_empty_cache_steps 0", "positive whole number"),
    ("ddp_timeout 0", "positive whole number of seconds"),
    ("ddp_bucket_cap_mb 0", "positive whole number"),
    ("label_smoothing_factor 2", "share from 0 to 1"),
    ("bits 5", "16, 8 or 4"),
    ("bits 4", "expected lora_enable too"),
    ("compression_output_size 0", "positive whole number"),
    ("use_token_compression --compression_output_size 25", "expected the output not above the input"),
    ("min_pixels 0", "positive whole number"),
    ("min_pixels 10000 --max_pixels 5000", "expected min_pixels not above max_pixels"),
    ("max_pixels 2000 --image_aspect_ratio native", "expected min_pixels not above max_pixels"),
    ("s2_scales 336,0", "positive whole numbers joined by commas"),
    ("patch_alpha -1", "number from 0"),
    ("patch_alpha 0.5 nan", "number from 0"),
    ("patch_thresholds 1 inf", "finite number"),
    ('adaptive_patches {"method": "v1", "thresholds": [Infinity, 1]}', "a finite one for each size"),
    ("mm_spatial_pool_stride 3", "expected 2"),
    ("optim adam", "an optimizer of transformers"),
    ("lr_scheduler_type cosin", "one of linear, cosine, "),
    ("save_strategy never", "one of no, steps, epoch"),
    ("logging_strategy x", "one of no, steps, epoch"),
    ("hub_strategy x", "one of end, every_save"),
    ("train_sampling_strategy x", "one of random, sequential, group_by_length"),
    ("quant_type int4", "one of nf4, fp4"),
    ("log_level loud", "one of passive, "),
    ("include_num_input_tokens_seen x", "one of true, false, all, non_padding, no"),
    ("dataloader_multiprocessing_context x", "one of fork, spawn, forkserver"),
    ("ddp_backend x", "one of nccl, gloo"),
    ("report_to foo", "none, all, or some of azure_ml, "),
    ("report_to wandb foo", "none, all, or some of azure_ml, "),
    ("report_to none wandb", "expected none or all alone"),
]
# what LLaVA-NeXT's launch lines and transformers' defaults switch things off by
RIGHT = [
    *("frames_upbound 0", "warmup_steps 0", "warmup_ratio 0.", "weight_decay 0.", "dataloader_num_workers 0"),
    *("label_smoothing_factor 0", "lora_dropout 0", "max_grad_norm 0", "neftune_noise_alpha 0", "eval_delay 0"),
    *("max_steps -1", "local_rank -1", "mm_vision_select_layer -2", "mm_vision_select_layer 0", "learning_rate 0"),
    *("num_train_epochs 0 --max_steps 5", "num_train_epochs 0.5", "save_steps 0.1", "logging_steps 1.0", "seed 0"),
    *(
        "save_total_limit none",
        "mm_projector_lr none",
        "report_to none",
        "report_to all",
        "bits 16",
        "mm_projector_lr 0",
    ),
    *("bits 4 --lora_enable", "rope_scaling_factor 2 --rope_scaling_type yarn", "max_pixels 2000", "save_strategy no"),
    *("include_num_input_tokens_seen all", "include_num_input_tokens_seen true", "ddp_timeout 7200", "s2_scales 28,56"),
]


def flags(text: str) -> list[str]:
    """The words of a command line whose first key stands without its dashes."""
    first, *rest = f"--{text}".split(" --")
    words = [word for part in rest for word in f"--{part}".split()]
    name, _, value = first.partition(" ")
    return [name, *([value] if value.startswith("{") else value.split()), *words]


def refusal(argv: list[str]) -> str:
    with pytest.raises(LlavaError) as error:
        resolve(argv)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_number_has_a_rule():
    keys = {**all_keys(), **{f"toconv: {name}": key for name, key in TOCONV_KEYS.items()}}
    kinds = {*NUMERIC}
    lacking = [name for name, key in keys.items() if {*key.kinds} & kinds and not key.only_default and not key.within]
    assert not lacking
    # a field of transformers that is a number is one of them, whichever version is installed
    assert {name for name, (kind, _) in trainer_fields().items() if kind in NUMERIC} <= {*NUMBERS}
    assert "patch_thresholds" in NUMBERS and "eval_steps" in NUMBERS


def test_every_rule_is_tried():
    named = {name for name, value in vars(rules).items() if isinstance(value, rules.Rule)}
    assert named == set(RIGHT_AND_WRONG)


@pytest.mark.parametrize("name", RIGHT_AND_WRONG)
def test_rules(name):
    rule, (right, wrong) = getattr(rules, name), RIGHT_AND_WRONG[name]
    assert [rule.fault(value) for value in right] == [None] * len(right)
    assert all(rule.fault(value).startswith(rule.text) for value in wrong)
    assert rule.fault(None) is None and rule.fault([]) is None
    if not isinstance(right[0], str):
        assert [rule.fault(value) for value in (math.nan, math.inf, -math.inf)] == [rule.text] * 3
        assert rule.fault([right[0], math.nan]) == rule.text and rule.fault(10**400)


@pytest.mark.parametrize("name", [key for key, value in all_keys().items() if value.within])
def test_defaults_are_within_their_rules(name):
    key = all_keys()[name]
    if key.default != "(computed)":
        assert key.within.fault(key.default) is None


@pytest.mark.parametrize(("text", "expected"), WRONG, ids=[text for text, _ in WRONG])
def test_out_of_range(text, expected):
    argv = flags(text)
    message = refusal(argv)
    assert message.startswith("command line: ") and expected in message
    names = [word[2:] for word in argv if word.startswith("--")]
    assert any(f"{name} is " in message or f"{name}: " in message for name in names)


@pytest.mark.parametrize("text", RIGHT)
def test_within_range(text):
    assert resolve(flags(text)).notices == []


def test_each_source_is_named(tmp_path, monkeypatch, capsys):
    """YAML files as the command line, and `show` as a run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tower.yaml").write_text("compression_output_size: 0\n")
    (tmp_path / "train.yaml").write_text("learning_rate: nan\n")
    assert refusal(["train.yaml"]) == "train.yaml: learning_rate is nan, expected number from 0"
    assert refusal(["--tower", "tower.yaml"]).startswith("tower.yaml: compression_output_size is 0, expected positive")
    with pytest.raises(SystemExit) as stop:
        main(["show", "train.yaml"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: train.yaml: learning_rate is nan, expected number from 0\n"


def test_a_value_that_is_overridden_must_be_right_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.yaml").write_text("lora_r: 0\n")
    assert refusal(["train.yaml", "--lora_r", "8"]).startswith("train.yaml: lora_r is 0")


def test_numbers_of_a_checkpoint_are_told_and_left_out(tmp_path):
    """They can have had no effect in the run that wrote them: LLaVA-NeXT's has other pooling strides."""
    odd = {"mm_spatial_pool_stride": 4, "compression_output_size": 0, "mm_vision_select_layer": -2}
    config = {"model_type": "llava_qwen", "mm_vision_tower": "tower", **odd}
    (tmp_path / "config.json").write_text(json.dumps(config))
    run = resolve(["--model_name_or_path", str(tmp_path)])
    assert (run["mm_spatial_pool_stride"], run["compression_output_size"], run["mm_vision_select_layer"]) == (
        None,
        12,
        -2,
    )
    stride, size = sorted(run.notices, reverse=True)
    assert stride == f"{tmp_path}/config.json: mm_spatial_pool_stride is 4, expected 2; it is not used"
    assert "compression_output_size is 0, expected positive whole number" in size
    own = resolve(
        ["--model_name_or_path", str(tmp_path), "--mm_spatial_pool_stride", "2", "--compression_output_size", "8"]
    )
    assert own.notices == []


def test_a_package_that_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *_: None if name in ("wandb", "tensorboard") else True
    )
    for words in (["wandb"], ["tensorboard", "wandb"]):
        with pytest.raises(SystemExit):
            main(["show", "--report_to", *words])
        error = capsys.readouterr().err
        package = "wandb" if words == ["wandb"] else "package tensorboard or tensorboardX"
        assert error.startswith("error: command line: report_to is ") and error.count("\n") == 1
        assert (package in error) == (words == ["wandb"])  # tensorboardX will do, and wandb is named then
    resolve(["--report_to", "wandb"])  # what does not train needs no package


def test_old_names_and_words_of_transformers():
    kind, _ = trainer_fields()["lr_scheduler_type"]
    assert "cosine" in typing.get_args(kind)
    assert resolve(["--evaluation_strategy", "no"])["eval_strategy"] == "no"
    assert "expected one of no, steps, epoch" in refusal(["--eval_strategy", "sometimes"])


ANY = st.one_of(
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.just(10**400),
    st.sampled_from([-1, 0, 1, 2, 0.5, 1.0, 1.5, -0.5, math.nan, math.inf, -math.inf, 2**31, 1e31, 1e-45]),
)


@pytest.mark.parametrize("name", NUMBERS)
@settings(max_examples=30, deadline=None, derandomize=True)
@example(value=math.nan)
@given(value=ANY)
def test_any_number_is_taken_as_it_is_or_refused(name, value):
    key = all_keys()[name]
    value = [value] if key.kinds[0] == list[float] else value
    try:
        found = convert(key, value, "run.yaml")
    except LlavaError as error:
        message = str(error)
        assert message.startswith(f"run.yaml: {name} is ") and ", expected " in message and "\n" not in message
        return
    assert key.within.fault(found) is None
    number, given_number = (found[0], value[0]) if isinstance(found, list) else (found, value)
    assert number == type(number)(given_number) and abs(number) <= max(rules.LARGEST, rules.LARGEST_WHOLE)
