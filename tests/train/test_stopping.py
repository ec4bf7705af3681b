"""Runs that are told to stop: a step is finished, a checkpoint saved, and the same command goes on; one per folder."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

from llava.train.checkpoints import checkpoints_of, fault
from llava.train.run_state import LOCK_FILE, Lock, RunState, _boot, _start, read_state
from llava.train.stopping import worker_context
from tests import tiny
from tests.train.test_trusted_checkpoints import weights_differ

FLAGS = dict(save_strategy="steps", save_steps=1000, lr_scheduler_type="constant", logging_steps=1)
SLOW = "tests.train.faults:slow_steps:0.3"


@pytest.fixture(scope="module")
def through(kit, tmp_path_factory):
    """A run of 6 steps that nothing stopped."""
    return kit.run(tmp_path_factory.mktemp("through") / "out", "iiii", max_steps=6, **FLAGS)


def stopped(kit, forks, folder, name, group=False, seen="'epoch': '1'", **options):
    """Exit status and output of a run that gets a signal when it has printed something."""
    log, flags = folder / "log", kit.flags(folder / "out", "iiii", max_steps=6, **(FLAGS | options.pop("flags", {})))
    run = forks.start(flags, log, **{"change": SLOW, **options})
    forks.wait_for(log, seen)
    (os.killpg if group else os.kill)(run, getattr(signal, name))
    return forks.end(run), log.read_text()


def steps_of_last(out):
    return int(checkpoints_of(out)[-1].name.removeprefix("checkpoint-"))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1", "SIGINT"])
def test_a_signal_saves_and_the_same_command_goes_on(kit, forks, through, tmp_path, name):
    out = tmp_path / "out"
    workers = {"dataloader_num_workers": 2} if name == "SIGTERM" else {}  # to which a scheduler sends it too
    status, said = stopped(kit, forks, tmp_path, name, group=bool(workers), flags=workers)
    step = steps_of_last(out)
    assert status == 0 and 1 <= step < 6, said[-2000:]
    assert f"stopped by {name} at step {step}; the same command goes on from {out}/checkpoint-{step}" in said
    assert "Traceback" not in said and not (out / "trainer_state.json").exists() and not (out / LOCK_FILE).exists()
    state = json.loads((out / "run_state.json").read_text())
    assert state.keys() == {"state", "step", "signal", "host", "pid", "started", "message"}
    expected = {"state": "preempted", "step": step, "signal": name, "host": socket.gethostname()}
    assert {key: state[key] for key in expected} == expected
    assert forks.run(kit.flags(out, "iiii", max_steps=6, **FLAGS), tmp_path / "again") == 0
    assert f"resuming from {out}/checkpoint-{step}" in (tmp_path / "again").read_text()
    assert not weights_differ(out, through) and len(tiny.history(out)) == 6
    assert read_state(out)["state"] == "finished" and read_state(out)["step"] == 6


def test_two_signals(kit, forks, tmp_path):
    """The second Ctrl-C stops at once; a second SIGTERM changes nothing."""
    flags = kit.flags(tmp_path / "out", "iiii", max_steps=6, **FLAGS)
    stands = forks.start(flags, tmp_path / "log", change="tests.train.faults:stand_still:2")
    forks.wait_for(tmp_path / "log", "standing still")
    os.kill(stands, signal.SIGTERM)
    forks.wait_for(tmp_path / "log", "SIGTERM: finish the step, save, stop")
    os.kill(stands, signal.SIGTERM)
    os.kill(stands, signal.SIGINT)
    time.sleep(0.5)
    os.kill(stands, signal.SIGINT)
    assert forks.end(stands) == 130
    said = (tmp_path / "log").read_text()
    assert "interrupted at step 2; no checkpoint yet: the same command begins anew" in said
    assert "Traceback" not in said and read_state(tmp_path / "out")["state"] == "preempted"


def test_a_step_that_does_not_end_in_time(kit, forks, tmp_path):
    started = time.monotonic()
    status, said = stopped(
        kit,
        forks,
        tmp_path,
        "SIGTERM",
        seen="standing still",
        change="tests.train.faults:stand_still:2",
        flags={"save_grace_seconds": 0.5, "save_steps": 1},
    )
    assert status == 1 and time.monotonic() - started < 120
    goes_on = f"the same command goes on from {tmp_path}/out/checkpoint-2"
    assert f"error: SIGTERM: no step ended within save_grace_seconds (0.5 s); at step 2; {goes_on}" in said
    assert forks.run(kit.flags(tmp_path / "out", "iiii", max_steps=3, **FLAGS), tmp_path / "again") == 0
    assert "run.lock: of a run that has gone" in (tmp_path / "again").read_text()


def test_while_it_evaluates(kit, forks, tmp_path):
    questions = kit.records("iitiittiiiti")
    flags = {"eval_strategy": "steps", "eval_steps": 2, "eval_data_path": questions, "per_device_eval_batch_size": 1}
    flags |= {"eval_image_folder": os.path.join(os.path.dirname(questions), "images"), "max_steps": 4, **FLAGS}
    run = forks.start(
        kit.flags(tmp_path / "out", "iiii", **flags), tmp_path / "log", change="tests.train.faults:slow_evaluation:0.3"
    )
    forks.wait_for(tmp_path / "log", "evaluating")
    os.kill(run, signal.SIGTERM)
    assert forks.end(run) == 0
    assert (tmp_path / "log").read_text().count("evaluating") < 12
    assert steps_of_last(tmp_path / "out") == 2 and read_state(tmp_path / "out")["state"] == "preempted"


def test_before_it_trains(kit, forks, tmp_path):
    for name, status in (("SIGTERM", 0), ("SIGINT", 130)):
        log, out = tmp_path / f"{name}.log", tmp_path / name
        flags = kit.flags(out, "iiii", max_steps=6, **FLAGS)
        run = forks.start(flags, log, change="tests.train.faults:slow_loading:60")
        forks.wait_for(log, "loading")
        os.kill(run, getattr(signal, name))
        assert forks.end(run) == status
        assert f"{name if status == 0 else 'interrupted'} before training began" in log.read_text()
        assert read_state(out)["state"] == "preempted" and read_state(out)["step"] is None


def test_nohup_and_transformers_own_way_are_left_alone(kit, forks, tmp_path):
    flags = kit.flags(tmp_path / "out", "iiii", max_steps=4, enable_jit_checkpoint=True, **FLAGS)
    run = forks.start(flags, tmp_path / "log", change="tests.train.faults:ignore_hangups")
    forks.wait_for(tmp_path / "log", "'epoch': '1'")
    os.kill(run, signal.SIGHUP)
    assert forks.end(run) == 0 and read_state(tmp_path / "out")["state"] == "finished"
    assert "enable_jit_checkpoint: every run saves" in (tmp_path / "log").read_text()  # transformers' own way


def two_ranks(kit, forks, folder, outs, **changes):
    """The processes of a run of two ranks, each with an output_dir."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meet = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        meet["MASTER_PORT"] = str(probe.getsockname()[1])
    runs = []
    for rank, out in zip("01", outs, strict=True):
        flags = kit.flags(out, "iiii", use_cpu=True, ddp_timeout=120, **(FLAGS | changes))
        runs.append(forks.start(flags, folder / rank, change=SLOW, env={"RANK": rank, "LOCAL_RANK": rank, **meet}))
    return runs


def test_a_folder_that_is_not_shared(kit, forks, tmp_path):
    """As on two machines, of which each has its own disk."""
    runs = two_ranks(kit, forks, tmp_path, [tmp_path / "here", tmp_path / "there"], max_steps=2)
    assert [forks.end(run) for run in runs] == [2, 2]
    said = f"error: output_dir: {tmp_path}/here: what rank 0 writes there is not seen on {socket.gethostname()}"
    assert said in (tmp_path / "0").read_text()
    assert not (tmp_path / "here").exists() and not (tmp_path / "there").exists()


def test_one_rank_of_two_gets_it(kit, forks, tmp_path):
    runs = two_ranks(kit, forks, tmp_path, [tmp_path / "out"] * 2, max_steps=8)
    forks.wait_for(tmp_path / "0", "'epoch': '1'")
    os.kill(runs[1], signal.SIGUSR1)
    assert [forks.end(run) for run in runs] == [0, 0], (tmp_path / "0").read_text()[-3000:]
    state = read_state(tmp_path / "out")
    assert state["state"] == "preempted" and state["signal"] == "SIGUSR1"
    last = checkpoints_of(tmp_path / "out")[-1]
    assert state["step"] == steps_of_last(tmp_path / "out") < 8 and fault(last) is None
    manifest = json.loads((last / "manifest.json").read_text())
    assert manifest["world_size"] == 2 and {"rng_state_0.pth", "rng_state_1.pth"} < manifest["files"].keys()
    (last / "rng_state_1.pth").write_bytes(b"")
    assert fault(last) is not None


# --- the state and the lock -------------------------------------------------------------------------------------------


def test_states_of_runs_that_fail(kit, tmp_path, monkeypatch):
    from llava.families.llava import Llava

    out = kit.run(tmp_path / "out", "iiii", max_steps=1)
    finished = read_state(out)
    assert finished["state"] == "finished" and finished["step"] == 1 and finished["message"] is None

    def fail(*args):
        raise RuntimeError("no such thing\nsecond line")

    monkeypatch.setattr(Llava, "prepare", fail)
    with pytest.raises(RuntimeError):
        kit.run(out, "iiii", max_steps=1, overwrite_output_dir=True)
    assert read_state(out) == finished  # nothing of it was changed
    with pytest.raises(RuntimeError):
        kit.run(tmp_path / "new", "iiii", max_steps=1)
    failed = read_state(tmp_path / "new")
    assert (failed["state"], failed["message"]) == ("failed", "RuntimeError: no such thing")
    with pytest.raises(SystemExit, match=r"^2$"):
        kit.run(tmp_path / "bad", "iiii", max_steps=1, mm_projector_type="mlp2x_relu")
    assert not (tmp_path / "bad").exists()


def test_a_state_that_cannot_be_read(tmp_path):
    for text in (None, "", "[]", '{"state": "other"}', '{"state": "fin', "\x00\x01"):
        if text is not None:
            (tmp_path / "run_state.json").write_text(text)
        assert read_state(tmp_path) is None
    RunState(str(tmp_path), writes=True).tell("running", 3)
    assert read_state(tmp_path)["step"] == 3 and [path.name for path in tmp_path.iterdir()] == ["run_state.json"]


def test_one_run_per_folder(kit, forks, tmp_path, capsys):
    out = tmp_path / "out"
    run = forks.start(kit.flags(out, "iiii", max_steps=100, **FLAGS), tmp_path / "log", change=SLOW)
    forks.wait_for(tmp_path / "log", "'epoch': '1'")
    for changes in ({}, {"overwrite_output_dir": True}):
        with pytest.raises(SystemExit, match=r"^2$"):
            kit.run(out, "iiii", max_steps=2, **changes)
        said = capsys.readouterr().err.splitlines()[-1]
        assert f"error: output_dir: {out} is in use by process {run} on {socket.gethostname()}, started 20" in said
    assert read_state(out)["state"] == "running" and read_state(out)["pid"] == run
    os.kill(run, signal.SIGKILL)
    assert forks.end(run) == -9
    kit.run(out, "iiii", max_steps=2)
    gone = f"process {run} on {socket.gethostname()}"
    assert f"run.lock: of a run that has gone ({gone}); removed" in capsys.readouterr().out


def test_locks_that_are_stale(tmp_path, monkeypatch):
    from llava.errors import LlavaError
    from llava.train import run_state

    lock, here = tmp_path / LOCK_FILE, socket.gethostname()
    alive = {"host": here, "boot": _boot(), "pid": os.getppid(), "start": _start(os.getppid())}
    for changes in ({"start": 1}, {"boot": "before"}, {"pid": 2**22 + 1}, {"pid": None}, {"pid": os.getpid()}):
        lock.write_text(json.dumps(alive | changes))
        with Lock(str(tmp_path)) as mine:
            assert json.loads(lock.read_text()) == mine.owner
        assert not list(tmp_path.iterdir()), changes
    lock.write_text(json.dumps(alive))
    with pytest.raises(LlavaError, match=f"in use by process {os.getppid()}"), Lock(str(tmp_path)):
        pass
    monkeypatch.setattr(run_state, "REFRESH", 0.3)  # seconds
    lock.write_text("")  # cut off
    os.utime(lock, (1, 1))
    with Lock(str(tmp_path)):
        pass
    lock.write_text(json.dumps(alive | {"host": "elsewhere"}))
    with Lock(str(tmp_path)):  # nothing was heard of it
        pass
    elsewhere = Lock(str(tmp_path))
    elsewhere.owner["host"] = "elsewhere"
    with elsewhere, pytest.raises(LlavaError, match=r"in use by process .* on elsewhere"), Lock(str(tmp_path)):
        pass
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(tmp_path):
    from llava.errors import LlavaError

    (tmp_path / "file").touch()
    with pytest.raises(LlavaError, match=f"output_dir: {tmp_path}/file cannot be written to"), Lock(f"{tmp_path}/file"):
        pass
    with Lock(f"{tmp_path}/new/folder"):
        assert (tmp_path / "new/folder" / LOCK_FILE).is_file()
    assert not (tmp_path / "new/folder").exists()  # nothing came of it
    shutil.rmtree(tmp_path / "new")


class Loaded(torch.utils.data.Dataset):
    """What tells which signals are blocked in the process that loads it, from its first moment on."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ()))


@pytest.mark.parametrize("method", [None, "fork", "forkserver", "spawn", multiprocessing.get_context("spawn")])
def test_workers_begin_with_the_signals_blocked(method):
    """In the moment between the start of a worker and its first own line a signal to the group would end it."""
    kept = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    options = {"num_workers": 1, "batch_size": None, "multiprocessing_context": worker_context(method)}
    blocked = next(iter(torch.utils.data.DataLoader(Loaded(), **options)))
    assert set(blocked) >= {signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT}
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == kept


@pytest.mark.parametrize("packed", [False, True])
def test_workers_of_a_run_leave_its_signals_to_it(kit, spy, tmp_path, packed):
    kit.run(tmp_path / "out", max_steps=1, dataloader_num_workers=1, pack_sequences=packed)
    batches = iter(spy.trainer.get_train_dataloader())
    next(batches)
    status = [Path(f"/proc/{child.pid}/status").read_text() for child in multiprocessing.active_children()]
    blocked = [int(line.split()[1], 16) for text in status for line in text.splitlines() if line.startswith("SigBlk")]
    assert blocked and all(mask >> (signal.SIGTERM - 1) & 1 and mask >> (signal.SIGUSR1 - 1) & 1 for mask in blocked)
