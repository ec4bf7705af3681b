"""Pictures that cannot be read, and samples that are too long, while a run goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests import tiny

ROOT = Path(__file__).parents[2]


def data_with_broken(folder: Path, kinds: str, broken) -> Path:
    """Records whose pictures at the numbers in `broken` are cut short."""
    path = Path(tiny.records(folder, kinds))
    for number in broken:
        picture = path.parent / f"images/{number}_0.png"
        picture.write_bytes(picture.read_bytes()[:200])
    return path


def run_two(flags):
    """A run of two processes, by torchrun."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launcher, str(ROOT / "llava/train/train_mem.py"), *flags]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_pictures_are_left_out_alike_in_every_run(kit, tmp_path, capsys, workers):
    data = data_with_broken(tmp_path / "data", "itiiitiimiti", [0, 4, 8])
    changes = dict(data_path=data, train_sampling_strategy="random", dataloader_num_workers=workers)
    first = kit.run(tmp_path / "first", None, **changes)
    printed = capsys.readouterr().out
    left_out = [line for line in printed.splitlines() if line.startswith("left out: ")]
    assert sorted(line.split(": ")[1] for line in left_out) == ["r0", "r4", "r8"]
    assert all("cannot be read" in line and f"{data.parent}/images/" in line for line in left_out)
    assert "records left out: 3" in printed

    second = kit.run(tmp_path / "second", None, **changes)
    assert tiny.history(first) == tiny.history(second) and len(tiny.history(first)) == 3
    ours, again = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert all(value.equal(again[name]) for name, value in ours.items())

    # the same as a run that never had them
    if workers == 0:
        records = [record for at, record in enumerate(json.loads(data.read_text())) if at not in (0, 4, 8)]
        (data.parent / "good.json").write_text(json.dumps(records))
        one_batch = dict(per_device_train_batch_size=12, max_steps=1, learning_rate=0.0)
        bad = kit.run(tmp_path / "bad", None, **(changes | one_batch))
        good = kit.run(tmp_path / "nine", None, data_path=data.parent / "good.json", **one_batch)
        assert tiny.history(bad)[0]["loss"] == pytest.approx(tiny.history(good)[0]["loss"], abs=1e-6)


def test_too_many_bad_pictures_stop_the_run(kit, tmp_path, capsys):
    for broken, stops in ((10, False), (11, True)):
        data = data_with_broken(tmp_path / f"data{broken}", "i" * 16, range(broken))
        flags = dict(data_path=data, max_steps=8)  # two epochs: a record counts once
        if not stops:
            kit.run(tmp_path / "ten", None, **flags)
            assert "records left out: 10" in capsys.readouterr().out
            continue
        with pytest.raises(SystemExit) as stop:
            kit.run(tmp_path / "eleven", None, **flags)
        assert stop.value.code == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: 11 bad records, more than the 10 that are tolerated: ")
        assert all(f"r{number}: image " in error for number in range(broken))
        assert not (tmp_path / "eleven/trainer_state.json").exists()


def test_one_percent_of_a_large_set_is_tolerated(kit, tmp_path, capsys):
    """Eleven of 1,100."""
    small = data_with_broken(tmp_path / "data", "i" * 12, range(11))
    records = json.loads(small.read_text())
    records += [{**records[11], "id": f"r{number}"} for number in range(12, 1100)]
    small.write_text(json.dumps(records))
    kit.run(tmp_path / "out", None, data_path=small, max_steps=4)
    assert "records left out: 11" in capsys.readouterr().out


def test_bad_records_are_counted_on_when_a_run_resumes(kit, tmp_path, monkeypatch, capsys):
    from llava.train.llava_trainer import LLaVATrainer

    data = data_with_broken(tmp_path / "data", "i" * 24, range(11))
    flags = dict(data_path=data, max_steps=3, save_strategy="steps", save_steps=1)
    step = LLaVATrainer.training_step

    def stop_in_second_step(self, *args, **kwargs):
        if self.state.global_step == 1:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match=r"^130$"):
        patch.setattr(LLaVATrainer, "training_step", stop_in_second_step)
        kit.run(tmp_path / "out", None, **flags)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        kit.run(tmp_path / "out", None, **flags)
    assert "11 bad records" in capsys.readouterr().err


def test_long_samples_are_cut_and_counted(kit, tmp_path, capsys):
    kit.run(tmp_path / "out", "tttt", model_max_length=96, max_steps=1)
    assert "samples cut" not in capsys.readouterr().out
    data = Path(tiny.records(tmp_path / "data", "tttt"))
    records = json.loads(data.read_text())
    records[1]["conversations"][1]["value"] = "A temple in China. " * 40
    data.write_text(json.dumps(records))
    kit.run(tmp_path / "long", None, data_path=data, model_max_length=96, max_steps=1)
    printed = capsys.readouterr().out
    assert "samples cut to model_max_length: 1\n" in printed and "nothing to learn" not in printed


def test_a_sample_without_a_label_left_is_dropped(kit, tmp_path, capsys):
    data = Path(tiny.records(tmp_path / "data", "ttttt"))
    records = json.loads(data.read_text())
    records[2]["conversations"][0]["value"] = "What is shown? " * 80
    data.write_text(json.dumps(records))
    flags = dict(model_max_length=96, max_steps=1, supervise="answers_only", learning_rate=0.0)
    ours = kit.run(tmp_path / "out", None, data_path=data, per_device_train_batch_size=5, **flags)
    printed = capsys.readouterr().out
    assert "samples cut to model_max_length: 1\n" in printed
    assert "left out, nothing to learn: r2: no label left after truncation to 96 tokens" in printed
    assert "records left out because they have nothing to learn: 1" in printed
    assert "left out: " not in printed  # not a fault of the record's

    del records[2]
    data.write_text(json.dumps(records))
    without = kit.run(tmp_path / "without", None, data_path=data, per_device_train_batch_size=4, **flags)
    assert tiny.history(ours)[0]["loss"] == pytest.approx(tiny.history(without)[0]["loss"], abs=1e-6)


@pytest.mark.parametrize("steps", [12, 11] if os.environ.get("LLAVA_LONG_TESTS") else [11])
def test_bad_pictures_on_one_rank_stop_both(kit, forks, tmp_path, steps):
    """Rank 1 gets every second record: only those are bad. The eleventh is found in step 11, be it the last."""
    data = data_with_broken(tmp_path / "data", "i" * 24, range(1, 24, 2))
    flags = kit.flags(tmp_path / "out", None, data_path=data, per_device_train_batch_size=1, max_steps=steps)
    status, said = forks.ranks(2, flags, tmp_path / "log", "llava.train.train:train")
    assert status != 0
    assert said.count("error: 11 bad records") >= 1, said[-3000:]
    lines = [line for line in said.splitlines() if line.startswith("left out: ")]
    assert [line.split(": ")[1] for line in lines] == [f"r{number}" for number in range(1, 22, 2)]
    assert "saved to" not in said


def test_what_the_last_step_left_out_is_told(kit, tmp_path):
    """Of two processes; a record that was left out in the step before a checkpoint is in it."""
    data = data_with_broken(tmp_path / "data", "i" * 8, [1, 7])
    saving = dict(save_strategy="steps", save_steps=1)
    flags = kit.flags(tmp_path / "out", None, data_path=data, per_device_train_batch_size=1, max_steps=4, **saving)
    done = run_two(flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line.split(": ")[1] for line in done.stdout.splitlines() if line.startswith("left out: ")] == ["r1", "r7"]
    assert "records left out: 2" in done.stdout
    for step, known in ((1, ["r1"]), (3, ["r1"]), (4, ["r1", "r7"])):
        found = json.loads((tmp_path / f"out/checkpoint-{step}/bad_records.json").read_text())
        assert [record.split(": ")[0] for record in found["bad"]] == known and found["no_label"] == []
