"""Training Qwen-VL models on packed rows: the run is that of padded rows, alone or under ZeRO-3."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests import tiny
from tests.support.families import FamilyKit

ROOT = Path(__file__).parents[2]
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
ZERO3 = ("qwen2_vl", "qwen3_vl")  # Qwen2.5-VL's language model is Qwen2-VL's
# plain descent, since Adam makes a whole step of what is but a rounding error
STEPS = {"per_device_train_batch_size": 4, "optim": "sgd", "learning_rate": 1e-2, "model_max_length": 512}
ADAPTIVE = {"adaptive_patches": '{"method": "budget", "alpha": 0.5}'}
KINDS = "iimt" + "tttt" + "mtit"  # the second step has no image
PACKED = {"pack_sequences": True}


class Kit(FamilyKit):
    """With the keys of `STEPS`."""

    def __init__(self, name: str, folder: Path):
        super().__init__(name, folder)
        self.records = tiny.records(folder / "records", KINDS)
        self.changes = STEPS | ({} if name == "qwen3_vl" else ADAPTIVE)

    def flags(self, **changes):
        return super().flags(**self.changes | changes)


@pytest.fixture(scope="module")
def kits(tmp_path_factory):
    return {name: Kit(name, tmp_path_factory.mktemp(name)) for name in FAMILIES}


@pytest.fixture(scope="module")
def padded(kits):
    return {name: kit.run(kit.folder / "padded") for name, kit in kits.items()}


@pytest.fixture(scope="module")
def under_zero3(kits, forks, tmp_path_factory):
    """The folder that holds a folder for each family's run, in one process."""
    out, runs = tmp_path_factory.mktemp("zero3"), []
    for name in ZERO3:
        keys = PACKED | {"deepspeed": ROOT / "scripts/zero3.json", "use_cpu": True, "output_dir": out / name}
        runs.append(kits[name].flags(**keys))
    status, said = forks.runs(1, runs, out)
    assert status == 0, said[-9000:]
    return out


def check_equal(out: Path, padded):
    """Losses, gradient norms and weights, of three steps that did something."""
    ours, theirs = tiny.history(out), tiny.history(padded.out)
    assert len(ours) == len(theirs) == 3
    for got, want in zip(ours, theirs, strict=True):
        assert abs(got["loss"] - want["loss"]) <= 1e-5 * max(1, want["loss"]), (got, want)
        assert abs(got["grad_norm"] - want["grad_norm"]) <= 1e-5 * max(1, want["grad_norm"]), (got, want)
    found, expected = (load_file(folder / "model.safetensors") for folder in (out, padded.out))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 1e-5, name


@pytest.mark.parametrize("name", FAMILIES)
def test_a_packed_run_is_the_padded_one(kits, padded, name, tmp_path):
    run = kits[name].run(tmp_path / "packed", **PACKED, full_loss=lambda model, batch: batch["input_ids"].shape[0])
    assert run.full_losses == [1, 1, 1]  # rows of each step's batch
    assert run.trainer.model.model.language_model.config._attn_implementation == "varlen"
    assert padded[name].trainer.model.model.language_model.config._attn_implementation == "sdpa"
    check_equal(tmp_path / "packed", padded[name])


@pytest.mark.parametrize("name", ZERO3)
@pytest.mark.skipif(shutil.which("c++") is None, reason="DeepSpeed compiles an extension at first use")
def test_under_zero3(padded, under_zero3, name):
    check_equal(under_zero3 / name, padded[name])


def test_attention_without_segments_is_refused(kits, tmp_path, capsys):
    with pytest.raises(SystemExit):
        kits["qwen2_vl"].run(tmp_path / "out", **PACKED, attn_implementation="sdpa")
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error == (
        "error: attn_implementation: found 'sdpa', which lets the samples of a packed row see each other; expected "
        "varlen or flash_attention_2, or pack_sequences false"
    )
