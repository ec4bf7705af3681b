"""A checkpoint goes on with another number of processes, or under another way of splitting the optimizer's state.

| written by          | read by          | what is carried                                                         |
|---------------------|------------------|-------------------------------------------------------------------------|
| one process, or DDP | either of them   | all: their files do not depend on the number                            |
| ZeRO-N              | as many, ZeRO-N  | all, by DeepSpeed itself; one of the two may offload                    |
| ZeRO-1, 2, 3        | ZeRO-1, 2, 3     | float32 weights, Adam's moments and step, fp16's loss scale             |
| ZeRO-1, 2, 3        | one, or DDP      | float32 weights, Adam's moments and step                                |
| one process, or DDP | ZeRO-1, 2, 3     | float32 weights, Adam's moments and step                                |

The last three by a converted copy beside the checkpoint (see `llava.train.universal`), which rank 0 makes when the
model has been built and which is removed when it has been read. Learning rates and Adam's other numbers are this run's.
"""

import contextlib
import glob
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llava.errors import LlavaError
from llava.train.resume import check_own, read_json
from llava.train.schedule import SCHEDULER_NAME, optimizer_file
from llava.train.universal import MOMENTS, Universal
from llava.utils import is_rank0, rank0_print

_ADAM = ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_apex_fused")
_PROGRESS = 30  # seconds between two lines
_FSDP = ("pytorch_model_fsdp*", "optimizer_*")
_waits = 0


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
    found = {pattern: _files(checkpoint, pattern) for pattern in (*_FSDP, "rng_state_*.pth", "rng_state.pth")}
    manifest = read_json(checkpoint, "manifest.json") or {}
    processes = manifest.get("world_size") or len(found["rng_state_*.pth"]) or len(found["rng_state.pth"]) or None
    if any(found[pattern] for pattern in _FSDP):
        return Kind(processes, fsdp=True)
    states = _files(checkpoint, "global_step*/*zero_pp_rank_*_optim_states.pt")
    if manifest.get("deepspeed") is not None:
        return Kind(processes, manifest["deepspeed"])
    if states:
        three = bool(_files(checkpoint, "global_step*/zero_pp_rank_*_model_states.pt"))
        return Kind(len(states), 3 if three else now.zero if now.zero in (1, 2) else 2)
    return Kind(processes, 0 if _files(checkpoint, "global_step*") else None)


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
        if not any(_files(checkpoint, pattern) for pattern in ("model*.safetensors", "adapter_model.*")):
            against = "it holds no consolidated weights (stage3_gather_16bit_weights_on_model_save)"
    elif _on_disk(training_args):
        against = "with the optimizer's state on NVMe it cannot be converted"
    elif not _is_adam(training_args):
        against = f"of optimizers, Adam's state alone can be converted (optim is {training_args.run_config['optim']})"
    if against:
        raise LlavaError(
            f"{checkpoint}: was written by {before}, this run has {now}: {against}; expected {before}, another "
            "output_dir for a run that starts from its weights (model_name_or_path), or --overwrite_output_dir"
        )


def _is_adam(training_args) -> bool:
    own = training_args.hf_deepspeed_config.get_value("optimizer.type") if training_args.deepspeed else None
    return str(own).lower() in ("adam", "adamw") if own else training_args.run_config["optim"] in _ADAM


def _on_disk(training_args) -> bool:
    return training_args.hf_deepspeed_config.get_value("zero_optimization.offload_optimizer.device") == "nvme"


def _files(folder: str, pattern: str) -> list[str]:
    return glob.glob(os.path.join(glob.escape(folder), pattern))


# --- the copy ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def readable_state(trainer, checkpoint: str | None) -> Iterator[str | None]:
    """The folder that a run reads its optimizer's state from: the checkpoint itself, or a converted copy that exists
    inside this context. Every rank must enter it, with a model that nothing wraps yet.

    Args:
        trainer: an `LLaVATrainer`.
        checkpoint: that the run goes on from; None: from none.

    Raises:
        LlavaError: the copy could not be made, as with a full disk.
    """
    args = trainer.args
    if is_rank0():
        remove_copies(args.output_dir)
    now = kind_of_run(args)
    before = now if checkpoint is None else kind_of_checkpoint(checkpoint, now)
    if checkpoint is None or not must_convert(before, now) or _not_carried(checkpoint, before, now, args):
        yield checkpoint
    else:
        with _copy(trainer, checkpoint, before, now) as copy, _universal(trainer, now):
            yield str(copy.folder)
            if now.zero is None:
                _take_weights(trainer, copy)
    if checkpoint is not None and now.zero:
        _fit_steps(trainer.model_wrapped)


def remove_copies(out: str) -> None:
    """Remove what a run that was killed has left."""
    for path in Path(out).glob(".universal-*"):
        shutil.rmtree(path, ignore_errors=True)


def _not_carried(checkpoint: str, before: Kind, now: Kind, args) -> bool:
    """Whether a run without DeepSpeed leaves ZeRO's state where it is; told why."""
    if now.zero is not None:
        return False
    from importlib.util import find_spec

    why = None
    if Path(args.output_dir).resolve() not in Path(checkpoint).resolve().parents:
        why = "it is a pickle outside of output_dir"
    elif not _is_adam(args):
        why = f"it is not Adam's ({args.run_config['optim']})"
    elif find_spec("deepspeed") is None:
        why = "the package deepspeed is not installed"
    if why:
        rank0_print(f"{checkpoint}: was written by {before}, this run has {now}: its optimizer's state is left: {why}")
    return bool(why)


@contextlib.contextmanager
def _copy(trainer, checkpoint: str, before: Kind, now: Kind) -> Iterator[Universal]:
    args, step = trainer.args, trainer.state.global_step
    folder = Path(args.output_dir) / f".universal-{step}"
    written = folder.with_name(f"{folder.name}.tmp")
    rank0_print(f"{checkpoint}: was written by {before}, this run has {now}: the optimizer's state is converted")
    start, copy = time.monotonic(), Universal(written, step)

    def make():
        written.mkdir(parents=True)
        if before.zero is None:
            _split(trainer, checkpoint, copy)
        else:
            _run_conversion(checkpoint, written)
        for name in (SCHEDULER_NAME, "scaler.pt"):
            if os.path.isfile(os.path.join(checkpoint, name)):
                shutil.copy(os.path.join(checkpoint, name), written)
        if now.zero is None:
            _join(trainer, copy)

    try:
        _first(lambda: _told(make, written, checkpoint, before))
        if now.zero is not None:
            _put_weights(trainer, checkpoint, copy, before)
        _first(lambda: written.rename(folder))
        yield Universal(folder, step)
        trainer.accelerator.wait_for_everyone()  # all have read it
        rank0_print(f"the optimizer's state of step {step} was taken up in {time.monotonic() - start:.1f} s")
    finally:
        if is_rank0():
            remove_copies(args.output_dir)


def _told(make: Callable[[], None], folder: Path, checkpoint: str, before: Kind) -> None:
    """Make a copy; what stops it is one line."""
    states = _files(checkpoint, "global_step*/*_optim_states.pt") or [optimizer_file(checkpoint)]
    size = sum(os.path.getsize(path) for path in states)
    needed = 2 * size  # DeepSpeed's parts lie beside their sum for a while; to plain ones come the weights
    if (free := shutil.disk_usage(folder.parent).free) < needed:
        raise LlavaError(
            f"{folder}: disk full: to convert the optimizer's state of {checkpoint} takes {needed / 1e9:.3g} GB, "
            f"{free / 1e9:.3g} GB are free; expected room for it, or {before}"
        )
    with _writing(folder, checkpoint, before):
        make()


@contextlib.contextmanager
def _writing(folder: Path, checkpoint: str, before: Kind) -> Iterator[None]:
    """What stops the writing of a copy is one line."""
    try:
        yield
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        said = " ".join(str(getattr(error, "stderr", None) or error).split())[-300:]
        full = "No space left" in said or "PytorchStreamWriter" in said or "inline_container" in said
        raise LlavaError(
            f"{folder}: {'disk full: ' if full else ''}the optimizer's state of {checkpoint} could not be converted "
            f"({said}); expected {'room for it, or ' if full else ''}{before}; the checkpoint is as it was"
        ) from error


def _run_conversion(checkpoint: str, folder: Path) -> None:
    """`universal.convert`, in a process of its own: it prints, takes memory, and works in the current folder."""
    command = [sys.executable, "-m", "llava.train.universal", os.path.abspath(checkpoint)]
    root = str(Path(__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    with open(folder / "log", "w+") as log:
        child = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log)
        try:
            while True:
                try:
                    status = child.wait(_PROGRESS)
                    break
                except subprocess.TimeoutExpired:
                    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
                    rank0_print(f"{folder.with_suffix('').name}: {size / 1e9:.3g} GB written")
        finally:
            child.kill()
        if status:
            log.seek(0)
            said = [line for line in log.read().splitlines() if line.strip()]
            raise subprocess.CalledProcessError(status, "conversion", stderr=said[-1] if said else f"exit {status}")


def _first(work: Callable[[], None]) -> None:
    """Rank 0 works while the others wait; not in a collective, which would end with ddp_timeout. All must call it.

    Raises:
        LlavaError: rank 0's, on every rank.
    """
    global _waits
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        work()
        return
    _waits += 1
    store, key = distributed.distributed_c10d._get_default_store(), f"llava/carrying/{_waits}"
    if not is_rank0():
        while not store.check([key]):
            time.sleep(0.1)
        if said := store.get(key).decode():
            raise LlavaError(said)
        return
    said = "rank 0 has failed"
    try:
        work()
        said = ""
    except LlavaError as error:
        said = str(error)
        raise
    finally:
        store.set(key, said)


# --- between the forms ------------------------------------------------------------------------------------------------


def _split(trainer, checkpoint: str, copy: Universal) -> None:
    """optimizer.pt -> a state by parameter; its weights come after."""
    import torch

    path = optimizer_file(checkpoint)
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    names, states = [name for name, _ in _in_order(trainer)], content["state"]
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in trainer.model.named_parameters()}
    trainer.optimizer = None  # DeepSpeed's is made anew
    for number, name in enumerate(names):
        state = states.get(number)
        if state is None or len(states) != len(names) or any(kind not in state for kind in (*MOMENTS, "step")):
            raise LlavaError(f"{path}: found the state of {len(states)} weights, expected Adam's of {len(names)}")
        if tuple(state[MOMENTS[0]].shape) != shapes[name]:
            found = tuple(state[MOMENTS[0]].shape)
            raise LlavaError(f"{path}: found {found} for {name}, expected {shapes[name]}: it is of another run")
        copy.put(name, "step", state["step"].clone())
        for kind in MOMENTS:
            copy.put(name, kind, state[kind].clone())
    counters = {"global_steps": trainer.state.global_step, "skipped_steps": 0, "lr_scheduler": {}}
    if os.path.isfile(schedule := os.path.join(checkpoint, SCHEDULER_NAME)):
        counters["lr_scheduler"] = torch.load(schedule, map_location="cpu", weights_only=True)
    counters["lr_scheduler"].setdefault("last_batch_iteration", trainer.state.global_step - 1)  # of DeepSpeed's own
    copy.finish(copy.get(names[0], "step"), {}, counters)


def _join(trainer, copy: Universal) -> None:
    """A state by parameter -> optimizer.pt."""
    import torch

    state = {}
    names = set(copy.names())
    for number, (name, parameter) in enumerate(_in_order(trainer)):
        if name not in names:
            raise LlavaError(f"{copy.zero}: found no state of {name}, expected that of all trained weights")
        state[number] = {kind: copy.get(name, kind).view(parameter.shape) for kind in MOMENTS}
        state[number]["step"] = torch.tensor(float(copy.get(name, "step")))
    groups = trainer.optimizer.state_dict()["param_groups"]
    torch.save({"state": state, "param_groups": groups}, copy.folder / "optimizer.pt")


def _in_order(trainer) -> list:
    """(name, parameter) as the optimizer of a run without DeepSpeed counts them."""
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    optimizer = trainer.create_optimizer()
    return [(names[parameter], parameter) for group in optimizer.param_groups for parameter in group["params"]]


def _put_weights(trainer, checkpoint: str, copy: Universal, before: Kind) -> None:
    """A checkpoint's consolidated weights: the trained ones into the copy, unless ZeRO's own are there; the frozen ones
    into the model, as DeepSpeed leaves them out. Every rank must call it."""
    from llava.model.checkpoint import assign

    model, lacking = trainer.model, set()
    parameters = dict(model.named_parameters())
    if before.zero is None:
        lacking = {name for name, parameter in parameters.items() if parameter.requires_grad}
    elif all(parameter.requires_grad for parameter in parameters.values()):
        return
    for name, value in _saved_weights(trainer, checkpoint):
        parameter = parameters.get(name)
        if parameter is not None and not parameter.requires_grad:
            assign(parameter, value())
        elif name in lacking:
            lacking.discard(name)
            if is_rank0():
                with _writing(copy.folder, checkpoint, before):
                    copy.put(name, "fp32", value().float())
    if lacking:
        raise LlavaError(f"{checkpoint}: holds no {min(lacking)}, expected all weights that the run trains")


def _saved_weights(trainer, checkpoint: str) -> Iterator[tuple[str, Callable]]:
    """(name, what gives the value) of the parameters whose weights lie in a checkpoint, under this model's names."""
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    from llava.model.lora import is_adapted, saved_lora

    if is_adapted(trainer.model):
        yield from saved_lora(trainer.model, checkpoint)
        return
    unset_hf_deepspeed_config()  # a family may load a model, whole
    try:
        yield from trainer.family.saved_weights(trainer.model, checkpoint)
    finally:
        set_hf_deepspeed_config(trainer.args.hf_deepspeed_config)


def _take_weights(trainer, copy: Universal) -> None:
    """ZeRO's float32 weights in place of the consolidated ones, which are of the run's half precision."""
    parameters = dict(trainer.model.named_parameters())
    for name in copy.names():
        parameters[name].data.copy_(copy.get(name, "fp32").view(parameters[name].shape))


@contextlib.contextmanager
def _universal(trainer, now: Kind) -> Iterator[None]:
    """DeepSpeed reads a universal checkpoint, this once."""
    if now.zero is None:
        yield
        return
    plugin = trainer.accelerator.state.deepspeed_plugin
    before = plugin.deepspeed_config.get("checkpoint")
    plugin.deepspeed_config["checkpoint"] = {**(before or {}), "load_universal": True}
    try:
        yield
    finally:
        del plugin.deepspeed_config["checkpoint"]
        if before is not None:
            plugin.deepspeed_config["checkpoint"] = before
        engine = trainer.model_wrapped
        if hasattr(engine, "load_universal_checkpoint"):
            engine._config.load_universal_checkpoint = False


def _fit_steps(engine) -> None:
    """Adam's step as the optimizer wants it, one for each of its weights: torch's a tensor, DeepSpeed's own (which
    offloading calls for) a number. A checkpoint may hold the other, or one for all."""
    import torch

    optimizer = engine.optimizer.optimizer
    own = type(optimizer).__module__.startswith("deepspeed.")
    on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
    for parameter, state in optimizer.state.items():
        if "step" in state:
            step = float(state["step"])
            device = parameter.device if on_device else "cpu"
            state["step"] = int(step) if own else torch.tensor(step, device=device)


# --- what is each process's own ---------------------------------------------------------------------------------------


def draw_missing_numbers(trainer, checkpoint: str) -> None:
    """Give random numbers of the run's seed to the processes for which a checkpoint holds none."""
    from transformers import set_seed

    args = trainer.args
    own = ["rng_state.pth"] if args.world_size == 1 else [f"rng_state_{rank}.pth" for rank in range(args.world_size)]
    lacking = [rank for rank, name in enumerate(own) if not os.path.isfile(os.path.join(checkpoint, name))]
    if args.process_index in lacking:
        set_seed((args.seed + 1_000_003 * trainer.state.global_step + args.process_index) % 2**32)
    if lacking:
        ranks = ", ".join(map(str, lacking)) if len(lacking) < 9 else f"{lacking[0]} to {lacking[-1]}"
        rank0_print(f"{checkpoint}: random numbers of process {ranks} are drawn anew from the seed")
