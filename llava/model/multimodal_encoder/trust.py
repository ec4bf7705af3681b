"""Whose word is enough to run a class of an encoder: the user's.

A run's YAML, a command or the caller's code names a class. A checkpoint's config.json does too, but it may come from
anywhere, and a class path that it alone names would run whatever module of the machine it points at. Such a class is
imported where the user has named it as well, where it is the name of an installed plugin, or under `trust_remote_code`.
"""

import contextlib
import contextvars

from llava.config.own_tower import ClassPath, class_path, entry_points, own_classes
from llava.errors import LlavaError

_trusting = contextvars.ContextVar("trusting_checkpoints", default=False)
_named: contextvars.ContextVar[tuple[ClassPath, ...]] = contextvars.ContextVar("named_classes", default=())


@contextlib.contextmanager
def trusting_checkpoints(trust: bool):
    """Inside, a class that a checkpoint alone names is run, from the checkpoint's own folder too
    (`trust_remote_code`)."""
    token = _trusting.set(trust)
    try:
        yield
    finally:
        _trusting.reset(token)


def trusts_checkpoints() -> bool:
    return _trusting.get()


@contextlib.contextmanager
def naming(*names: str | None):
    """Inside, the user has named these classes: a checkpoint that records one of them gets it.

    Args:
        names: FILE.py:Class, pkg.module:Class or an entry point; what is none of these (a hub id, None) names no class.
    """
    found = filter(None, map(class_path, names))
    token = _named.set((*_named.get(), *found))
    try:
        yield
    finally:
        _named.reset(token)


def check_own_class(named: str | None, config, checkpoint: str) -> None:
    """Refuse a `vision_tower` that is to name the class of a checkpoint's encoder and does not.

    Raises:
        LlavaError: it is no class, or the checkpoint's tower is of another, or of none.
    """
    if named is None:
        return
    path = class_path(named)
    if path is None:
        raise LlavaError(
            f"vision_tower: found {named!r}, expected a class of your own (FILE.py:Class, pkg.module:Class, an entry "
            "point); other towers come with the checkpoint"
        )
    tower = getattr(config, "mm_vision_tower", None)
    classes = own_classes(tower, getattr(config, "mm_vision_tower_type", None))
    if not any(class_path(name).identity == path.identity for name in classes):
        found = " or ".join(classes) or f"{tower}, no class of anyone's own"
        raise LlavaError(f"vision_tower: found {named}, but the vision tower of {checkpoint} is {found}")


def permitted(name: str, checkpoint: str | None, key: str = "vision_tower") -> ClassPath:
    """Where to import a class from, for whom a config speaks.

    Args:
        name: what the config says, a class path or an entry point.
        checkpoint: folder or hub id that the config was read from; None: the caller's own code made it.
        key: of the config, for the message.

    Returns:
        The user's own path to the class where there is one: the folders in a checkpoint's path are another machine's.

    Raises:
        LlavaError: nobody but the checkpoint names it.
    """
    path, named = class_path(name), _named.get()
    own = next((known for known in named if known.identity == path.identity), None)
    if own is not None:
        return own
    if not checkpoint or trusts_checkpoints() or name in entry_points():
        return path
    short = ":".join(path.identity)
    instead = f" (named: {', '.join(map(str, named))})" if named else ""
    raise LlavaError(
        f"vision tower {name}: only the checkpoint {checkpoint} names this class{instead}, and its word alone runs no "
        f"code; expected it from you: --vision_tower {short}, in a training run {key}: {short}, or trust_remote_code"
    )
