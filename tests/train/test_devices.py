"""Which GPUs a run refuses before anything is loaded. PyTorch's answers are stubbed: no GPU is needed."""

import os
import sys
import warnings

import pytest

torch = pytest.importorskip("torch")

from llava.config import resolve  # noqa: E402
from llava.errors import LlavaError  # noqa: E402
from llava.train import devices, train, train_qwen2_vl, train_toconv  # noqa: E402
from llava.train.arguments import _fall_back  # noqa: E402

TOO_OLD = (
    "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040). Please update your GPU "
    "driver by downloading and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx "
    "(Triggered internally at /pytorch/c10/cuda/CUDAFunctions.cpp:109.)"
)
NOT_YET = (
    "CUDA initialization: Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling "
    "NumCudaDevices() that might have already set an error? Error 802: system not yet initialized (Triggered "
    "internally at /pytorch/c10/cuda/CUDAFunctions.cpp:109.)"
)
DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01  Wed Oct 27 21:21:55 UTC 2021\nGCC version: 11.4\n"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Sets what PyTorch says of the GPUs, and the driver's file."""
    for name in ("LOCAL_RANK", "WORLD_SIZE", "RANK", "CUDA_VISIBLE_DEVICES", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(devices, "DRIVER_FILE", tmp_path / "version")

    def is_available(usable, warning):
        if warning:
            warnings.warn(warning, stacklevel=2)
        return usable

    def set_up(count: int, usable: bool, warning: str = "", driver: str = DRIVER):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: is_available(usable, warning))
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        if driver:
            devices.DRIVER_FILE.write_text(driver)

    return set_up


def refused(main, capsys, *argv) -> str:
    """The one line with which a program ends before it reads its data or a model, without any warning beside it."""
    with warnings.catch_warnings(), pytest.raises(SystemExit) as end:
        warnings.simplefilter("error")
        main([*argv])
    shown = capsys.readouterr()
    assert (end.value.code, shown.out) == (2, "")
    assert shown.err.startswith("error: found ") and shown.err.count("\n") == 1
    return shown.err


@pytest.mark.parametrize("main", [train.train, train_qwen2_vl.train])
def test_several_gpus_need_a_launcher(main, machine, monkeypatch, capsys):
    machine(8, True)
    monkeypatch.setattr(sys, "argv", ["llava/train/train_mem.py"])
    argv = ["--model_name_or_path", "no such", "--output_dir", "out"]
    line = refused(main, capsys, *argv)
    command = "torchrun --nproc_per_node 8 llava/train/train_mem.py --model_name_or_path 'no such' --output_dir out"
    assert line.endswith(f" CUDA_VISIBLE_DEVICES=0 for one GPU, or type: {command}\n")
    monkeypatch.setenv(
        "WORLD_SIZE", "2"
    )  # of a cluster's nodes, not a launcher's: transformers looks at LOCAL_RANK alone
    assert refused(main, capsys, *argv) == line


def test_one_of_the_visible_gpus_is_proposed(machine, monkeypatch):
    machine(2, True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-b,GPU-a")
    with pytest.raises(LlavaError, match="CUDA_VISIBLE_DEVICES=GPU-b for one GPU"):
        devices.check_devices(False, [])


def test_what_trains_on_one_gpu_each_is_not_refused(machine, monkeypatch):
    machine(8, True)
    devices.check_devices(True, [])  # on the CPU
    monkeypatch.setenv("LOCAL_RANK", "0")
    devices.check_devices(False, [])
    monkeypatch.delenv("LOCAL_RANK")
    machine(1, True)
    devices.check_devices(False, [])
    machine(0, False)
    devices.check_devices(False, [])


@pytest.mark.parametrize(
    "warning, reason", [(TOO_OLD, "(found version 11040)"), (NOT_YET, "system not yet initialized")]
)
@pytest.mark.parametrize("rank", [None, "3"])
def test_gpus_that_pytorch_cannot_use(warning, reason, rank, machine, monkeypatch, capsys):
    machine(8, False, warning)
    if rank:
        monkeypatch.setenv("LOCAL_RANK", rank)
    line = refused(train.train, capsys, "--output_dir", "out")
    found, expected = line.split("; expected ")
    assert f"found 8 GPUs with driver 470.82.01, of which torch {torch.__version__} (CUDA 13.0) can use none" in found
    assert found.endswith(reason) and "Triggered" not in line
    assert expected == "a newer driver, or a torch wheel for this one; to run on the CPU: --use_cpu true\n"
    devices.check_devices(True, [])


def test_other_programs_name_their_own_way_to_the_cpu(machine, monkeypatch, capsys, tmp_path):
    machine(8, False, TOO_OLD, driver="")
    assert "driver unknown" in refused(lambda argv: devices.main([]), capsys)
    argv = ["--vision_tower", "none", "--image_folder", str(tmp_path), "--output_dir", str(tmp_path)]
    assert refused(train_toconv.main, capsys, *argv).endswith(": ACCELERATE_USE_CPU=true\n")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(SystemExit):
        train_toconv.main(argv)
    assert "GPUs" not in capsys.readouterr().err


def test_a_driver_is_told_by_its_file_where_pytorch_cannot_count(machine, monkeypatch, recwarn):
    machine(0, False, TOO_OLD)  # a container without NVML
    with pytest.raises(LlavaError, match=r"found some GPUs with driver 470\.82\.01"):
        devices.usable_devices("")
    machine(0, False, "CUDA initialization: ...")
    devices.DRIVER_FILE.unlink()  # CUDA's library without a GPU
    assert devices.usable_devices("") == 0
    machine(0, False, "Can't initialize NVML")
    assert devices.usable_devices("") == 0
    machine(0, False, TOO_OLD)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # asked for the CPU
    assert devices.usable_devices("") == 0
    assert not recwarn.list


def test_the_scripts_are_told_how_many_there_are(machine, capsys):
    machine(4, True)
    devices.main([])
    assert capsys.readouterr().out == "4\n"


def test_deepspeed_in_one_process_needs_no_launcher_on_a_gpu(machine, monkeypatch):
    machine(1, True)
    for name in ("LOCAL_RANK", "WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "")  # so that all of them are put back after the test
        monkeypatch.delenv(name)
    values = {"deepspeed": "scripts/zero2.json"}
    _fall_back(values, resolve(["--deepspeed", "scripts/zero2.json"]))
    assert "use_cpu" not in values and "DS_ACCELERATOR" not in os.environ
    assert [os.environ.get(name) for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE")] == ["0", "0", "1"]
