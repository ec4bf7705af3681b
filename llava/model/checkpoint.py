"""Reading and writing the parts of a LLaVA checkpoint that are not whole models. Nothing is unpickled."""

import contextlib
import functools
import glob
import os
from collections.abc import Callable, Iterator

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from llava.errors import LlavaError
from llava.utils import rank0_print

PROJECTOR_NAME = "mm_projector.safetensors"
PROJECTOR_KEYS = ("mm_projector", "image_newline", "token_compressor")


def read_weights(path: str) -> dict[str, torch.Tensor]:
    """Tensors of a .safetensors file, or of a .bin/.pth that holds tensors only."""
    if not os.path.isfile(path):
        found = "a folder" if os.path.isdir(path) else "no such file"
        raise LlavaError(f"{path}: {found}, expected weights (.safetensors, or .bin with tensors only)")
    if path.endswith(".safetensors"):
        try:
            return load_file(path)
        except SafetensorError as error:
            raise LlavaError(f"{path}: not a whole safetensors file ({error})") from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds for a file it will not unpickle
        raise LlavaError(f"{path}: not a file of plain tensors ({str(error).splitlines()[0][:120]})") from None


def weight_names(path: str) -> list[str]:
    """Names of the tensors in a file that `read_weights` takes; a .safetensors file's are read from its header."""
    if not path.endswith(".safetensors"):
        return list(read_weights(path))
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise LlavaError(f"{path}: not a whole safetensors file ({error})") from None


def weights_in(folder: str) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """(name, what reads it) of every tensor in the `model*.safetensors` of a folder."""
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "model*.safetensors"))):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    yield name, functools.partial(file.get_tensor, name)
        except SafetensorError as error:
            raise LlavaError(f"{path}: not a whole safetensors file ({error})") from None


def find_projector(folder: str) -> str | None:
    """`mm_projector.safetensors` in a folder, else LLaVA's `mm_projector.bin`, else None."""
    paths = (os.path.join(folder, name) for name in (PROJECTOR_NAME, "mm_projector.bin"))
    return next((path for path in paths if os.path.isfile(path)), None)


def check_whole(folder: str, instead: str) -> None:
    """Refuse a folder that holds a projector and no model.

    Args:
        instead: what to name it as, for the message.
    """
    found = find_projector(folder)
    patterns = ("model*.safetensors", "pytorch_model*.bin")
    if found and not any(glob.glob(os.path.join(glob.escape(folder), pattern)) for pattern in patterns):
        raise LlavaError(f"{folder}: holds a projector alone ({os.path.basename(found)}), expected a model; {instead}")


def named_or_beside(path: str) -> str:
    """`path`, or where it is not there, the file of that name in the other format beside it, with one note.

    LLaVA's scripts name the `mm_projector.bin` of their first stage, which leaves an `mm_projector.safetensors` here;
    its saves on the way are `mm_projector/checkpoint-N.bin` there, and `checkpoint-N/mm_projector.safetensors` here.
    """
    other = None if os.path.exists(path) else next(filter(os.path.isfile, _other_places(path)), None)
    if other is not None:
        _tell_of_the_other(path, other)
    return other or path


def _other_places(path: str) -> list[str]:
    """Where the weights may lie that `path` names, in the other format."""
    stem, ending = os.path.splitext(path)
    if ending == ".safetensors":
        return [f"{stem}.bin"]
    if ending not in (".bin", ".pth", ".pt"):
        return []
    places, (folder, name) = [f"{stem}.safetensors"], os.path.split(stem)
    if os.path.basename(folder) == "mm_projector" and name.startswith("checkpoint-"):
        places.append(os.path.join(os.path.dirname(folder), name, PROJECTOR_NAME))
    return places


@functools.cache
def _tell_of_the_other(path: str, other: str) -> None:
    beside = os.path.dirname(path) == os.path.dirname(other)
    rank0_print(f"note: {path}: no such file; {f'{os.path.basename(other)} beside it' if beside else other} is taken")


def what_is_there(path: str) -> str:
    """For a message about a file that is missing: what its folder holds."""
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        return f"there is no folder {folder}"
    names = sorted(os.listdir(folder))
    return (
        f"its folder holds {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}"
        if names
        else "its folder is empty"
    )


def projector_state(named_parameters) -> dict[str, torch.Tensor]:
    """`gathered` of projector, newline and token compressor, under LLaVA's names."""
    return gathered((k, v) for k, v in named_parameters if any(f".{key}" in f".{k}" for key in PROJECTOR_KEYS))


@contextlib.contextmanager
def whole(parameters: list):
    """Inside, parameters that ZeRO-3 has split are whole; for reading. A collective then: every rank must enter."""
    split = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not split:
        yield
        return
    from deepspeed import zero

    with zero.GatheredParameters(split):
        yield


def gathered(named_parameters) -> dict[str, torch.Tensor]:
    """Copies of parameters on the CPU, whole under ZeRO-3 too.

    A collective under ZeRO-3: every rank must call it.
    """
    state = {}
    for name, parameter in named_parameters:
        with whole([parameter]):
            state[name] = parameter.detach().cpu().clone()
    return state


def save_projector(state: dict[str, torch.Tensor], folder: str) -> None:
    """Write `mm_projector.safetensors`: `model.mm_projector.*`, `model.image_newline`, `...token_compressor.*`."""
    os.makedirs(folder, exist_ok=True)
    save_file({k: v.contiguous() for k, v in state.items()}, os.path.join(folder, PROJECTOR_NAME), {"format": "pt"})


def load_projector(model, path: str) -> None:
    """Load projector (newline and token compressor, where both sides have one) into a base model with a vision half.

    Args:
        model: the inner model that owns `mm_projector`.
        path: the file, or a folder that holds it.

    Raises:
        LlavaError: no such file, no projector in it, or shapes that differ.
    """
    if os.path.isdir(path):
        path = find_projector(path) or os.path.join(path, PROJECTOR_NAME)
    path = named_or_beside(path)
    weights = read_weights(path)
    kind = f"mm_projector_type {getattr(model.config, 'mm_projector_type', None)}"
    pairs = _pairs(model.mm_projector, weights, "mm_projector.", f"{path}: its projector does not fit {kind}")
    compressor = model.vision_tower.token_compressor
    if compressor is not None and any("token_compressor." in key for key in weights):
        fault = f"{path}: its token compressor does not fit this model's"
        pairs += _pairs(compressor, weights, "token_compressor.", fault)
    newline = next((v for k, v in weights.items() if k.endswith("image_newline")), None)
    if newline is not None and getattr(model, "image_newline", None) is not None:
        pairs.append((model.image_newline, newline))
    for parameter, value in pairs:
        assign(parameter, value)


def _pairs(module, weights, prefix: str, fault: str) -> list:
    """[(parameter, its value)] of a module whose weights are named prefix + name, in a file of more."""
    values = {k.split(prefix, 1)[1]: v for k, v in weights.items() if prefix in k}
    expected = {k: tuple(getattr(p, "ds_shape", p.shape)) for k, p in module.named_parameters()}
    found = {k: tuple(v.shape) for k, v in values.items()}
    if found != expected:
        odd = sorted(k for k in found.keys() | expected.keys() if found.get(k) != expected.get(k))
        listed = ", ".join(f"{k} is {found.get(k, 'missing')}, expected {expected.get(k, 'absent')}" for k in odd[:3])
        raise LlavaError(f"{fault}: {listed}")
    return [(p, values[k]) for k, p in module.named_parameters()]


def assign(parameter, value):
    """Set a parameter's value; under ZeRO-3, where it is split, every rank must call it."""
    if hasattr(parameter, "ds_id"):
        from deepspeed import zero

        with zero.GatheredParameters([parameter], modifier_rank=0):
            if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
                parameter.data.copy_(value)
    else:
        parameter.data.copy_(value)


# by the names that these were first known by
ADAPTER_NAME, load_adapter = PROJECTOR_NAME, load_projector
