"""scripts/slurm.sh with stand-ins for Slurm's programs: what is started where, and when a job is queued again."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.config.test_supervise import RANK, running, wait_for

ROOT = Path(__file__).parents[2]

# As Slurm's, it starts the command on each node, in a session of its own, and hands on USR1; at TERM it ends them.
SRUN = """
import os, signal, subprocess, sys
start = sys.argv.index("bash")
flags, words = dict(word[2:].split("=") for word in sys.argv[1:start]), sys.argv[start:]
tasks = [
    subprocess.Popen(words, env={**os.environ, "SLURM_NODEID": str(node)}, start_new_session=True)
    for node in range(int(flags["nodes"]))
]
print("srun", *sorted(f"{name}={value}" for name, value in flags.items()), flush=True)
signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
signal.signal(signal.SIGTERM, lambda *_: [task.kill() for task in tasks])
sys.exit(max(abs(task.wait()) for task in tasks))
"""
SCONTROL = """
import sys
print("node-7", "node-8", sep="\\n") if sys.argv[1:3] == ["show", "hostnames"] else print("scontrol", *sys.argv[1:])
"""
PYTHON = f"""
import os, runpy, sys
if "-m" in sys.argv and "llava.train.nodes" not in sys.argv or sys.argv[1] == "-c":
    if "torch.distributed.run" not in sys.argv:
        os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])
if "llava.train.nodes" in sys.argv:
    sys.exit(print("10.0.0.7 eth7"))
# torchrun and its one rank in one process
if os.environ.get("FAIL"):
    sys.exit(3)
node = sys.argv[sys.argv.index("--node_rank") + 1]
print("torchrun", *sys.argv[3 : sys.argv.index("--master_port") + 2], flush=True)
os.environ["RANK"] = node
if os.environ.get("END"):
    import json, pathlib
    out = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1])
    (out / "run_state.json").write_text(json.dumps({{"state": os.environ["END"], "step": 9}}))
    sys.exit(os.environ["END"] == "failed")
exec({RANK!r})
"""


@pytest.fixture
def job(tmp_path):
    """A function: a context of the job's batch script, started as Slurm does it: a copy, with the job's variables."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, code in (("srun", SRUN), ("scontrol", SCONTROL), ("python", PYTHON)):
        (tools / name).write_text(f"#!{sys.executable}\n{code}")
        (tools / name).chmod(0o755)
    copy = tmp_path / "slurm_script"
    copy.write_text((ROOT / "scripts/slurm.sh").read_text())
    (tmp_path / "c.yaml").write_text(f"output_dir: {tmp_path}/out\n")
    (tmp_path / "out").mkdir()

    def start(*words, **variables):
        env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": str(tools / "python")}
        env |= {"SLURM_JOB_ID": "41", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node-[7-8]"}
        env |= {"SLURM_SUBMIT_DIR": str(ROOT), "PYTHONPATH": str(ROOT), "NUM_PROCS": "1"}
        command = ["bash", str(copy), *(words or [str(tmp_path / "c.yaml")]), *(["--output_dir", f"{tmp_path}/out"])]
        return running(command, env=env | variables, cwd=tmp_path)

    return start


def end(process: subprocess.Popen) -> tuple[int, list[str], str]:
    said, errors = process.communicate(timeout=300)
    return process.returncode, said.splitlines(), errors


def test_a_run_that_is_warned_saves_and_is_queued_again(tmp_path, job):
    with job() as process:
        for rank in (0, 1):
            wait_for(tmp_path / f"out/ready{rank}", process)
        process.send_signal(signal.SIGUSR1)
        status, said, errors = end(process)
    assert (status, errors) == (0, "")
    assert [json.loads((tmp_path / f"out/got{rank}").read_text()) for rank in (0, 1)] == [["SIGUSR1"]] * 2
    meet = "torchrun --nproc_per_node 1 --nnodes 2 --node_rank {} --master_addr node-7 --master_port 10041"
    assert sorted(line for line in said if line.startswith("torchrun")) == [meet.format(0), meet.format(1)]
    assert "srun kill-on-bad-exit=1 nodes=2 ntasks-per-node=1" in said
    assert said[-2:] == [
        f"{tmp_path}/out: stopped before its end; the job is queued again and goes on",
        "scontrol requeue 41",
    ]


@pytest.mark.parametrize(
    "variables, status, told",
    [
        ({"END": "finished"}, 0, "finished"),
        ({"END": "failed"}, 1, "failed; the job is not queued again"),
        ({"FAIL": "yes"}, 3, "failed; the job is not queued again"),
        ({"END": "preempted", "SLURM_RESTART_COUNT": "4", "MAX_REQUEUES": "4"}, 2, "queued again 4 times already"),
    ],
)
def test_no_job_is_queued_again_without_end_or_need(tmp_path, job, variables, status, told):
    (tmp_path / "out/run_state.json").write_text('{"state": "preempted", "step": 4}')  # of the job's last start
    with job(**variables) as process:
        ended, said, errors = end(process)
    assert ended == status and told in "\n".join(said) + errors
    assert not any(line.startswith("scontrol") for line in said)


def test_a_cancelled_job_stays_cancelled(tmp_path, job):
    """scancel sends TERM: to the steps, and to the batch script."""
    with job() as process:
        for rank in (0, 1):
            wait_for(tmp_path / f"out/ready{rank}", process)
        process.send_signal(signal.SIGTERM)
        status, said, errors = end(process)
    assert (status, errors) == (0, "") and said[-1].endswith("stopped by Slurm; the same job goes on")
    assert (tmp_path / "out/got1").exists() and not any(line.startswith("scontrol") for line in said)


@pytest.mark.parametrize(
    "words, variables, told",
    [
        (["--learning_rate"], {}, "error: found --learning_rate in job 41, expected sbatch and CONFIG.yaml"),
        ([], {"SLURM_SUBMIT_DIR": "/"}, "submit from its root, or set LLAVA_ROOT"),
        (["none.yaml"], {}, "none.yaml"),
    ],
)
def test_what_is_missing_is_told_in_one_line(job, words, variables, told):
    with job(*words, **variables) as process:
        status, _, errors = end(process)
    assert status == 2 and told in errors and errors.count("\n") == 1
