"""Where an encoder of timm comes from: a name of its registry, a folder, or a repository of the hub.

timm needs torchvision, so it is imported inside functions only: where it is missing, everything but these encoders
works.
"""

import contextlib
import difflib
import json
import logging
import os
from dataclasses import dataclass

import torch
import torch.nn as nn

from llava.config.own_tower import TIMM_PREFIX
from llava.errors import LlavaError, OutOfReach

EXTRA = (
    "pip install 'llava[timm]', in an environment of its own: it brings torchvision, and that the one version of torch "
    "that it fits"
)
# arguments of `timm.create_model` that the tower sets, and the key of a run that says them
TAKEN = {
    "img_size": "image_size",
    "checkpoint_path": "vision_tower_weights",
    **dict.fromkeys(("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "num_classes", "in_chans")),
    **dict.fromkeys(("features_only", "out_indices", "cache_dir")),
}


def require_timm(tower: str):
    """The module timm.

    Raises:
        OutOfReach: it is not installed, or what it imports is broken.
    """
    try:
        import timm
    except ModuleNotFoundError as error:
        raise OutOfReach(f"vision tower {tower!r}: found no {error.name} installed, expected timm: {EXTRA}") from None
    except Exception as error:  # a torchvision made for another torch fails in many ways
        said = (str(error).splitlines() or [""])[0][:160]
        raise OutOfReach(
            f"vision tower {tower!r}: timm cannot be imported ({type(error).__name__}: {said}): {EXTRA}"
        ) from None
    return timm


@dataclass(frozen=True)
class TimmSource:
    """One model of timm.

    tower: as the run names it, for messages.
    name: for `timm.create_model`: NAME, NAME.TAG, local-dir:FOLDER, hf-hub:OWNER/NAME.
    """

    tower: str
    name: str

    def create(self, args: dict, **loading) -> nn.Module:
        """The model without its classifier.

        Args:
            args: of `timm.create_model`.
            **loading: `pretrained`, `pretrained_cfg_overlay`.

        Raises:
            LlavaError: arguments that the model does not take.
        """
        import timm

        try:
            with quiet():
                return timm.create_model(self.name, num_classes=0, **args, **loading)
        except TypeError as error:
            if "argument" not in str(error):
                raise
            raise LlavaError(f"vision tower {self.tower!r}: {error}; found tower_args {args or 'none'}") from None


def find_source(tower: str) -> TimmSource:
    """The model that `timm:NAME`, `timm:/folder`, `timm:owner/repository`, or a folder's path alone, names; nothing but
    a repository's config.json is downloaded.

    Raises:
        LlavaError: timm has no such model or weights, or there is no such folder.
        OutOfReach: timm is missing, or the hub is.
    """
    require_timm(tower)
    from timm.models import get_pretrained_cfg, is_model

    name = tower.removeprefix(TIMM_PREFIX)
    if os.path.isdir(name.removeprefix("local-dir:")):
        folder = name.removeprefix("local-dir:")
        _check_config(tower, os.path.join(folder, "config.json"))
        return TimmSource(tower, f"local-dir:{folder}")
    repository = name.removeprefix("hf-hub:")
    if "/" in name and not name.startswith((".", "/", "~", "local-dir:")) and repository.count("/") == 1:
        _check_config(tower, _from_hub(tower, repository))
        return TimmSource(tower, f"hf-hub:{repository}")
    if "/" in name:
        raise LlavaError(f"vision tower {tower!r}: found no folder {name}, expected one with a config.json of timm")
    if not is_model(name):
        raise LlavaError(f"vision tower {tower!r}: timm has no model {name}; {_close(name)}")
    try:
        get_pretrained_cfg(name)
    except RuntimeError:
        raise LlavaError(f"vision tower {tower!r}: timm has no weights of that name; {_close(name)}") from None
    return TimmSource(tower, name)


def _from_hub(tower: str, repository: str) -> str:
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(repository, "config.json")
    except Exception as error:  # of the network, the hub or its cache
        said = (str(error).splitlines() or [""])[0][:160]
        raise OutOfReach(f"vision tower {tower!r}: no config.json from the hub or in its cache ({said})") from None


def _check_config(tower: str, path: str) -> None:
    """Refuse a model of another library, or none at all, before timm fails on it."""
    from timm.models import is_model

    try:
        with open(path) as file:
            values = json.load(file)
    except (OSError, json.JSONDecodeError) as error:
        raise LlavaError(f"vision tower {tower!r}: no usable config.json ({error})") from None
    values = values if isinstance(values, dict) else {}
    architecture, other = values.get("architecture"), values.get("model_type")
    if architecture is None:
        found = f"model_type {other!r}, which is one of transformers" if other else "no architecture"
        raise LlavaError(
            f"vision tower {tower!r}: {path} has {found}, expected the architecture and pretrained_cfg of a model that "
            "timm saved" + (f", or the name without {TIMM_PREFIX}" if other else "")
        )
    if not is_model(str(architecture)):
        raise LlavaError(
            f"vision tower {tower!r}: {path} has the architecture {architecture}, no model of timm; "
            f"{_close(str(architecture))}"
        )


def _close(name: str) -> str:
    """Names of timm like this one; for a known architecture, those of its weights."""
    from timm.models import get_arch_pretrained_cfgs, list_models

    found = list(get_arch_pretrained_cfgs(name))
    if not found:
        known, stem = list_models(), name.split(".")[0]
        found = difflib.get_close_matches(stem, known, n=5, cutoff=0.6)
    return f"close to it: {', '.join(found[:8])}" if found else "timm.list_models() has the names"


def check_args(args: dict) -> None:
    """Refuse `tower_args` that the tower itself, or another key, says to `timm.create_model`.

    Raises:
        LlavaError: such a name.
    """
    for name in args:
        if name in TAKEN:
            instead = f"the key {TAKEN[name]}" if TAKEN[name] else "other names: the tower sets this one"
            raise LlavaError(f"tower_args: found {name}, expected {instead}")


@contextlib.contextmanager
def missing_weights():
    """Inside, the names of weights that `load_state_dict` does not find are put into the list that this yields; timm
    tells them nobody when a classifier is left out."""
    missing, original = [], nn.Module.load_state_dict

    def load(self, *args, **kwargs):
        found = original(self, *args, **kwargs)
        missing.extend(found.missing_keys)
        return found

    nn.Module.load_state_dict = load
    try:
        yield missing
    finally:
        nn.Module.load_state_dict = original


@contextlib.contextmanager
def quiet():
    """Silence timm's lines on a classifier that is not used."""
    logger = logging.getLogger("timm")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def without_weights(make):
    """`make()` on the meta device, or on the CPU where its code cannot compute there."""
    try:
        with torch.device("meta"):
            return make()
    except Exception as error:
        if isinstance(error, LlavaError) or "meta" not in str(error):  # of PyTorch's words for it
            raise
        with torch.device("cpu"):
            return make()
