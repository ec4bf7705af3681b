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


@pytest.fixture
def demo(tmp_path):
    """A function: the demo, whose stages write the texts of a list as their states and end with a status."""
    (tmp_path / "python").write_text(
        f"""#!{sys.executable}
import json, os, pathlib, sys
if "--output_dir" not in sys.argv:
    sys.exit(print("asked", *sys.argv[1:3]))
out = pathlib.Path(sys.argv[-1])
out.mkdir(parents=True, exist_ok=True)
ends = json.loads(pathlib.Path("{tmp_path}/ends").read_text())
text, status = ends.pop(0)
pathlib.Path("{tmp_path}/ends").write_text(json.dumps(ends))
print("trained", out.name)
if text is not None:
    (out / "run_state.json").write_text(text)
sys.exit(status)
"""
    )
    (tmp_path / "python").chmod(0o755)

    def run(*ends) -> tuple[int, str, str]:
        (tmp_path / "ends").write_text(json.dumps(ends))
        code = f"""
        use_environment() {{ :; }}; make_demo() {{ :; }}
        read_demo_flags --output_dir {tmp_path}/out
        run_demo one one.yaml two two.yaml
        """
        env = {**os.environ, "PYTHON": str(tmp_path / "python"), "NUM_PROCS": "1"}
        done = subprocess.run(script(code), env=env, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stdout, done.stderr

    return run


def state(name: str, step: int = 1) -> str:
    return json.dumps({"state": name, "step": step})


def test_nothing_is_built_on_half_a_stage(tmp_path, demo):
    stopped = "stopped before its end, and nothing after it was begun; the same command goes on"
    assert demo((state("preempted"), 0)) == (0, f"trained one\n{tmp_path}/out/one: {stopped}\n", "")
    # a launcher that was stopped itself says 1; the run has said what became of it
    assert demo((state("preempted", 2), 1)) == (0, f"trained one\n{tmp_path}/out/one: {stopped}\n", "")
    status, said, _ = demo((state("finished"), 0), (state("preempted"), 0))
    assert (status, said) == (0, f"trained one\ntrained two\n{tmp_path}/out/two: {stopped}\n")
    # what another run has left is not what this one says
    assert demo((state("preempted"), 1))[:2] == (1, f"{tmp_path}/out/one: finished before\ntrained two\n")
    assert demo((state("failed"), 1))[:2] == (1, f"{tmp_path}/out/one: finished before\ntrained two\n")
    assert demo((state("running"), 137))[0] == 137
    status, _, error = demo((state("running", 2), 0))
    assert status == 2 and "run_state.json" in error and error.count("\n") == 1
    status, said, _ = demo((state("finished"), 0))
    assert "asked -m llava.eval.exact_match\nasked -m llava.eval.report" in said


def test_a_stage_that_is_stopped_before_it_says_anything(tmp_path):
    """A signal while the program is being loaded ends it; the stage has not failed."""
    (tmp_path / "python").write_text(
        f"#!{sys.executable}\nimport time\nopen('{tmp_path}/begun', 'w')\ntime.sleep(60)\n"
    )
    (tmp_path / "python").chmod(0o755)
    env = {**os.environ, "PYTHON": str(tmp_path / "python"), "NUM_PROCS": "1"}
    code = f"read_demo_flags --output_dir {tmp_path}/out; demo_stage one one.yaml; echo not reached"
    with running(script(code), env=env) as process:
        wait_for(tmp_path / "begun", process)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and "the same command goes on" in said and "not reached" not in said


def test_qwen2_vls_demo(tmp_path):
    """`scripts/finetune_qwen2_vl.sh` with a Python that does nothing: what is made, trained and asked, and in what."""
    for name in ("scripts", "playground"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("demo", "__pycache__"))
    (tmp_path / "python").write_text(
        f"""#!{sys.executable}
import pathlib, sys
if sys.argv[1] not in ("-c", "-"):
    with open("{tmp_path}/asked", "a") as file:
        print(*sys.argv[1:], file=file)
for flag in ("--output", "--output_dir"):
    if flag in sys.argv:
        out = pathlib.Path(sys.argv[sys.argv.index(flag) + 1])
        out.mkdir(parents=True, exist_ok=True)
        (out / "run_state.json").write_text('{{"state": "finished"}}')
"""
    )
    (tmp_path / "python").chmod(0o755)
    command = ["bash", tmp_path / "scripts/finetune_qwen2_vl.sh", "--output_dir", tmp_path / "out", "--max_steps", "2"]
    env = {**os.environ, "PYTHON": str(tmp_path / "python"), "NUM_PROCS": "1", "SELECTIONS": "none budget:0.5"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    *made, first, second, asked, _ = (tmp_path / "asked").read_text().splitlines()
    assert [line.split()[0] for line in made] == [f"playground/make_demo_{what}.py" for what in ("data", "model")]
    train, out = f"{tmp_path}/llava/train/train_mem.py", f"{tmp_path}/out/qwen2_vl"
    stage = "configs/train/demo_qwen2_vl"
    assert first == f"{train} {stage}_pretrain.yaml --max_steps 2 --output_dir {out}_pretrain"
    assert second == f"{train} {stage}.yaml --max_steps 2 --model_name_or_path {out}_pretrain --output_dir {out}"
    assert asked.startswith(f"-m llava.eval.exact_match --model-path {out} ")
    assert asked.endswith(" --blank-images --selections none budget:0.5")
