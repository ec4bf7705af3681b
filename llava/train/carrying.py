"""The optimizer's state of a checkpoint, converted for a run that reads it in another form (see `llava.train.kinds`).

Rank 0 makes a copy beside the checkpoint (see `llava.train.universal`) when the model has been built; it is removed
once all have read it. Learning rates and Adam's other numbers are this run's.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from llava.errors import LlavaError
from llava.train.kinds import Kind, files_of, is_adam, kind_of_checkpoint, kind_of_run, must_convert
from llava.train.phases import during
from llava.train.schedule import SCHEDULER_NAME, optimizer_file
from llava.train.universal import MOMENTS, Universal
from llava.utils import is_rank0, rank0_print

_PROGRESS, _HEARD = 30, 10  # seconds: between two lines of a conversion; for all ranks to hear of a fault
_waits = 0


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
        _fit_optimizer(trainer.model_wrapped)


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
    elif not is_adam(args):
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
        if before.zero is None:
            _split(trainer, checkpoint, copy)
        else:
            run_conversion(checkpoint, written)
        for name in (SCHEDULER_NAME, "scaler.pt"):
            if os.path.isfile(os.path.join(checkpoint, name)):
                shutil.copy(os.path.join(checkpoint, name), written)
        if now.zero is None:
            _join(trainer, copy)

    try:
        with during("conversion of the optimizer's state"):
            _first(lambda: write_copy(checkpoint, written, before, make))
            if now.zero is not None:
                _put_weights(trainer, checkpoint, copy, before)
            _first(lambda: written.rename(folder))
        if (seconds := time.monotonic() - start) > _PROGRESS:
            rank0_print(f"{folder.name}: converted in {seconds:.0f} s")
        yield Universal(folder, step)
        trainer.accelerator.wait_for_everyone()  # all have read it
    finally:
        if is_rank0():
            remove_copies(args.output_dir)


def write_copy(checkpoint: str, folder: Path, before: Kind, make: Callable[[], None]) -> None:
    """Write a copy, if there is room for it.

    Args:
        checkpoint: that wants another form.
        folder: of the copy, made here.
        before: what wrote the checkpoint.
        make: writes it.

    Raises:
        LlavaError: it could not be written, as with a full disk.
    """
    states = files_of(checkpoint, "global_step*/*_optim_states.pt") or [optimizer_file(checkpoint)]
    # DeepSpeed's parts lie beside their sum for a while; to plain moments come the weights
    needed, free = 2 * sum(os.path.getsize(path) for path in states), shutil.disk_usage(folder.parent).free
    if free < needed:
        raise LlavaError(
            f"{folder}: disk full: to convert the optimizer's state of {checkpoint} takes {needed / 1e9:.3g} GB, "
            f"{free / 1e9:.3g} GB are free; expected room for it, or {before}"
        )
    with _writing(folder, checkpoint, before):
        folder.mkdir()
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


def run_conversion(checkpoint: str, folder: Path) -> None:
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
                    rank0_print(f"{folder.stem}: {_size(folder) / 1e9:.3g} GB written")
        finally:
            child.kill()
        if status:
            log.seek(0)
            said = [line for line in log.read().splitlines() if line.strip()]
            raise subprocess.CalledProcessError(status, "conversion", stderr=said[-1] if said else f"exit {status}")


def _size(folder: Path) -> int:
    """Bytes of what lies in a folder, some of which may go meanwhile."""
    found = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            found += path.lstat().st_size
    return found


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
        said = store.get(key).decode()
        store.add(f"{key}/heard", 1)
        if said:
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
        end = time.monotonic() + _HEARD
        while said and store.add(f"{key}/heard", 0) < distributed.get_world_size() - 1 and time.monotonic() < end:
            time.sleep(0.1)  # the store may end with this process


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


def _fit_optimizer(engine) -> None:
    """Give a loaded optimizer what it needs: torch's Adam and DeepSpeed's own, which offloading calls for, differ.

    Of its groups those entries that a checkpoint of the other kind lacks; of the steps, torch's want a tensor for each
    weight, DeepSpeed's a number. A checkpoint may hold the other, or one for all.
    """
    import torch

    optimizer = engine.optimizer.optimizer
    for group in optimizer.param_groups:
        for key, value in optimizer.defaults.items():
            group.setdefault(key, value)
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
