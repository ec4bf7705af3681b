"""A run goes on with other processes, other batches or another way of splitting the optimizer's state."""

import json
import os
import shutil
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from llava.train.checkpoints import MANIFEST_NAME
from tests import tiny
from tests.train.test_distributed import DEEPSPEED

ROOT = Path(__file__).parents[2]
STEPS = dict(save_strategy="steps", save_steps=1)


# --- the order of the data --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def numbered(kit, tmp_path_factory):
    """Sixteen records, with and without an image, each with an answer of its own."""
    folder = tmp_path_factory.mktemp("numbered")
    records = json.loads(Path(tiny.records(folder, "itti" * 4)).read_text())
    for number, record in enumerate(records):
        record["conversations"][1]["value"] = " ".join(["temple"] * (number + 1))
    (folder / "numbered.json").write_text(json.dumps(records))
    return folder / "numbered.json"


@pytest.fixture
def seen(kit, numbered, monkeypatch):
    """A function: {step: the answers of its records, sorted} of a run in this process."""
    from llava.train.llava_trainer import LLaVATrainer

    take = LLaVATrainer.training_step
    steps: dict[int, list[tuple]] = {}

    def watched(self, model, inputs, *args, **kwargs):
        answers = [tuple(row[row != -100].tolist()) for row in inputs["labels"]]
        steps.setdefault(self.state.global_step + 1, []).extend(answers)
        return take(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(LLaVATrainer, "training_step", watched)

    def of(out, **flags):
        steps.clear()
        keys = {"train_sampling_strategy": "random", "gradient_accumulation_steps": 1, **STEPS} | flags
        kit.run(out, None, data_path=numbered, **keys)
        return {step: sorted(found) for step, found in steps.items()}

    return of


def joined(*steps):
    return sorted(chain.from_iterable(steps))


@pytest.mark.parametrize("order", [{"group_by_modality_length": True}, {"group_by_varlen": True}, {}])
def test_steps_of_the_same_size_have_the_same_samples(seen, tmp_path, order):
    whole = seen(tmp_path / "whole", per_device_train_batch_size=4, max_steps=7, **order)
    assert {len(found) for found in whole.values()} == {4} and len(set(map(str, whole.values()))) > 4
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "out/checkpoint-2")
    halved = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    found = seen(tmp_path / "out", max_steps=6, **halved, **order)
    assert found == {step: whole[step] for step in range(3, 7)}
    again = seen(tmp_path / "out", max_steps=7, per_device_train_batch_size=1, gradient_accumulation_steps=4, **order)
    assert again == {7: whole[7]}


@pytest.mark.parametrize("told", [True, False])
def test_steps_of_another_size_neither_repeat_nor_leave_out_a_sample(seen, tmp_path, capsys, told):
    out = tmp_path / "out"

    def go_on(**flags):
        if not told:  # as checkpoints of earlier versions
            for name in ("data_position.json", MANIFEST_NAME):
                for path in out.glob(f"checkpoint-*/{name}"):
                    path.unlink()
        return seen(out, **flags)

    first = go_on(per_device_train_batch_size=4, max_steps=2)
    rest = go_on(per_device_train_batch_size=3, gradient_accumulation_steps=2, max_steps=-1, num_train_epochs=2)
    assert "a step has 6 samples, it had 4: the run goes on at sample 8 of epoch 0, for 7 steps in all" in (
        capsys.readouterr().out
    )
    assert [len(found) for found in rest.values()] == [6, 2, 6, 6, 4] and list(rest) == [3, 4, 5, 6, 7]
    every = joined(*seen(tmp_path / "other", per_device_train_batch_size=4, max_steps=4).values())
    assert len(set(every)) == 16
    assert joined(*first.values(), rest[3], rest[4]) == every
    assert joined(rest[5], rest[6], rest[7]) == every
    logged = [entry["epoch"] for entry in tiny.history(out)]
    assert logged == pytest.approx([0.25, 0.5, 0.875, 1, 1.375, 1.75, 2], abs=1e-3)
    if not told:
        return
    shutil.rmtree(out / "checkpoint-7")
    for number in (4, 5, 6):
        shutil.rmtree(out / f"checkpoint-{number}")
    (out / "trainer_state.json").unlink()
    once_more = go_on(per_device_train_batch_size=4, max_steps=5)  # in the midst of an epoch of steps of two sizes
    assert [len(found) for found in once_more.values()] == [2, 4]
    assert joined(*first.values(), rest[3], once_more[4]) == every


# --- the optimizer's state --------------------------------------------------------------------------------------------


CHANGES = {  # a checkpoint of the first goes on as the second: ZeRO stage, processes, True for the projector alone
    "plain, 1 to 2": ((None, 1), (None, 2)),
    "plain 1 to ZeRO-2 2": ((None, 1), (2, 2)),
    "ZeRO-3, 2 to 1": ((3, 2), (3, 1)),
    "ZeRO-3 2 to plain 1": ((3, 2), (None, 1)),
    "projector, ZeRO-3, 2 to 1": ((3, 2, True), (3, 1, True)),
}
if not os.environ.get("LLAVA_LONG_TESTS"):  # scripts/test_long.sh tries it
    del CHANGES["projector, ZeRO-3, 2 to 1"]


@pytest.fixture(scope="module")
def changed(kit, forks, tmp_path_factory):
    """(folder of the runs, what those of two processes and of one said)."""
    out = tmp_path_factory.mktemp("changed")

    def flags(name, stage, processes, alone=False):
        keys = {
            "per_device_train_batch_size": 4 // processes,
            "max_steps": 4,
            "save_strategy": "steps",
            "save_steps": 2,
        }
        keys |= {"mm_projector_lr": 2e-3, "weight_decay": 0.1, "group_by_modality_length": True, "use_cpu": True}
        if alone:  # goes on behind a save of its own, with more than one pass to a step
            keys |= {"mm_tunable_parts": "mm_mlp_adapter", "save_steps": 1}
            keys |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2 // processes}
        keys["deepspeed"] = None if stage is None else ROOT / f"scripts/zero{stage}.json"
        return kit.flags(out / name, "iittimtiittiimit", **keys)

    def go_on(processes):
        runs = []
        for name, (before, now) in CHANGES.items():
            if now[1] == processes:
                shutil.copytree(out / str(before) / "checkpoint-2", out / name / "checkpoint-2")
                runs.append(flags(name, *now))
        return runs

    def run(processes, *first):
        status, text = forks.runs(processes, [*first, *go_on(processes)], out, f"runs{processes}")
        assert status == 0, text[-8000:]
        return text

    from llava.train.train import train

    begun = {before for before, _ in CHANGES.values()}
    train(flags("(None, 1)", None, 1))
    two = [flags(str(kind), *kind) for kind in ((3, 2), (3, 2, True)) if kind in begun]
    return out, {processes: run(processes, *first) for processes, first in ((2, two), (1, []))}


@DEEPSPEED
@pytest.mark.parametrize("change", CHANGES)
def test_goes_on_as_if_nothing_had_changed(changed, change):
    (out, said), (before, now) = changed, CHANGES[change]
    whole, found = out / str(before), out / change
    expected, got = tiny.history(whole), tiny.history(found)
    assert len(got) == len(expected) == 4
    for key in ("loss", "grad_norm", "learning_rate"):
        assert [entry[key] for entry in got] == pytest.approx([entry[key] for entry in expected], abs=2e-5), key
    (path,) = whole.glob("*.safetensors")
    first, second = load_file(path), load_file(found / path.name)
    assert first.keys() == second.keys()
    assert all(torch.allclose(value, second[name], atol=1e-4) for name, value in first.items())
    assert not list(found.glob(".universal*"))
    converted = f"{found}/checkpoint-2: was written by" in said[now[1]]
    assert converted == (before[0] != now[0] or before[0] is not None)


def test_a_combination_that_cannot_names_both(tmp_path):
    from llava.errors import LlavaError
    from llava.train.kinds import check_carried

    checkpoint = tmp_path / "out/checkpoint-2"

    def refused(files, zero, optim="adamw_torch", fsdp=None, offload=None):
        shutil.rmtree(checkpoint, ignore_errors=True)
        for name in files:
            (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
            (checkpoint / name).touch()
        config = {"zero_optimization.stage": zero, "zero_optimization.offload_optimizer.device": offload}
        args = SimpleNamespace(world_size=1, deepspeed=zero is not None, fsdp=fsdp, output_dir=str(tmp_path / "out"))
        args.hf_deepspeed_config = SimpleNamespace(get_value=lambda key, default=None: config.get(key) or default)
        args.run_config = {"optim": optim}
        try:
            check_carried(str(checkpoint), args)
        except LlavaError as error:
            return str(error)
        return None

    shards = [
        f"global_step2/zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt"
        for rank in (0, 1)
        for kind in ("model", "optim")
    ]
    plain, weights = ["optimizer.pt", "rng_state_0.pth", "rng_state_1.pth"], ["model.safetensors"]
    assert refused(shards, 3) is None and refused(shards + weights, None) is None and refused(plain, 2) is None
    both = "was written by 2 processes under ZeRO-3, this run has 1 process"
    said = refused(shards, 3, optim="adafactor")
    assert f"{checkpoint}: {both} under ZeRO-3: of optimizers, Adam's" in said and "adafactor" in said
    assert f"{both}: it holds no consolidated weights" in refused(shards, None)
    assert "NVMe" in refused(shards, 3, offload="nvme")
    assert "this run has 1 process under FSDP: FSDP's" in refused(plain, None, fsdp=True)
    assert "was written by 2 processes, this run has 1 process under ZeRO-2: of" in refused(plain, 2, optim="sgd")


# --- faults while it is converted -------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A function: a file system of so many bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def of(size: int) -> Path:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
        done = subprocess.run(mount, capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"needs the right to mount a tmpfs ({done.stderr.strip()})")
        return folder

    yield of
    if os.path.ismount(folder):
        subprocess.run(["umount", "-l", folder], check=True)


@DEEPSPEED
@pytest.mark.parametrize("share", [1, 4])
def test_a_full_disk_is_one_line(changed, small_disk, share):
    """Too little room from the start, and room that runs out: small files take more of it than their bytes."""
    from llava.errors import LlavaError
    from llava.train.carrying import run_conversion, write_copy
    from llava.train.kinds import Kind, files_of

    checkpoint = str(changed[0] / "(3, 2)/checkpoint-2")
    size = sum(os.path.getsize(path) for path in files_of(checkpoint, "global_step*/*_optim_states.pt"))
    folder = small_disk(size * share) / ".universal-2.tmp"
    with pytest.raises(LlavaError) as refused:
        write_copy(checkpoint, folder, Kind(2, 3), lambda: run_conversion(checkpoint, folder))
    said = str(refused.value)
    assert said.startswith(f"{folder}: disk full: ") and "2 processes under ZeRO-3" in said and "\n" not in said
    assert ("are free" in said) == (share == 1)


@DEEPSPEED
def test_a_run_that_is_killed_leaves_no_conversion_behind(changed, tmp_path):
    """It ends with the run, and what it has written goes with the next start."""
    from llava.train.carrying import remove_copies

    checkpoint, folder = changed[0] / "(3, 2)/checkpoint-2", tmp_path / ".universal-2.tmp"
    folder.mkdir()
    code = "import sys; from pathlib import Path; from llava.train.carrying import run_conversion as run"
    code += "; run(sys.argv[1], Path(sys.argv[2]))"
    run = subprocess.Popen([sys.executable, "-c", code, checkpoint, folder], cwd=ROOT)
    try:
        wait_for(lambda: (folder / "log").exists())
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
        wait_for(children.read_text)
        child = children.read_text().split()[0]
    finally:
        run.kill()
        run.wait()
    wait_for(lambda: not _runs(child))
    remove_copies(str(tmp_path))
    assert not list(tmp_path.iterdir())


def wait_for(true) -> None:
    end = time.monotonic() + 120
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def _runs(pid: str) -> bool:
    """Whether there is such a process; one that is only not waited for yet is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
