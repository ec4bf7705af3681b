"""How a run holds its optimizer's state, and which checkpoints go on in which runs.

| written by          | read by          | what is carried                                                         |
|---------------------|------------------|-------------------------------------------------------------------------|
| one process, or DDP | either of them   | all: their files do not depend on the number                            |
| ZeRO-N              | as many, ZeRO-N  | all, by DeepSpeed itself; one of the two may offload                    |
| ZeRO-1, 2, 3        | ZeRO-1, 2, 3     | float32 weights, Adam's moments and step, fp16's loss scale             |
| ZeRO-1, 2, 3        | one, or DDP      | float32 weights, Adam's moments and step                                |
| one process, or DDP | ZeRO-1, 2, 3     | float32 weights, Adam's moments and step                                |

The last three by a converted copy (see `llava.train.carrying`).
"""

import glob
import os
from dataclasses import dataclass

from llava.errors import LlavaError
from llava.train.resume import check_own, read_json

_ADAM = ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_apex_fused")
_FSDP = ("pytorch_model_fsdp*", "optimizer_*")


@dataclass(frozen=True)
class Kind:
    """How a run holds its optimizer's state.

    Attributes:
        processes: how many; None: unknown.
        zero: DeepSpeed's stage; None: without DeepSpeed.
        fsdp: under FSDP.
    """

    processes: int | None
    zero: int | None = None
    fsdp: bool = False

    def __str__(self) -> str:
        count = "an unknown number of processes" if self.processes is None else f"{self.processes} processes"
        count = "1 process" if self.processes == 1 else count
        if self.fsdp:
            return f"{count} under FSDP"
        return count if self.zero is None else f"{count} under ZeRO-{self.zero}"


def kind_of_checkpoint(checkpoint: str, now: Kind) -> Kind:
    """What wrote a checkpoint: from its manifest, else from the names of its files; ZeRO-1 and 2 are then taken for the
    one that `now` has."""
    found = {pattern: files_of(checkpoint, pattern) for pattern in (*_FSDP, "rng_state_*.pth", "rng_state.pth")}
    manifest = read_json(checkpoint, "manifest.json") or {}
    processes = manifest.get("world_size") or len(found["rng_state_*.pth"]) or len(found["rng_state.pth"]) or None
    if any(found[pattern] for pattern in _FSDP):
        return Kind(processes, fsdp=True)
    states = files_of(checkpoint, "global_step*/*zero_pp_rank_*_optim_states.pt")
    if manifest.get("deepspeed") is not None:
        return Kind(processes, manifest["deepspeed"])
    if states:
        three = bool(files_of(checkpoint, "global_step*/zero_pp_rank_*_model_states.pt"))
        return Kind(len(states), 3 if three else now.zero if now.zero in (1, 2) else 2)
    return Kind(processes, 0 if files_of(checkpoint, "global_step*") else None)


def kind_of_run(training_args) -> Kind:
    config = getattr(training_args, "hf_deepspeed_config", None)
    zero = None if not training_args.deepspeed else config.get_value("zero_optimization.stage", 0)
    return Kind(training_args.world_size, zero, bool(training_args.fsdp))


def must_convert(before: Kind, now: Kind) -> bool:
    """Whether the optimizer's state lies otherwise than the run reads it."""
    return before.zero != now.zero or (bool(now.zero) and before.processes != now.processes)


def check_carried(checkpoint: str, training_args) -> None:
    """Refuse a checkpoint whose state this run cannot take up; nothing of it is read but names.

    Raises:
        LlavaError: what stands against it, with what wrote the checkpoint and what this run is.
    """
    now = kind_of_run(training_args)
    before = kind_of_checkpoint(checkpoint, now)
    if before.zero is not None and now.zero is not None:
        check_own(checkpoint, training_args.output_dir)
    if not must_convert(before, now) and before.fsdp == now.fsdp:
        return
    against = None
    if before.fsdp or now.fsdp:
        against = "FSDP's checkpoints go on under FSDP alone"
    elif 0 in (before.zero, now.zero):
        against = "stage 0 of DeepSpeed keeps the optimizer's state in a form of its own"
    elif now.zero is None:
        if not any(files_of(checkpoint, pattern) for pattern in ("model*.safetensors", "adapter_model.*")):
            against = "it holds no consolidated weights (stage3_gather_16bit_weights_on_model_save)"
    elif _on_disk(training_args):
        against = "with the optimizer's state on NVMe it cannot be converted"
    elif not is_adam(training_args):
        against = f"of optimizers, Adam's state alone can be converted (optim is {training_args.run_config['optim']})"
    if against:
        raise LlavaError(
            f"{checkpoint}: was written by {before}, this run has {now}: {against}; expected {before}, another "
            "output_dir for a run that starts from its weights (model_name_or_path), or --overwrite_output_dir"
        )


def is_adam(training_args) -> bool:
    """Whether a run's optimizer has Adam's state, which alone can be converted."""
    own = training_args.hf_deepspeed_config.get_value("optimizer.type") if training_args.deepspeed else None
    return str(own).lower() in ("adam", "adamw") if own else training_args.run_config["optim"] in _ADAM


def _on_disk(training_args) -> bool:
    return training_args.hf_deepspeed_config.get_value("zero_optimization.offload_optimizer.device") == "nvme"


def files_of(folder: str, pattern: str) -> list[str]:
    """Paths in a folder whose own name may hold anything."""
    return glob.glob(os.path.join(glob.escape(folder), pattern))
