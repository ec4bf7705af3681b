"""scripts/common.sh: which command starts a run, which Python is used, how the demo's flags are read."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llava.errors import LlavaError

ROOT = Path(__file__).parents[2]
TRAIN = str(ROOT / "llava/train/train_mem.py")
HOSTS = "scripts/hostfile.example"


def bash(code: str, check: bool = True, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Run `code` after sourcing common.sh, with only PATH, HOME and `environment`."""
    variables = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **environment}
    script = f"set -euo pipefail; source {shlex.quote(str(ROOT / 'scripts/common.sh'))}\n{code}"
    done = subprocess.run(["bash", "-c", script], env=variables, cwd=cwd, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr
    return done


def launched(devices: int, **environment: str) -> list[str]:
    """Environment and words of the command that `launch c.yaml --seed 1` runs where PyTorch sees `devices`.

    The way to another node begins at 10.0.0.2 on eth1.
    """
    code = f"""
    has_driver() {{ true; }}
    show() {{
        case "$*" in
            *llava.train.devices) echo {devices} ;;
            *llava.train.nodes*) echo 10.0.0.2 eth1 ;;
            *) echo "${{CUDA_VISIBLE_DEVICES-}}|${{DS_ACCELERATOR-}}|${{RANK-}}|$*" ;;
        esac
    }}
    PYTHON=show launch c.yaml --seed 1
    """
    return bash(code, **environment).stdout.strip().split("|")


def program(path: Path, code: str) -> None:
    """An executable file of bash `code`."""
    path.write_text(f"#!{shutil.which('bash')}\n{code}\n")
    path.chmod(0o755)


def few_tools(folder: Path) -> str:
    """A PATH with nothing in it but what common.sh needs: no Python, no nvidia-smi."""
    for name in ("bash", "cat", "cksum", "dirname"):
        (folder / name).symlink_to(shutil.which(name))
    return str(folder)


def test_one_plain_process_without_cuda():
    assert launched(0) == ["", "cpu", "", f"{TRAIN} c.yaml --seed 1"]


def test_processes_on_the_cpu():
    for devices in (0, 8):
        *environment, command = launched(devices, NUM_PROCS="2")
        assert environment == ["", "cpu", ""]
        assert command == f"-m torch.distributed.run --nproc_per_node 2 --standalone {TRAIN} c.yaml --seed 1"


def test_torchrun_on_one_node():
    assert launched(8)[-1] == f"-m torch.distributed.run --nproc_per_node 8 --standalone {TRAIN} c.yaml --seed 1"
    assert "--nproc_per_node 4 " in launched(8, NUM_GPUS="4")[-1]


def test_torchrun_on_several_nodes_reads_llava_next_variables():
    *environment, command = launched(8, NUM_GPUS="8", NNODES="2", RANK="1", ADDR="host", PORT="5")
    assert environment == ["", "", ""]  # RANK, the node's, is not left for the processes to take as their own
    meet = "--nnodes 2 --node_rank 1 --master_addr host --master_port 5"
    assert command == f"-m torch.distributed.run --nproc_per_node 8 {meet} {TRAIN} c.yaml --seed 1"


RDZV = "--rdzv_backend c10d --rdzv_endpoint host:5 --rdzv_id llava --rdzv_conf is_host="


@pytest.mark.parametrize(
    "variables, words",
    [
        ({"NNODES": "1:2"}, f"--nnodes 1:2 --max_restarts 3 {RDZV}1 --local_addr 10.0.0.2"),
        ({"NNODES": "1:2", "RANK": "1"}, f"--nnodes 1:2 --max_restarts 3 {RDZV}0 --local_addr 10.0.0.2"),
        (
            {"NNODES": "2", "MAX_RESTARTS": "5", "RDZV_CONF": "join_timeout=60", "LOCAL_ADDR": "10.1.1.1"},
            f"--nnodes 2 --max_restarts 5 {RDZV}1,join_timeout=60 --local_addr 10.1.1.1",
        ),
        ({"MAX_RESTARTS": "1"}, f"--nnodes 1 --max_restarts 1 {RDZV}1"),
    ],
)
def test_nodes_that_may_leave_and_come_back(variables, words):
    command = launched(8, NUM_GPUS="8", ADDR="host", PORT="5", **variables)[-1]
    assert command == f"-m torch.distributed.run --nproc_per_node 8 {words} {TRAIN} c.yaml --seed 1"


def test_one_node_that_is_started_again():
    words = "-m torch.distributed.run --nproc_per_node 1 --standalone --max_restarts 2"
    assert launched(0, MAX_RESTARTS="2")[-1] == f"{words} {TRAIN} c.yaml --seed 1"


def test_processes_of_several_nodes_are_told_the_way_to_each_other():
    code = """
    python() { case "$*" in *llava.train.nodes*) echo "$WAY" ;; *) echo "${GLOO_SOCKET_IFNAME-}" ;; esac; }
    PYTHON=python NUM_PROCS=1 launch c.yaml
    """
    for variables, interface in (
        ({"NNODES": "2", "WAY": "10.0.0.2 eth1"}, "eth1"),
        ({"NNODES": "2", "WAY": "10.0.0.2 eth1", "GLOO_SOCKET_IFNAME": "ib0"}, "ib0"),
        ({"NNODES": "2", "WAY": "node0 "}, ""),
        ({"MAX_RESTARTS": "1"}, ""),
    ):
        assert bash(code, **variables).stdout == f"{interface}\n"


@pytest.mark.parametrize(
    "variables, told",
    [
        ({"NNODES": "two"}, "NNODES=two, expected a number of nodes, or LEAST:MOST"),
        ({"NNODES": "2:1"}, "NNODES=2:1, expected a number of nodes, or LEAST:MOST"),
        ({"MAX_RESTARTS": "-1"}, "MAX_RESTARTS=-1, expected a number"),
        ({"HOSTFILE": HOSTS, "LAUNCHER": "torchrun"}, "HOSTFILE is for LAUNCHER=deepspeed; torchrun is started on"),
        ({"HOSTFILE": "none"}, "HOSTFILE=none: no such file, expected one as scripts/hostfile.example"),
        ({"HOSTFILE": HOSTS, "NNODES": "1:2"}, "NNODES=LEAST:MOST and MAX_RESTARTS are for LAUNCHER=torchrun"),
    ],
)
def test_settings_of_nodes_that_do_not_fit(variables, told):
    done = bash("PYTHON=echo NUM_PROCS=2 launch c.yaml", check=False, **variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {told}") and done.stderr.count("\n") == 1


def test_the_way_to_another_node():
    nodes = pytest.importorskip("llava.train.nodes")
    assert nodes.way_to("127.0.0.1", 5) == nodes.way_to("localhost", 5) == ("127.0.0.1", "lo")
    with pytest.raises(LlavaError, match=r"ADDR=no\.such\.node\.invalid: .*expected the first node's name"):
        nodes.way_to("no.such.node.invalid", 5)


def test_deepspeed_launcher():
    variables = {"NNODES": "2", "ADDR": "host", "PORT": "5", "HOSTFILE": HOSTS}
    where = f"--num_gpus 8 --num_nodes 2 --hostfile {HOSTS} --master_addr host --master_port 5"
    assert launched(8, **variables)[-1] == f"-m deepspeed.launcher.runner {where} {TRAIN} c.yaml --seed 1"


@pytest.mark.parametrize(
    "visible, number, words",
    [
        ("2,3", "2", f"--include localhost:2,3 --master_port 5 {TRAIN}"),
        ("5,2,3", "2", f"--include localhost:5,2 --master_port 5 {TRAIN}"),
        (
            "GPU-a,GPU-b",
            "1",
            "--num_gpus 1 --no_local_rank --no_python --master_port 5 "
            f"env CUDA_VISIBLE_DEVICES=GPU-a,GPU-b show -u {TRAIN}",
        ),
        (
            "MIG-a",
            "1",
            f"--num_gpus 1 --no_local_rank --no_python --master_port 5 env CUDA_VISIBLE_DEVICES=MIG-a show -u {TRAIN}",
        ),
    ],
)
def test_deepspeed_launcher_keeps_the_visible_devices(visible, number, words):
    devices = len(visible.split(","))
    left, *_, command = launched(devices, LAUNCHER="deepspeed", CUDA_VISIBLE_DEVICES=visible, NUM_GPUS=number, PORT="5")
    assert command == f"-m deepspeed.launcher.runner {words} c.yaml --seed 1"
    assert left == ""  # else DeepSpeed says that it ignores them


def test_deepspeed_launcher_on_the_cpu_shows_its_processes_no_gpu():
    words = "--num_gpus 2 --no_local_rank --no_python env CUDA_VISIBLE_DEVICES= show -u"
    command = launched(8, LAUNCHER="deepspeed", NUM_PROCS="2")[-1]
    assert command == f"-m deepspeed.launcher.runner {words} {TRAIN} c.yaml --seed 1"


def test_deepspeed_launcher_on_several_hosts_leaves_the_devices_to_it():
    variables = {"LAUNCHER": "deepspeed", "CUDA_VISIBLE_DEVICES": "2,3", "NUM_GPUS": "8", "HOSTFILE": HOSTS}
    visible, *_, command = launched(2, **variables)
    assert visible == "2,3"
    assert command == f"-m deepspeed.launcher.runner --num_gpus 8 --hostfile {HOSTS} {TRAIN} c.yaml --seed 1"


@pytest.mark.parametrize("visible", ["2,3", "GPU-a,MIG-b"])
def test_the_real_deepspeed_launcher_shows_its_processes_these_devices(visible, tmp_path):
    """On the CPU, where DeepSpeed names devices as it does with CUDA; LOCAL_SIZE tells it how many there are."""
    pytest.importorskip("deepspeed")
    script = tmp_path / "show.py"
    script.write_text(
        "import os, sys\n"
        "with open(sys.argv[0] + os.environ['LOCAL_RANK'], 'w') as file:\n"
        "    print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['WORLD_SIZE'], *sys.argv[-2:], file=file)\n"
    )
    variables = {"CUDA_VISIBLE_DEVICES": visible, "DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "8", "PYTHON": sys.executable}
    done = bash(f"launch_with_deepspeed 2 {shlex.quote(str(script))} --seed 1", **variables)
    seen = {path.name: path.read_text() for path in tmp_path.glob("show.py?")}
    assert seen == dict.fromkeys(["show.py0", "show.py1"], f"{visible} 2 --seed 1\n")
    assert "ignoring" not in done.stdout


def test_many_gpus_without_cuda_is_an_error():
    done = bash("cuda_devices() { echo 0; }; PYTHON=echo launch c.yaml", check=False, NUM_GPUS="8")
    assert done.returncode == 2
    assert done.stderr == "error: NUM_GPUS=8, but there is no CUDA device; NUM_PROCS=N runs N processes on the CPU\n"


def test_more_gpus_than_there_are_is_an_error():
    code = "cuda_devices() { echo 2; }; PYTHON=echo launch c.yaml"
    done = bash(code, check=False, NUM_GPUS="4", CUDA_VISIBLE_DEVICES="2,3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: NUM_GPUS=4, but PyTorch sees 2 CUDA device(s) (CUDA_VISIBLE_DEVICES=2,3)\n"


def test_gpus_that_pytorch_cannot_use_are_an_error_unless_the_cpu_is_asked_for():
    code = """
    has_driver() { true; }
    python() {
        case "$*" in
            *llava.train.devices) echo "error: found 8 GPUs" >&2 && return 2 ;;
            *) echo "started" ;;
        esac
    }
    PYTHON=python launch c.yaml
    """
    done = bash(code, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: found 8 GPUs\n")
    done = bash(code, check=False, NUM_PROCS="1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "started\n", "")


def test_pytorch_is_asked_for_devices_where_there_may_be_some(tmp_path):
    """Not elsewhere, since that takes seconds; a container may have no nvidia-smi."""
    sign, tools = tmp_path / "nvidiactl", tmp_path / "tools"
    tools.mkdir()
    code = f"DRIVER_SIGNS=({tmp_path}/version {sign}); PYTHON=echo; cuda_devices"
    assert bash(code, PATH=few_tools(tools)).stdout == "0\n"
    sign.touch()
    assert bash(code, PATH=str(tools)).stdout == "-W ignore -m llava.train.devices\n"
    assert bash(code, PATH=str(tools), NUM_PROCS="2").stdout == "0\n"
    sign.unlink()
    program(tools / "nvidia-smi", "exit 0")
    assert bash(code, PATH=str(tools)).stdout == "-W ignore -m llava.train.devices\n"
    signs = bash('echo "${DRIVER_SIGNS[*]}"').stdout.split()
    assert {"/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg"} == set(signs)


@pytest.mark.parametrize("driver, accelerator", [("true", ""), ("false", "cpu")])
def test_deepspeed_is_told_of_the_cpu_where_there_is_no_driver(driver, accelerator):
    code = f"has_checkout() {{ true; }}; has_driver() {{ {driver}; }}; use_environment train; echo ${{DS_ACCELERATOR-}}"
    assert bash(code, PYTHON=sys.executable).stdout == f"{accelerator}\n"


OLD, NO_VENV, NEW, OURS = "old", "no_venv", "new", "ours"


def chosen_python(folder: Path, pythons: dict[str, str], **environment: str) -> subprocess.CompletedProcess:
    """`use_environment` where PATH has these `pythons` (name: kind), which tell when they are to make .venv."""
    path = few_tools(folder)
    for name, kind in pythons.items():
        code = f"""
        case "$*" in
            *version_info*) [[ {kind} != old ]] ;;
            *ensurepip*) [[ {kind} != no_venv ]] ;;
            "-m venv "*) echo "{name} makes it" ; exit 1 ;;
            *) [[ {kind} == ours ]] ;;
        esac"""
        program(folder / name, code)
    for name in ("pyproject.toml", "constraints.txt"):
        (folder / name).touch()
    code = f"ROOT={shlex.quote(str(folder))}; use_environment demo torch; echo ${{PYTHON##*/}}"
    return bash(code, check=False, PATH=path, **environment)


@pytest.mark.parametrize(
    "pythons, chosen",
    [
        ({"python": NEW, "python3": NEW, "python3.11": NEW, "python3.13": NEW}, "python3.13"),
        ({"python3": NEW, "python3.12": NEW, "python3.13": OLD, "python3.14": NO_VENV}, "python3.12"),
        ({"python": NEW, "python3": OLD, "python3.10": NEW}, "python"),
    ],
)
def test_the_newest_python_makes_the_environment(pythons, chosen, tmp_path):
    assert f"installing this checkout into .venv\n{chosen} makes it\n" == chosen_python(tmp_path, pythons).stdout


def test_a_python_that_has_this_checkout_or_is_named_comes_first(tmp_path):
    pythons = {"python": OLD, "python3": OURS, "python3.13": NEW, "python3.12": NEW}
    assert chosen_python(tmp_path, pythons).stdout == "python3\n"
    again = tmp_path / "again"
    again.mkdir()
    done = chosen_python(again, pythons, PYTHON="python3.12")
    assert done.stdout == "installing this checkout into .venv\npython3.12 makes it\n"


def test_no_python_is_one_line(tmp_path):
    done = chosen_python(tmp_path, {"python3": NO_VENV, "python3.10": NEW})
    assert done.returncode == 2
    assert done.stderr.startswith("error: no Python 3.") and done.stderr.count("\n") == 1
    again = tmp_path / "again"
    again.mkdir()
    done = chosen_python(again, {"python3": NEW, "mine": OLD}, PYTHON="mine")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: PYTHON=mine, expected a Python 3.") and done.stderr.count("\n") == 1


def test_this_checkout_is_told_from_another_llava(tmp_path):
    (tmp_path / "llava").mkdir()
    (tmp_path / "llava/__init__.py").touch()
    python = shlex.quote(sys.executable)
    bash(f"has_checkout {python}", PYTHONPATH=str(ROOT))
    assert bash(f"has_checkout {python}", check=False, PYTHONPATH=str(tmp_path)).returncode == 1
    assert bash(f"has_checkout {python} no_such_module", check=False, PYTHONPATH=str(ROOT)).returncode == 1


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "scripts").glob("*.sh")))
def test_help(script, tmp_path):
    """Nothing is looked for, installed or run for it: `python` would say so."""
    for name in ("python", "python3", "pip"):
        (tmp_path / name).write_text("#!/bin/sh\necho called >&2\n")
        (tmp_path / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for flag in ("--help", "-h"):
        done = subprocess.run(
            ["bash", str(ROOT / "scripts" / script), flag], capture_output=True, text=True, env=env, cwd=tmp_path
        )
        assert done.returncode == 0 and not done.stderr
        assert done.stdout.startswith("usage: ") and f" scripts/{script}" in done.stdout


def test_words_that_are_no_arguments_are_told():
    script = str(ROOT / "scripts/test_lmms_eval.sh")
    done = subprocess.run(["bash", script, "--no-such-flag"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--no-such-flag" in done.stderr
    long = [sys.executable, str(ROOT / "scripts/test_long.py"), "--check"]
    done = subprocess.run([*long, "--no_such_key", "1"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no_such_key" in done.stderr
    assert subprocess.run([*long, "--max_steps", "3"], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    "environment, shown",
    [
        ({}, "0"),
        ({"CUDA_VISIBLE_DEVICES": "2,3"}, "2,3"),
        ({"CUDA_VISIBLE_DEVICES": ""}, ""),
        ({"NUM_GPUS": "8"}, "not set"),
        ({"NUM_PROCS": "2"}, "not set"),
    ],
)
def test_the_demo_takes_one_device_unless_told_otherwise(environment, shown):
    code = 'use_environment() { echo "${CUDA_VISIBLE_DEVICES-not set}"; exit; }; demo_recipe demo'
    assert bash(code, **environment).stdout == f"{shown}\n"
