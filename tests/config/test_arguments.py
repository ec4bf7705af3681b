"""parse_args: the three argument objects, transformers' own fields, and what falls back on this machine."""

import dataclasses
import os
import pickle

import pytest

from llava.config.keys import GROUPS
from llava.config.schema import own_keys
from llava.config.trainer_fields import NOT_LITERAL, trainer_fields
from llava.errors import LlavaError
from llava.train.arguments import parse_args
from tests.config.launch_lines import LAUNCH_LINES, LLAVA_NEXT_DEFAULTS

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="checks what falls back without CUDA")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "TENSORBOARD_LOGGING_DIR"):
        monkeypatch.delenv(name, raising=False)


def test_the_three_objects(tmp_path):
    words = ["--output_dir", str(tmp_path), "--mm_use_im_start_end", "True", "--mm_vision_tower_lr", "2e-6"]
    model_args, data_args, training_args = parse_args(words)
    model, data, train = ({key.name for key in own_keys().values() if key.group == name} for name in GROUPS)
    assert model == set(vars(model_args))
    assert data | {"mm_use_im_start_end"} == set(vars(data_args))
    assert data_args.mm_use_im_start_end is True
    assert isinstance(training_args, transformers.TrainingArguments)
    assert training_args.mm_vision_tower_lr == 2e-6
    for name in set(LLAVA_NEXT_DEFAULTS) & train - {"optim", "mm_vision_tower_lr"}:
        assert getattr(training_args, name) == LLAVA_NEXT_DEFAULTS[name]
    assert training_args.optim == "adamw_torch"
    assert training_args.report_to == []
    assert training_args.run_config.source("mm_vision_tower_lr") == "command line"
    assert training_args.run_config.to_dict()["keys"]["mm_vision_tower_lr"]["value"] == 2e-6


def test_training_arguments_survive_pickling(tmp_path):
    training_args = parse_args(["--output_dir", str(tmp_path), "--model_max_length", "77"])[2]
    copy = pickle.loads(pickle.dumps(training_args))
    assert type(copy) is type(training_args)
    assert copy.model_max_length == 77


def test_output_dir_is_needed():
    with pytest.raises(LlavaError, match="output_dir"):
        parse_args([])


def test_a_value_that_transformers_refuses_is_one_line(tmp_path):
    with pytest.raises(LlavaError) as error:
        parse_args(["--output_dir", str(tmp_path), "--lr_scheduler_type", "cosin"])
    assert "cosin" in str(error.value) and "\n" not in str(error.value)


def test_fields_read_from_source_are_the_fields():
    fields = {field.name: field for field in dataclasses.fields(transformers.TrainingArguments)}
    assert list(trainer_fields()) == list(fields)
    for name, (_, default) in trainer_fields().items():
        if default != NOT_LITERAL:
            assert default == fields[name].default, name


def test_every_field_of_transformers_is_accepted(tmp_path):
    words = ["--output_dir", str(tmp_path)]
    for name, (_, default) in trainer_fields().items():
        if default not in (None, NOT_LITERAL, "") and name != "output_dir":
            words += [f"--{name}={default}"]
    training_args = parse_args(words)[2]
    assert training_args.adam_beta2 == 0.999
    assert training_args.ddp_timeout == 1800


def test_logging_dir_goes_where_transformers_looks(tmp_path):
    parse_args(["--output_dir", str(tmp_path), "--logging_dir", "logs"])
    assert os.environ.pop("TENSORBOARD_LOGGING_DIR") == "logs"


@without_cuda
def test_fall_back_without_cuda(tmp_path, capsys):
    words = ["--output_dir", str(tmp_path), "--bf16", "True", "--tf32", "True", "--torch_compile", "True"]
    words += ["--torch_compile_backend", "inductor", "--attn_implementation", "flash_attention_2"]
    training_args = parse_args(words)[2]
    assert (training_args.bf16, training_args.tf32, training_args.torch_compile) == (False, None, False)
    assert training_args.attn_implementation is None
    lines = capsys.readouterr().err.splitlines()
    for name in ("bf16", "tf32", "torch_compile", "flash_attention_2"):
        assert sum(line.startswith("note: ") and name in line for line in lines) == 1


@without_cuda
def test_half_precision_that_was_asked_for_on_the_cpu(tmp_path, capsys):
    """A config for GPUs means float32 on a CPU; who asks for both keeps bfloat16."""
    both, gpus = tmp_path / "both.yaml", tmp_path / "gpus.yaml"
    both.write_text("bf16: true\nuse_cpu: true\n")
    gpus.write_text("bf16: true\n")
    out, on_cpu, bf16 = ["--output_dir", str(tmp_path)], ["--use_cpu", "true"], ["--bf16", "true"]
    kept = [[*bf16, *on_cpu], [str(gpus), *bf16, *on_cpu], [str(both)], [str(both), *on_cpu, *bf16]]
    assert [parse_args([*words, *out])[2].bf16 for words in kept] == [True] * 4
    assert "note:" not in capsys.readouterr().err
    fallen_back = [bf16, [str(gpus)], [str(gpus), *on_cpu], [str(both), "--use_cpu", "false"]]
    assert [parse_args([*words, *out])[2].bf16 for words in fallen_back] == [False] * 4
    assert capsys.readouterr().err.count("note: bf16 needs a CUDA device; float32 is used") == 4
    assert not parse_args(["--fp16", "true", *on_cpu, *out])[2].fp16
    assert "note: fp16 needs a CUDA device or DeepSpeed; float32 is used" in capsys.readouterr().err


@without_cuda
def test_notes_come_from_rank_0_only(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    parse_args(["--output_dir", str(tmp_path), "--bf16", "True"])
    assert "note:" not in capsys.readouterr().err


@without_cuda
@pytest.mark.parametrize("script", sorted(LAUNCH_LINES))
def test_launch_lines_give_training_arguments(script, tmp_path):
    words = [word for word in LAUNCH_LINES[script] if word not in ("--deepspeed", "scripts/zero3.json")]
    training_args = parse_args([*words, "--output_dir", str(tmp_path)])[2]
    assert training_args.report_to == ["wandb"]
    assert training_args.warmup_steps == 0.03
    assert training_args.eval_strategy == "no"
    assert training_args.gradient_checkpointing is True
