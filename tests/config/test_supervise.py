"""scripts/supervise.sh: what a run is told when its script is told to stop, and what the script makes of its end."""

import contextlib
import json
import os
import pty
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.forks import hear_all

ROOT = Path(__file__).parents[2]

# Stands for a training process: counts signals, and half a second after the first one ends as a run that has saved.
RANK = """
import json, os, pathlib, signal, sys, time
out, rank, got = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1]), os.environ.get("RANK", "0"), []
for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
    signal.signal(getattr(signal, name), lambda number, frame: got.append(signal.Signals(number).name))
out.mkdir(parents=True, exist_ok=True)
(out / f"ready{rank}").touch()
while not got:
    time.sleep(0.02)
time.sleep(0.5)
(out / f"got{rank}").write_text(json.dumps(got))
(out / "run_state.json").write_text(json.dumps({"state": "preempted", "step": 2, "signal": got[0]}))
"""


def script(code: str) -> list[str]:
    """A script that sources common.sh and runs `code`."""
    return ["bash", "-c", f"set -euo pipefail; source {shlex.quote(str(ROOT / 'scripts/common.sh'))}\n{code}"]


@contextlib.contextmanager
def running(command: list[str], **options):
    """A command with pipes, which does not outlive the test."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, preexec_fn=hear_all, start_new_session=True, **pipes | options)
    try:
        yield process
    finally:
        end_below(process.pid)
        process.wait()
        process.stdout.close()
        process.stderr.close()


def end_below(pid: int) -> None:
    """SIGKILL of a process and of all below it, whatever their groups."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        top = psutil.Process(pid)
        for process in (*top.children(recursive=True), top):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def wait_for(path: Path, process: subprocess.Popen | None = None) -> None:
    """Until there is such a file, which the process makes."""
    end = time.monotonic() + 300
    while not path.exists():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.02)


@pytest.fixture
def rank(tmp_path) -> str:
    path = tmp_path / "rank.py"
    path.write_text(RANK)
    return shlex.quote(str(path))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1", "SIGINT"])
def test_a_script_hands_on_what_it_is_told(tmp_path, rank, name):
    code = f"supervise tell_ranks {sys.executable} {rank} --output_dir {tmp_path}; echo ended $? $TOLD"
    with running(script(code)) as process:
        wait_for(tmp_path / "ready0", process)
        process.send_signal(getattr(signal, name))
        assert process.communicate(timeout=300)[0] == f"ended 0 {name.removeprefix('SIG')}\n"
    assert json.loads((tmp_path / "got0").read_text()) == [name]


def test_the_ranks_are_told_and_not_their_launcher(tmp_path, rank):
    """Ctrl-C in a terminal goes to every process of its group, and reaches each rank once; torchrun ends well."""
    pytest.importorskip("torch")
    launcher = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node 2"
    code = f"supervise tell_ranks {launcher} {rank} --output_dir {tmp_path}; echo ended $? $TOLD"
    child, terminal = pty.fork()
    if child == 0:
        hear_all()
        os.execvp("bash", script(code))
    try:
        for number in (0, 1):
            wait_for(tmp_path / f"ready{number}")
        os.write(terminal, b"\x03")
        said = read_all(terminal)
    finally:
        end_below(child)
        status = os.waitpid(child, 0)[1]
        os.close(terminal)
    assert status == 0 and "ended 0 INT" in said and "Traceback" not in said
    assert [json.loads((tmp_path / f"got{number}").read_text()) for number in (0, 1)] == [["SIGINT"], ["SIGINT"]]


def read_all(terminal: int) -> str:
    """What is written to a terminal until its last process has left it."""
    said = b""
    while select.select([terminal], [], [], 300)[0]:
        try:
            part = os.read(terminal, 4096)
        except OSError:
            part = b""
        if not part:
            return said.decode()
        said += part
    raise AssertionError(f"still running after: {said.decode()}")


def test_an_exit_status_is_the_commands():
    done = subprocess.run(script("supervise tell_ranks bash -c 'exit 7'"), timeout=300)
    assert done.returncode == 7


@pytest.mark.parametrize(
    "text, state",
    [
        ('{"state": "finished", "step": 3}', "finished"),
        (json.dumps({"step": 3, "message": 'a {"state": "finished"}', "state": "preempted"}, indent=2), "preempted"),
        ('{"state": "finished", "st', "unknown"),
        ("", "unknown"),
        ("\0\0\0", "unknown"),
        ("finished", "unknown"),
        (None, "finished"),  # an earlier version's folder
    ],
)
def test_a_state_is_read_whole_or_not_at_all(tmp_path, text, state):
    (tmp_path / "trainer_state.json").write_text("{}")
    if text is not None:
        (tmp_path / "run_state.json").write_text(text)
    done = subprocess.run(script(f"state_of {tmp_path}"), capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{state}\n", "")


def test_no_state_at_all_is_no_end(tmp_path):
    assert subprocess.run(script(f"state_of {tmp_path}/none"), capture_output=True, text=True).stdout == "unknown\n"


@pytest.mark.parametrize(
    ("script", "recipe", "options"),
    [
        ("finetune", "demo", ""),
        ("pretrain", "demo", "--until pretrain "),
        ("finetune_qwen2_vl", "demo_qwen2_vl", "--heldout.selections none budget:0.5 "),
    ],
)
def test_the_demos_are_recipes(tmp_path, script, recipe, options):
    """A demo's script with a Python that does nothing: the recipe that it starts, from the root of the checkout."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    (tmp_path / "python").write_text(
        f"""#!{sys.executable}
import os, sys
if sys.argv[1] not in ("-c", "-"):
    print(os.getcwd(), os.environ["CUDA_VISIBLE_DEVICES"], *sys.argv[1:])
"""
    )
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "here").mkdir()
    command = ["bash", tmp_path / f"scripts/{script}.sh", "--output_dir", "out", "--max_steps", "2"]
    env = {**os.environ, "PYTHON": str(tmp_path / "python"), "SELECTIONS": "none budget:0.5"}
    env |= {"CUDA_VISIBLE_DEVICES": "3"}
    done = subprocess.run(command, cwd=tmp_path / "here", env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    flags = f"{options}--output_dir {tmp_path}/here/out --max_steps 2"
    assert done.stdout == f"{tmp_path} 3 -m llava.train.recipe configs/recipes/{recipe}.yaml {flags}\n"
