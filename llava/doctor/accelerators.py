"""PyTorch, its devices, attention kernels and DeepSpeed, each tried in a process of its own."""

from __future__ import annotations

import os
import re
import shutil

from llava.doctor.children import cpu_deepspeed, each, run
from llava.doctor.rows import BROKEN, MISSING, NOTE, OK, Row, gibibytes
from llava.doctor.versions import ROOT, installed

_TORCH = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    usable, count = torch.cuda.is_available(), torch.cuda.device_count()
x = torch.randn(64, 64, requires_grad=True)
(x @ x).sum().backward()
devices = []
for i in range(count if usable else 0):
    facts = torch.cuda.get_device_properties(i)
    try:
        free = torch.cuda.mem_get_info(i)[0]
        y = torch.randn(64, 64, device=f"cuda:{i}", dtype=torch.bfloat16)
        (y @ y).sum().item()
        error = None
    except Exception as fault:
        free, error = 0, str(fault).splitlines()[0]
    devices.append([facts.name, facts.total_memory, free, f"{facts.major}.{facts.minor}", error])
print("\\n\\x1e" + json.dumps({
    "version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip,
    "usable": usable, "count": count,
    "devices": devices, "finite": bool(x.grad.isfinite().all()), "threads": torch.get_num_threads(),
    "mps": torch.backends.mps.is_available(),
    "warnings": [str(item.message).splitlines()[0] for item in caught if "CUDA" in str(item.message)],
}))
"""

_ATTENTION = """
import torch
def attempt(name):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    half = torch.bfloat16 if device == "cuda" else torch.float32
    q = torch.randn(2, 4, 16, 64, device=device, dtype=half, requires_grad=True)
    truth = torch.softmax(q.float() @ q.float().transpose(-1, -2) / 8, -1) @ q.float()
    if name == "eager":
        out = torch.softmax(q @ q.transpose(-1, -2) / 8, -1) @ q
    elif name == "sdpa":
        out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    elif name == "flex_attention":
        from torch.nn.attention.flex_attention import flex_attention
        out = flex_attention(q, q, q)
    elif name == "flash_attention_2":
        from flash_attn import flash_attn_func
        out = flash_attn_func(*[q.transpose(1, 2)] * 3).transpose(1, 2)
    else:
        from llavavit.varlen_attention import pack_lengths, varlen_attention
        rows = q.transpose(1, 2).flatten(0, 1)
        lengths, longest = pack_lengths([16, 16], device)
        out = varlen_attention(rows, rows, rows, lengths, longest).unflatten(0, (2, 16)).transpose(1, 2)
    out.float().sum().backward()
    return [float((out.float() - truth).abs().max()), bool(q.grad.isfinite().all())]
"""

_DEEPSPEED = """
import json
import deepspeed
from deepspeed.accelerator import get_accelerator
accelerator = get_accelerator()
found = {"accelerator": accelerator.device_name(), "backend": accelerator.communication_backend_name()}
print("\\n\\x1e" + json.dumps(found))
"""
_INSTALL_TORCH = "pip install -c constraints.txt -e . (a CUDA build: pytorch.org says which fits this driver)"


def torch_rows(seconds: float) -> list[Row]:
    """Of PyTorch on the CPU, which is needed, and of its GPUs."""
    if installed("torch") is None:
        return [Row("PyTorch runs", MISSING, "torch is not installed", _INSTALL_TORCH, needed=True)]
    answers, ended = run(_TORCH, seconds=seconds)
    if not answers:
        todo = "install it anew: pip install --force-reinstall -c constraints.txt torch"
        return [Row("PyTorch runs", BROKEN, ended or "no answer", todo, needed=True)]
    found = answers[0]
    build = f"CUDA {found['cuda']}" if found["cuda"] else f"ROCm {found['hip']}" if found["hip"] else "CPU"
    status = OK if found["finite"] else BROKEN
    said = f"torch {found['version']} ({build} build), {found['threads']} threads"
    rows = [Row("PyTorch runs", status, said, "" if found["finite"] else "a gradient is not finite", needed=True)]
    return rows + _devices(found)


def _devices(found: dict) -> list[Row]:
    driver = _driver()
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if hidden and driver:
        return [Row("GPU", NOTE, f"driver {driver}, hidden by CUDA_VISIBLE_DEVICES", "unset CUDA_VISIBLE_DEVICES")]
    if not found["usable"]:
        if driver and not found["cuda"]:
            todo = "install a CUDA build of torch (pytorch.org says which)"
            return [Row("GPU", BROKEN, f"driver {driver}, but torch {found['version']} is a CPU build", todo)]
        if driver or (found["count"] and not hidden):
            why = found["warnings"][0] if found["warnings"] else "no reason told"
            todo = "install a newer driver, or a torch for this one; in a container: --gpus all"
            return [
                Row("GPU", BROKEN, f"driver {driver or 'unknown'}, which CUDA {found['cuda']} cannot use: {why}", todo)
            ]
        if found["mps"]:
            return [Row("GPU", NOTE, "an Apple GPU (mps): runs may use it, untested")]
        return [Row("GPU", MISSING, "none: runs are on the CPU", "the demos need none; for real runs a CUDA GPU")]
    rows = []
    for number, (name, total, free, capability, error) in enumerate(found["devices"]):
        said = f"{name}, {gibibytes(free)} free of {gibibytes(total)}, compute capability {capability}, driver {driver}"
        if error:
            rows.append(Row(f"GPU {number}", BROKEN, f"{said}: {error}", "nvidia-smi; a torch that knows this GPU"))
        elif free < total / 2:
            rows.append(Row(f"GPU {number}", NOTE, said, "another program holds its memory: nvidia-smi says which"))
        else:
            rows.append(Row(f"GPU {number}", OK, said))
    return rows


def _driver() -> str:
    for path in ("/proc/driver/nvidia/version", "/sys/module/nvidia/version"):
        try:
            with open(path, encoding="utf-8") as file:
                match = re.search(r"\b\d{3}\.\d[\d.]*", file.read())
        except OSError:
            continue
        if match:
            return match.group()
    return "unknown" if any(map(os.path.exists, ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg"))) else ""


def attention_rows(seconds: float, on_gpu: bool) -> list[Row]:
    """Of each attention that `attn_implementation` can name: the numbers of a small tensor, forward and backward."""
    flash = installed("flash-attn")
    names = ["eager", "sdpa", "varlen", *(["flex_attention"] if on_gpu else [])]
    if flash is not None:
        names.append("flash_attention_2")
    path = os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))
    tried = each(_ATTENTION, names, seconds, PYTHONPATH=path)
    rows = [_attention(name, *tried[name], on_gpu) for name in names]
    if flash is None:
        todo = "pip install flash-attn --no-build-isolation, on CUDA; sdpa and varlen take its place"
        rows.append(Row("attention flash_attention_2", MISSING, "flash-attn is not installed", todo))
    return rows


def _attention(name: str, found, fault: str | None, on_gpu: bool) -> Row:
    label, needed, where = f"attention {name}", name == "sdpa", "the GPU" if on_gpu else "the CPU"
    if fault:
        todo = f"attn_implementation {'eager' if name == 'sdpa' else 'sdpa'} in its place"
        if name == "flash_attention_2":
            todo += "; a flash-attn built for this torch and a GPU, or pip uninstall flash-attn"
        return Row(label, BROKEN, fault, todo, needed)
    error, finite = found
    if not finite or error > (0.05 if on_gpu else 1e-4):
        return Row(label, BROKEN, f"off by {error:.1e} on {where}", "do not use it here: its numbers are wrong", needed)
    return Row(label, OK, f"right on {where}", needed=needed)


def deepspeed_rows(seconds: float, on_gpu: bool) -> list[Row]:
    """Of DeepSpeed, and of what its own operators are built with."""
    version = installed("deepspeed")
    if version is None:
        return [Row("DeepSpeed", MISSING, "not installed", "pip install -c constraints.txt -e '.[train]', for ZeRO")]
    answers, ended = run(_DEEPSPEED, seconds=seconds, **cpu_deepspeed())
    if not answers:
        todo = "install it anew, in this torch's version; runs without the key deepspeed need none"
        return [Row("DeepSpeed", BROKEN, f"{version}: {ended or 'no answer'}", todo)]
    said = f"{version}, accelerator {answers[0]['accelerator']}, {answers[0]['backend']}"
    rows = [Row("DeepSpeed", OK, said)]
    if on_gpu and answers[0]["accelerator"] == "cpu":
        rows[0] = Row("DeepSpeed", NOTE, said, "unset DS_ACCELERATOR to use the GPU")
    nvcc = shutil.which("nvcc") or _nvcc_of(os.environ.get("CUDA_HOME") or "/usr/local/cuda")
    if on_gpu:
        todo = "install the CUDA toolkit of torch's version and set CUDA_HOME, for DeepSpeed's fused optimizers"
        rows.append(Row("nvcc", OK if nvcc else MISSING, nvcc or "none", "" if nvcc else todo))
    ninja = shutil.which("ninja") or installed("ninja")
    rows.append(Row("ninja", OK if ninja else MISSING, str(ninja or "none"), "" if ninja else "pip install ninja"))
    return rows


def _nvcc_of(folder: str) -> str | None:
    path = os.path.join(folder, "bin", "nvcc")
    return path if os.path.isfile(path) else None
