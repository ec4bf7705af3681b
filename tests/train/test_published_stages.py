"""LLaVA-NeXT's two published stages one after the other, and the names by which a second stage asks for a first one."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.errors import LlavaError
from llava.model.checkpoint import load_projector
from tests import tiny
from tests.train.stand_ins import StandIns
from tests.train.test_launch_lines import ROWS

ROOT = Path(__file__).parents[2]
FIRST, SECOND = (
    next(row["argv"] for row in ROWS if (row["source"], row["file"]) == ("LLaVA-NeXT", f"scripts/train/{name}"))
    for name in ("pretrain_clip.sh", "direct_finetune_clip.sh")
)
LONG = bool(os.environ.get("LLAVA_LONG_TESTS"))


def lines_of_both(folder: Path) -> tuple[list[str], list[str]]:
    """The two lines on tiny models; the second names the first one's projector as the script does."""
    parts, projectors = StandIns(folder), folder / "projectors"
    first, second = parts.line(FIRST, projectors), parts.line(SECOND, folder / "out")
    return first, [*second, "--pretrain_mm_mlp_adapter", str(projectors / "mm_projector.bin")]


def test_the_second_stage_starts_from_what_the_first_left(tmp_path, spy, capfd):
    from llava.train.train import train

    first, second = lines_of_both(tmp_path)
    train(first)
    left = load_file(tmp_path / "projectors" / "mm_projector.safetensors")
    capfd.readouterr()
    train(second)
    said = [line for line in "".join(capfd.readouterr()).splitlines() if "no such file" in line]
    assert said == [
        f"note: {tmp_path}/projectors/mm_projector.bin: no such file; mm_projector.safetensors beside it is taken"
    ]
    names = [name for name in left if "mm_projector" in name]
    assert len(names) == 4 and all(torch.equal(left[name], spy.before[name].to(left[name].dtype)) for name in names)
    (step,) = tiny.history(tmp_path / "out")
    assert step["loss"] > 0 and (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.skipif(not LONG, reason="two minutes more: scripts/test_long.sh runs it (LLAVA_LONG_TESTS)")
def test_both_as_two_processes_under_zero3(tmp_path):
    """As the scripts launch them: torchrun, DeepSpeed's file, bfloat16."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    said = ""
    for line in lines_of_both(tmp_path):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command = [*torchrun, "llava/train/train_mem.py", "--deepspeed", "scripts/zero3.json", *line]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        said = done.stdout
    assert said.count("mm_projector.safetensors beside it is taken") == 1
    assert (tmp_path / "out" / "model.safetensors").is_file()


# --- names of the projector -------------------------------------------------------------------------------------------


def model_of(compressor=None):
    """What `load_projector` needs of a model."""
    config = SimpleNamespace(mm_projector_type="linear")
    return SimpleNamespace(
        mm_projector=torch.nn.Linear(4, 4), vision_tower=SimpleNamespace(token_compressor=compressor), config=config
    )


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"model.mm_projector.weight": torch.randn(4, 4), "model.mm_projector.bias": torch.randn(4)}


@pytest.mark.parametrize(
    ("there", "named"),
    [
        ("mm_projector.safetensors", "mm_projector.bin"),
        ("mm_projector.bin", "mm_projector.safetensors"),
        ("checkpoint-5/mm_projector.safetensors", "checkpoint-5/mm_projector.bin"),
        ("checkpoint-5/mm_projector.safetensors", "mm_projector/checkpoint-5.bin"),  # LLaVA's saves on the way
        ("non_lora_trainables.safetensors", "non_lora_trainables.bin"),
        ("mm_projector.bin", "mm_projector.bin"),
        ("mm_projector.bin", ""),
    ],
)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_projector_is_found_by_its_other_name(tmp_path, capsys, monkeypatch, there, named, rank):
    monkeypatch.setenv("RANK", rank)
    file, saved, model = tmp_path / there, weights(), model_of()
    file.parent.mkdir(exist_ok=True)
    if there.endswith(".bin"):
        torch.save(saved, file)
    else:
        save_file(saved, file)
    load_projector(model, str(tmp_path / named))
    load_projector(model, str(tmp_path / named))
    assert model.mm_projector.weight.equal(saved["model.mm_projector.weight"])
    assert model.mm_projector.bias.equal(saved["model.mm_projector.bias"])
    said = capsys.readouterr().out.splitlines()
    assert len(said) == (rank == "0" and named not in (there, ""))
    assert all("no such file" in line and line.endswith(" is taken") for line in said)


def test_a_file_that_is_there_is_never_passed_over(tmp_path):
    torch.save(weights(), tmp_path / "mm_projector.bin")
    other = {name: value + 1 for name, value in weights().items()}
    save_file(other, tmp_path / "mm_projector.safetensors")
    model = model_of()
    load_projector(model, str(tmp_path / "mm_projector.bin"))
    assert model.mm_projector.bias.equal(weights()["model.mm_projector.bias"])


def test_a_projector_that_would_run_code_is_not_read(tmp_path):
    torch.save({"model.mm_projector.weight": SimpleNamespace(a=1)}, tmp_path / "mm_projector.bin")
    with pytest.raises(LlavaError, match="not a file of plain tensors"):
        load_projector(model_of(), str(tmp_path / "mm_projector.bin"))


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("mm_projector.bin", "its folder holds config.json, model.safetensors"),
        ("", "its folder holds config.json, model.safetensors"),
        ("checkpoint-9/mm_projector.bin", "there is no folder"),
    ],
)
def test_where_there_is_none_what_is_there_is_named(kit, tmp_path, named, said):
    from llava.config import resolve
    from llava.train.settings import check_settings

    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).touch()
    run = resolve(kit.flags(tmp_path / "out", pretrain_mm_mlp_adapter=tmp_path / named))
    check_settings(run)
    (notice,) = run.notices
    assert "no such file" in notice and said in notice and "\n" not in notice


def test_a_token_compressor_is_found_by_its_other_name(tmp_path, capsys):
    from llava.model.multimodal_encoder.token_compressor import TokenCompressor, load_token_compressor

    torch.manual_seed(0)
    made, loaded = (TokenCompressor(4, 2, 32) for _ in range(2))
    save_file(made.state_dict(), tmp_path / "compressor.safetensors")
    load_token_compressor(loaded, str(tmp_path / "compressor.pth"))
    assert all(value.equal(loaded.state_dict()[name]) for name, value in made.state_dict().items())
    assert "compressor.safetensors beside it is taken" in capsys.readouterr().out


# --- a projector's folder in place of a model -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mm_projector.safetensors", "mm_projector.bin"])
@pytest.mark.parametrize("config", [True, False])
def test_a_projectors_folder_is_no_model(kit, tmp_path, name, config):
    from llava.config import resolve
    from llava.inference.engine import Inference
    from llava.model.builder import load_pretrained_model
    from llava.train.settings import check_settings

    folder = tmp_path / "stage1"
    folder.mkdir()
    (folder / name).touch()
    if config:
        (folder / "config.json").write_text(Path(kit.llm, "config.json").read_text())
    for use in (
        lambda: check_settings(resolve(kit.flags(tmp_path / "out", model_name_or_path=folder))),
        lambda: load_pretrained_model(str(folder), None, "llava_qwen"),
        lambda: Inference.load(str(folder)),
    ):
        with pytest.raises(LlavaError) as error:
            use()
        message = str(error.value)
        assert f"holds a projector alone ({name})" in message and "pretrain_mm_mlp_adapter" in message
        assert "\n" not in message
