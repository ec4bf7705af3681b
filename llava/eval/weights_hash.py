"""One name for all that makes a model answer as it does: the bytes of its files."""

import glob
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor

from llava.families import read_mapping

_BLOCK = 1 << 24
_WEIGHTS = ("*.safetensors", "*.bin")
_NOT_THE_MODEL = ("training_args.bin", "optimizer.bin", "scheduler.bin")
_SETTINGS = (
    *("config.json", "adapter_config.json", "generation_config.json", "preprocessor_config.json"),
    *("processor_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
)


def weights_hash(model_path: str, model_base: str | None = None) -> str | None:
    """SHA-256, in hexadecimal, of the files that a model is loaded from; None where they are not on this machine.

    Every byte counts: a model that is trained again has files of the same names and sizes. The names of folders, times
    and machines do not count. Of an adapter or a projector alone its base counts too, and of a checkpoint without its
    tower's weights the folder that these come from. It reads as fast as the disk allows, with several threads.

    Args:
        model_path, model_base: folders or hub ids, as `load_pretrained_model` takes them.
    """
    digest = hashlib.sha256()
    for role, path in _sources(model_path, model_base):
        folder = _on_this_machine(path)
        if folder is None:
            return None
        for name in model_files(folder):
            digest.update(json.dumps([role, name]).encode() + _of_file(os.path.join(folder, name)))
    return digest.hexdigest()


def is_here(model_path: str, model_base: str | None = None) -> bool:
    """Whether a model comes from folders alone, and nothing has to be fetched for it."""
    return all(os.path.isdir(path) for _, path in _sources(model_path, model_base))


def newest_change(model_path: str, model_base: str | None = None) -> float:
    """When a file of the model was last written or put there, in seconds since 1970; 0 where none is here."""
    folders = [_on_this_machine(path) for _, path in _sources(model_path, model_base)]
    files = [os.path.join(folder, name) for folder in folders if folder for name in model_files(folder)]
    return max((max(os.stat(file).st_mtime, os.stat(file).st_ctime) for file in files), default=0.0)


def model_files(folder: str) -> list[str]:
    """Names of the files in a folder that make the model: its weights, and what says how they are used."""
    names = {os.path.basename(path) for kind in _WEIGHTS for path in glob.glob(os.path.join(glob.escape(folder), kind))}
    names |= {name for name in _SETTINGS if os.path.isfile(os.path.join(folder, name))}
    return sorted(names.difference(_NOT_THE_MODEL))


def _sources(model_path: str, model_base: str | None):
    """(role, folder or hub id) of every place that the model comes from."""
    from llava.model.lora import is_lora, recorded_base

    yield "model", model_path
    base = model_base or (recorded_base(model_path) if is_lora(model_path) else None)
    if base:
        yield "base", base
    folders = [folder for folder in map(_on_this_machine, (model_path, base)) if folder]
    tower = next((_tower(folder) for folder in folders if _tower(folder)), None)
    if tower and not any(_holds_tower(folder) for folder in folders):
        yield "tower", tower


def _on_this_machine(path: str | None) -> str | None:
    """A folder, or the one in which the hub's files are kept."""
    if not path or os.path.isdir(path):
        return path or None
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(path, local_files_only=True)
    except (OSError, ValueError):  # never fetched, or no id
        return None


def _tower(folder: str) -> str | None:
    """Where a checkpoint says that its tower comes from."""
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):
        return None
    tower = read_mapping(path).get("mm_vision_tower")
    inside = os.path.join(folder, tower) if isinstance(tower, str) and tower else ""
    return inside if os.path.isdir(inside) else tower


def _holds_tower(folder: str) -> bool:
    from llava.model.checkpoint import weight_names

    files = [os.path.join(folder, name) for name in model_files(folder)]
    indexes = glob.glob(os.path.join(glob.escape(folder), "*.index.json"))
    names = [name for file in files if file.endswith(".safetensors") for name in weight_names(file)]
    for index in indexes:
        names += read_mapping(index).get("weight_map", ())
    return any("vision_tower." in name for name in names)


def _of_file(path: str) -> bytes:
    """The digest of a file's blocks' digests."""

    def block(start: int) -> bytes:
        with open(path, "rb") as file:
            file.seek(start)
            return hashlib.sha256(file.read(_BLOCK)).digest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        blocks = pool.map(block, range(0, os.path.getsize(path), _BLOCK))
        return hashlib.sha256(b"".join(blocks)).digest()
