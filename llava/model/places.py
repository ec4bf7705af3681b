"""Where a model is said to lie: what is wrong with a name behind which there is none, told in one line."""

import json
import os
import re

from llava.errors import LlavaError, OutOfReach

CHECKPOINT = "a checkpoint's folder, or a hub id"
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def is_hub_id(name: str) -> bool:
    """Whether the hub could have something of this name; a path with more slashes, or one with `./`, it has not."""
    return bool(_HUB_ID.fullmatch(name)) and ".." not in name


def not_there(name: str, said: str, expected: str, error: BaseException | None = None) -> LlavaError:
    """The error for a name behind which something is not to be had.

    Args:
        name: what was given: a folder, or a hub id.
        said: how the line begins: what was looked for, and of what ("vision tower 'x': no usable config.json").
        expected: what the name should lead to.
        error: what loading it raised, for what can be told in no other way.

    Returns:
        `OutOfReach` where the name may be right on another machine, else a `LlavaError`.
    """
    reason = str(error).strip().splitlines()[0][:160] if error is not None and str(error).strip() else ""
    if not name:
        return LlavaError(f"{said}: found an empty name, expected {expected}")
    if os.path.isfile(name):
        return LlavaError(f"{said}: it is a file, expected {expected}")
    if os.path.isdir(name):
        if not os.listdir(name):
            return LlavaError(f"{said}: the folder is empty, expected {expected}")
        return LlavaError(f"{said}{f' ({reason})' if reason else ''}, expected {expected}")
    if not is_hub_id(name):
        home = "; ~ stands for no folder here" if name.startswith("~") else ""
        return OutOfReach(f"{said}: no such folder{home}, expected {expected}")
    if os.path.isdir(os.path.dirname(name)):  # checkpoints/mine, where there is checkpoints
        return OutOfReach(f"{said}: no such folder, nor anything of that name from the hub, expected {expected}")
    return OutOfReach(f"{said} in the hub or its cache: {_from_hub(name, reason)}")


def _from_hub(name: str, reason: str) -> str:
    from huggingface_hub import constants

    fetch = f"`hf download {name}` fetches it where there is a network"
    if constants.HF_HUB_OFFLINE:
        return f"no such folder here, not in {_short(constants.HF_HUB_CACHE)}, and HF_HUB_OFFLINE is set; {fetch}"
    if "gated" in reason.lower():
        return f"the hub wants to know who asks ({reason}); `hf auth login`, then accept the model's terms on its page"
    if re.search("connect|resolve|timed out", reason, re.IGNORECASE):
        return f"no such folder here, and the hub cannot be reached ({reason}); {fetch}"
    return f"no such folder here, and {reason or 'the hub has none'}"


def _short(path: str) -> str:
    home = os.path.expanduser("~")
    return f"~{path[len(home) :]}" if path.startswith(home + os.sep) else path


def read_config(path: str, **hub) -> dict:
    """config.json of a folder or hub repository, as it stands.

    Args:
        **hub: `HUB_OPTIONS`, as transformers takes them.

    Raises:
        OutOfReach: there is none on this machine.
        LlavaError: what is here is no folder with a config.json that can be read.
    """
    from transformers import PreTrainedConfig

    path = os.fspath(path)
    if os.path.isdir(path):
        check_json(os.path.join(path, hub["subfolder"]) if hub.get("subfolder") else path)
    elif not is_hub_id(path) or os.path.isfile(path):
        raise not_there(path, f"{path}: no config.json", CHECKPOINT)
    try:
        values, _ = PreTrainedConfig.get_config_dict(path, **hub)
    except (OSError, ValueError) as error:
        raise not_there(path, f"{path}: no config.json", CHECKPOINT, error) from None
    if not values:
        raise not_there(path, f"{path}: no config.json", CHECKPOINT)
    return values


def check_json(folder: str) -> None:
    """Refuse a folder whose config.json is missing, or holds no JSON mapping."""
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):
        empty = not os.listdir(folder)
        said = f"{folder}: no config.json" if empty else f"{folder}: the folder holds no config.json"
        raise not_there(folder, said, CHECKPOINT)
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
    except (OSError, ValueError) as error:
        raise LlavaError(f"{path}: cannot be read as JSON ({str(error).splitlines()[0][:120]})") from None
    if not isinstance(values, dict) or not values:
        raise LlavaError(f"{path}: found {type(values).__name__} {str(values)[:40]}, expected a mapping of settings")
