"""What transformers refuses only once a model is loaded is refused while the arguments are made."""

from types import SimpleNamespace

import pytest

from llava.errors import LlavaError
from llava.train.arguments import parse_args
from llava.train.trial import try_settings
from tests.config.test_ranges import flags


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('lr_scheduler_type cosine --lr_scheduler_kwargs {"foo":1}', "found 'foo', expected num_cycles"),
        ('lr_scheduler_type constant --lr_scheduler_kwargs {"foo":1}', "found 'foo', expected none"),
        ('lr_scheduler_type cosine --lr_scheduler_kwargs {"num_cycles":"x"}', "lr_scheduler_type: cosine with"),
        ("lr_scheduler_type cosine_with_min_lr", "lr_scheduler_type: cosine_with_min_lr: One of min_lr"),
        ("lr_scheduler_type warmup_stable_decay", "'num_decay_steps'"),
        ("lr_scheduler_type linear --lr_scheduler_kwargs foo", "lr_scheduler_kwargs is 'foo', expected a mapping"),
        ("lr_scheduler_type reduce_lr_on_plateau", "requires an eval strategy"),
        ("optim adamw_torch --optim_args foo", "optim: adamw_torch with optim_args foo: "),
        ("optim sgd --optim_args momentum=-1", "Invalid momentum value"),
        ("optim galore_adamw", "optim galore_adamw needs the package galore_torch"),
        ("optim lomo", "optim lomo needs the package lomo_optim"),
        ("report_to kubeflow", "report_to: kubeflow: "),
        ("debug foo", "training arguments: foo is not a valid DebugOption"),
        ('accelerator_config {"foo":1}', "unexpected keyword argument 'foo'"),
        ("parallelism_config foo", "parallelism_config is 'foo', expected none"),
        ("save_strategy best", "save_strategy is best without metric_for_best_model"),
        ("fsdp full_shard", "in a run of one process, expected several"),
        ('gradient_checkpointing_kwargs {"foo":1}', "found 'foo', expected context_fn"),
    ],
)
def test_refused_before_a_model_is_loaded(text, expected, tmp_path):
    with pytest.raises(LlavaError) as error:
        parse_args(["--output_dir", str(tmp_path), *flags(text)])
    assert expected in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        'lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs {"min_lr":1e-6}',
        'lr_scheduler_type warmup_stable_decay --lr_scheduler_kwargs {"num_decay_steps":10}',
        'gradient_checkpointing_kwargs {"use_reentrant":false}',
        "optim sgd --optim_args momentum=0.9",
        "optim adafactor",
        "report_to all",
    ],
)
def test_accepted(text, tmp_path):
    assert parse_args(["--output_dir", str(tmp_path), *flags(text)])[2].output_dir == str(tmp_path)


@pytest.mark.parametrize(
    ("text", "package"), [("lora_enable", "peft"), ("use_liger_kernel", "liger_kernel"), ("report_to wandb", "wandb")]
)
def test_packages(text, package, tmp_path, monkeypatch):
    args = parse_args(["--output_dir", str(tmp_path)])[2]
    name, _, value = text.partition(" ")
    setattr(args, name, [value] if value else True)
    args.run_config.settings["report_to"] = type(args.run_config.settings["report_to"])(args.report_to, "run.yaml")
    monkeypatch.setattr("importlib.util.find_spec", lambda found, *_: None if found == package else True)
    with pytest.raises(LlavaError, match=f"needs the package {package}"):
        try_settings(args, args.run_config)


def test_a_schedule_that_passes_its_arguments_on(tmp_path):
    text = 'lr_scheduler_type reduce_lr_on_plateau --eval_strategy steps --eval_steps 5 --lr_scheduler_kwargs {"%s":1}'
    parse_args(["--output_dir", str(tmp_path), *flags(text % "patience")])
    with pytest.raises(LlavaError, match="unexpected keyword argument 'foo'"):
        parse_args(["--output_dir", str(tmp_path), *flags(text % "foo")])


def test_deepspeeds_own_optimizer_and_schedule_are_not_tried(tmp_path, monkeypatch):
    args = parse_args(["--output_dir", str(tmp_path)])[2]
    args.optim_args, args.lr_scheduler_kwargs = "foo", {"foo": 1}
    args.deepspeed = "file.json"
    args.hf_deepspeed_config = SimpleNamespace(config={"optimizer": {}, "scheduler": {}})
    try_settings(args, args.run_config)
    args.hf_deepspeed_config = SimpleNamespace(config={"optimizer": {}})
    with pytest.raises(LlavaError, match="lr_scheduler_kwargs"):
        try_settings(args, args.run_config)
