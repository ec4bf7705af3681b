"""scripts/common.sh: which command starts a run, which Python is used, how the demo's flags are read."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRAIN = str(ROOT / "llava/train/train_mem.py")


def bash(code: str, check: bool = True, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Run `code` after sourcing common.sh, with only PATH, HOME and `environment`."""
    variables = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **environment}
    script = f"set -euo pipefail; source {shlex.quote(str(ROOT / 'scripts/common.sh'))}\n{code}"
    done = subprocess.run(["bash", "-c", script], env=variables, cwd=cwd, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr
    return done


def launched(devices: int, **environment: str) -> list[str]:
    """Environment and words of the command that `launch c.yaml --seed 1` runs where PyTorch sees `devices`."""
    code = f"""
    cuda_devices() {{ echo {devices}; }}
    show() {{ echo "${{CUDA_VISIBLE_DEVICES-}}|${{DS_ACCELERATOR-}}|${{RANK-}}|$*"; }}
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


def test_deepspeed_launcher():
    variables = {"LAUNCHER": "deepspeed", "NNODES": "2", "ADDR": "host", "PORT": "5", "HOSTFILE": "hosts"}
    where = "--num_gpus 8 --num_nodes 2 --hostfile hosts --master_addr host --master_port 5"
    assert launched(8, **variables)[-1] == f"-m deepspeed.launcher.runner {where} {TRAIN} c.yaml --seed 1"


def test_many_gpus_without_cuda_is_an_error():
    done = bash("cuda_devices() { echo 0; }; PYTHON=echo launch c.yaml", check=False, NUM_GPUS="8")
    assert done.returncode == 2
    assert done.stderr == "error: NUM_GPUS=8, but there is no CUDA device; NUM_PROCS=N runs N processes on the CPU\n"


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


@pytest.mark.parametrize("script", ["finetune.sh", "pretrain.sh"])
def test_help(script):
    done = subprocess.run(["bash", str(ROOT / "scripts" / script), "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: bash scripts/{script}")


def test_demo_flags(tmp_path):
    show = """; echo "$OUTPUT|$OVERWRITE|$SEED|${OVERRIDES[*]-}|$PWD" """
    flags = "--output_dir=out --tower configs/towers/x.yaml --overwrite --seed 3 --max_steps 4"
    assert bash(f"read_demo_flags {flags}{show}", cwd=tmp_path).stdout.strip().split("|") == [
        str(tmp_path / "out"),
        "yes",
        "3",
        "--tower configs/towers/x.yaml --seed 3 --max_steps 4",
        str(ROOT),
    ]
    assert bash(f"read_demo_flags{show}").stdout.strip().split("|") == ["checkpoints/demo", "no", "0", "", str(ROOT)]


def test_a_finished_demo_is_told_in_one_line(tmp_path):
    (tmp_path / "finetune").mkdir()
    for name in ("eval.json", "report.png"):
        (tmp_path / "finetune" / name).touch()
    command = ["bash", str(ROOT / "scripts/finetune.sh"), "--output_dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout == f"{tmp_path}/finetune: the demo is finished; run with --overwrite to train it again\n"
