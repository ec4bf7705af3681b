"""Packed training steps with the kernels that a run may ask for: as right as without them, and how fast."""

import importlib.util
from contextlib import nullcontext

from gpu_checks.packing import EXACT, distance, gradients, make_ways, measure, samples_of, set_checkpointing, speed_case
from gpu_checks.registry import Context, Result, check


def kernels(change, context: Context, result: Result) -> None:
    """Packed steps of a model that `change` has put faster kernels into: as right as without, then the figures."""
    if context.device != "cuda":
        result.test("left out", True, "training puts them in on CUDA alone")
        return
    way = make_ways(context, "demo", "demo")["packed"]
    samples = samples_of(way.model, 8)
    plain = gradients(way, samples, nullcontext())
    change(way.model)
    loss, worst = distance(gradients(way, samples, nullcontext()), plain)
    result.below("float32", loss=(loss, EXACT), gradients=(worst, EXACT))
    ways, sets, shape = speed_case(context)
    change(ways["packed"].model)
    for checkpointing in (True, False):
        set_checkpointing(ways["packed"].model, checkpointing)
        label = f"{shape}, checkpointing {'on' if checkpointing else 'off'}, packed"
        result.figure(label, **measure(ways["packed"], sets, context))


@check("compiled_blocks")
def compiled_blocks(context: Context, result: Result):
    """Packed steps with `torch_compile`: loss and gradients as without it; samples/s, memory, utilisation."""
    from llava.model.compiled_blocks import compile_blocks

    kernels(compile_blocks, context, result)


@check("liger")
def liger(context: Context, result: Result):
    """The same with `use_liger_kernel`, where liger_kernel is installed; it stays in the process."""
    from llava.model.liger import apply_liger

    if importlib.util.find_spec("liger_kernel") is None:
        result.test("left out", True, "liger_kernel is not installed")
    else:
        kernels(apply_liger, context, result)
