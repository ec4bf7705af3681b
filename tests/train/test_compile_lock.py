"""A lock on a folder of compiled extensions: held by a live process, left by a killed one, or taken."""

import os
import subprocess
import sys
import threading
import time

import pytest

from llava.train import compile_lock

HOLD = """
import importlib.util, os, sys
torch = os.path.dirname(importlib.util.find_spec("torch").origin)  # whose import takes seconds
spec = importlib.util.spec_from_file_location("file_baton", f"{torch}/utils/file_baton.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
baton = module.FileBaton(sys.argv[1])
print(baton.try_acquire(), flush=True)
sys.stdin.read()
baton.release()
"""


@pytest.fixture
def hold(tmp_path):
    """A function: a process that has the lock, as PyTorch takes it."""
    held = []

    def start():
        command = [sys.executable, "-c", HOLD, str(tmp_path / "lock")]
        held.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert held[-1].stdout.readline() == "True\n"
        return held[-1]

    yield start
    for process in held:
        process.kill()
        process.communicate()


@pytest.fixture
def baton(tmp_path, monkeypatch):
    """What extensions are compiled under from now on."""
    from torch.utils import cpp_extension, file_baton

    monkeypatch.setattr(cpp_extension, "FileBaton", file_baton.FileBaton)
    compile_lock.tell_compilation()
    kind = cpp_extension.FileBaton
    compile_lock.tell_compilation()
    assert cpp_extension.FileBaton is kind is not file_baton.FileBaton
    return kind(str(tmp_path / "lock"))


def age(path, seconds):
    os.utime(path, (time.time() - seconds,) * 2)


def test_the_lock_of_a_killed_process_is_taken_over(baton, hold, tmp_path, capsys):
    process, lock = hold(), tmp_path / "lock"
    age(lock, 3600)
    assert compile_lock.is_stale(lock) is None and compile_lock.owner_of(lock) == f"process {process.pid}"
    process.kill()
    process.wait()
    assert compile_lock.is_stale(lock) == pytest.approx(3600, abs=60)
    assert baton.try_acquire()
    said = capsys.readouterr().out
    assert f"{lock}: removed, made 36" in said and f"compiling {tmp_path.name} in {tmp_path}" in said
    baton.release()
    assert not lock.exists() and compile_lock.is_stale(lock) is None


def test_a_process_that_compiles_is_waited_for(baton, hold, tmp_path, capsys):
    process = hold()
    age(tmp_path / "lock", 3600)
    acquired = []
    waiting = threading.Thread(target=lambda: acquired.append(baton.try_acquire()), daemon=True)
    waiting.start()
    waiting.join(1)
    assert (
        waiting.is_alive()
        and f"waiting for process {process.pid}, which compiles {tmp_path}" in capsys.readouterr().out
    )
    (tmp_path / "made.so").touch()
    process.communicate("")
    waiting.join(30)
    assert acquired == [False] and not (tmp_path / "lock").exists()
    baton.wait()  # PyTorch does so after a False
    assert baton.try_acquire()
    assert "compiling" not in capsys.readouterr().out


def test_a_process_of_another_container_is_seen_by_its_lock(baton, tmp_path, monkeypatch):
    """Which /proc does not show."""
    monkeypatch.setattr(compile_lock, "owner_of", lambda lock: None)
    assert baton.try_acquire()
    age(tmp_path / "lock", 3600)
    assert compile_lock.is_stale(tmp_path / "lock") is None
    os.close(baton.fd)  # as by a kill
    assert compile_lock.is_stale(tmp_path / "lock")


def test_a_lock_that_another_machine_may_hold_is_left_for_longer(tmp_path, monkeypatch):
    (tmp_path / "lock").touch()
    assert compile_lock.is_stale(tmp_path / "lock") is None  # it is fresh
    age(tmp_path / "lock", 60)
    assert compile_lock.is_stale(tmp_path / "lock")
    monkeypatch.setattr(compile_lock, "_is_shared", lambda path: True)
    assert compile_lock.is_stale(tmp_path / "lock") is None
    age(tmp_path / "lock", 3600)
    assert compile_lock.is_stale(tmp_path / "lock")


def test_disks_of_several_machines_are_known(tmp_path, monkeypatch):
    mounts = f"a / ext4 rw 0 0\nb {tmp_path} nfs4 rw 0 0\nc {tmp_path}/here tmpfs rw 0 0\n"
    monkeypatch.setattr(compile_lock.Path, "read_text", lambda path: mounts)
    assert compile_lock._is_shared(tmp_path / "lock") and not compile_lock._is_shared(tmp_path / "here" / "lock")
    assert not compile_lock._is_shared(tmp_path.parent / "lock")
