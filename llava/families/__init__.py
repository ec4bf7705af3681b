"""The model families: LLaVA, Qwen2-VL, ... differ in one file each, behind the contract in `base.py`.

To add one, write its file and add its row to `FAMILIES`.
"""

import importlib
import json
import os
from functools import cache

from llava.errors import LlavaError

# name -> module:class; a family but LLaVA's is called as the model_type of its checkpoints
FAMILIES = {
    "llava": "llava.families.llava:Llava",
    "qwen2_vl": "llava.families.qwen2_vl:Qwen2VL",
    "qwen2_5_vl": "llava.families.qwen2_vl:Qwen2_5_VL",
    "qwen3_vl": "llava.families.qwen3_vl:Qwen3VL",
}


@cache
def get_family(name: str):
    """The family of a name in `FAMILIES`; made once."""
    module, cls = FAMILIES[name].split(":")
    return getattr(importlib.import_module(module), cls)()


def family_of(path: str, download: bool = True):
    """The family of a checkpoint or language model: a folder, or a hub id. Reads config.json and no weights.

    Args:
        path: folder or hub id.
        download: whether config.json may be fetched from the hub; else its cache is looked at alone.

    A LoRA adapter's folder without a config is of its base's family. What is out of reach (a hub id without network) is
    told by its name; everything that is no other family's is LLaVA's, which says itself what it does not know.

    Raises:
        LlavaError: a config.json that is no JSON.
    """
    config = _read_config(path, download)
    if config is None:
        name = os.path.basename(os.path.normpath(path)).lower().replace("-", "_").replace(".", "_")
        # the longest name first, so that a part of it does not win
        found = next((family for family in sorted(FAMILIES, key=len, reverse=True) if name.startswith(family)), "llava")
    else:
        found = config.get("model_type")
    return get_family(found if found in FAMILIES else "llava")


def family_of_run(run):
    """The family of a resolved run, which needs no network where the name of its model or its vision tower tells."""
    path = run["model_name_or_path"]
    found = family_of(path, download=False)
    return found if found.name != "llava" or run["vision_tower"] else family_of(path)


def _read_config(path: str, download: bool) -> dict | None:
    """config.json of a folder, of the base of an adapter's folder, or of a hub repository; None out of reach."""
    if os.path.isdir(path):
        file = os.path.join(path, "config.json")
        adapter = os.path.join(path, "adapter_config.json")
        if not os.path.isfile(file) and os.path.isfile(adapter):
            base = (read_mapping(adapter) or {}).get("base_model_name_or_path")
            return _read_config(base, download) if base and base != path else None
        return read_mapping(file) if os.path.isfile(file) else None
    from huggingface_hub import hf_hub_download

    try:
        file = hf_hub_download(path, "config.json", local_files_only=not download)
    except (OSError, ValueError):  # no such repository, no network, or a path that is no id
        return None
    return read_mapping(file)


def read_mapping(path: str) -> dict:
    """What a JSON file holds; {} where that is no mapping. Raises `LlavaError` for a file that is no JSON."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except ValueError as error:
        raise LlavaError(f"{path}: not valid JSON ({error})") from None
    return content if isinstance(content, dict) else {}
