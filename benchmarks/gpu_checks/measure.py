"""Time, memory and arithmetic: how the suite measures."""

import gc
import os
import platform
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from llava.train.peak_memory import PeakMemory  # noqa: F401 - the checks take it from here

ROOT = Path(__file__).resolve().parents[2]


def peak_tflops(device: str, override: float | None = None) -> float | None:
    """bf16 peak of the device in TFLOP/s: `override`, else by its name, else None."""
    from llava.train import flops

    if override is not None or device != "cuda":
        return override
    return flops.peak_tflops(torch.cuda.get_device_name())


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def free_memory(device: str) -> None:
    """Give back what no variable holds any more."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def step_seconds(step: Callable[[int], object], device: str, warmup: int, repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls `step(i)` after `warmup` calls; i counts up, to rotate among inputs.

    CUDA events around each call and one synchronisation at the end, so that the device never waits for the clock.
    """
    for i in range(warmup):
        step(i)
    synchronize(device)
    if device != "cuda":
        times = []
        for i in range(repeats):
            start = time.perf_counter()
            step(warmup + i)
            times.append(time.perf_counter() - start)
        return times
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for i, (start, end) in enumerate(pairs):
        start.record()
        step(warmup + i)
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1000 for start, end in pairs]


def waits_of(step: Callable[[], object]) -> str:
    """Where the host waits for the CUDA device in a step, which runs twice before: a first call may set up what waits.
    "" where it never does."""
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        lines = traceback.extract_tb(error.__traceback__)
        where = f"{Path(lines[-1].filename).name}:{lines[-1].lineno}"
        ours = [line for line in lines if Path(line.filename).is_relative_to(ROOT)][-1]
        return f"{where}, from {Path(ours.filename).name}:{ours.lineno}: " + " ".join(str(error).split())[:200]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def spread(seconds: list[float], name: str = "") -> dict[str, float]:
    """Median, least and most of the times in milliseconds, as figures."""
    return {
        f"{name}ms": round(statistics.median(seconds) * 1000, 3),
        f"{name}ms_min": round(min(seconds) * 1000, 3),
        f"{name}ms_max": round(max(seconds) * 1000, 3),
    }


def hardware(device: str) -> dict:
    """The machine in words and numbers."""
    found = {
        "device": device,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),  # what else ran when the suite began
        "platform": platform.platform(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.is_file() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def ceilings(device: str, small: bool) -> dict[str, float]:
    """What this device reaches, on random data: a large copy (bytes read and written) and a matrix product."""
    size, side, dtype = (2**24, 512, torch.float32) if small else (2**30, 8192, torch.bfloat16)
    name = f"matmul_{side}_{str(dtype).removeprefix('torch.')}_tflops"
    found = {"copy_gb_per_s": _copy_rate(device, size) / 1e9, name: _matmul_rate(device, side, dtype) / 1e12}
    free_memory(device)
    return found


def _copy_rate(device: str, size: int) -> float:
    source = torch.randn(size, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    return 4 * size / statistics.median(step_seconds(lambda _: target.copy_(source), device, 3, 10))


def _matmul_rate(device: str, side: int, dtype: torch.dtype) -> float:
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    return 2 * side**3 / statistics.median(step_seconds(lambda _: a @ b, device, 3, 10))
