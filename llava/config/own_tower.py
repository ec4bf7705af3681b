"""An encoder that a user brings along: how a run names it, and what stands beside the name; imports neither torch nor
towers.

The name is FILE.py:Class, pkg.module:Class, or one that an installed package has in the entry points of `llava.towers`.
"""

import importlib.metadata
import math
import os
import re
from dataclasses import dataclass

from llava.config.files import find_file
from llava.errors import LlavaError

ENTRY_POINTS = "llava.towers"
_CLASS_PATH = re.compile(r"(?P<source>[^:\n]+\.py|[A-Za-z_][\w.]*):(?P<name>[A-Za-z_]\w*)")
TIMM_PREFIX = "timm:"  # before the name of an encoder of timm
_OTHER_SOURCES = ("timm", "http", "https", "hf")  # a scheme, no module of the user's
INTERPOLATIONS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}  # Pillow's numbers
IMAGE_MEMBERS = ("size", "mean", "std", "interpolation")
IMAGE_EXAMPLE = "{size: 224, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5], interpolation: bicubic}"


@dataclass(frozen=True)
class ClassPath:
    """Where a class is: `source` is a .py file or a dotted module, `name` the class in it."""

    source: str
    name: str

    @classmethod
    def parse(cls, text) -> "ClassPath | None":
        """None where the text names no class: a hub id, a folder, an id of the registry."""
        match = _CLASS_PATH.fullmatch(text) if isinstance(text, str) else None
        if match is None or match["source"] in _OTHER_SOURCES or os.path.isdir(text):
            return None
        return cls(match["source"], match["name"])

    @property
    def is_file(self) -> bool:
        return self.source.endswith(".py")

    @property
    def identity(self) -> tuple[str, str]:
        """What stays when a file is moved: its name without folders, and the class."""
        return os.path.basename(self.source) if self.is_file else self.source, self.name

    def __str__(self) -> str:
        return f"{self.source}:{self.name}"


def entry_points() -> dict[str, str]:
    """{name: pkg.module:Class} of the towers that installed packages offer."""
    return {point.name: point.value for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}


def class_path(name) -> ClassPath | None:
    """The class that a name stands for, itself a class path or an entry point's; None where it is neither."""
    found = ClassPath.parse(name)
    if found is None and isinstance(name, str) and re.fullmatch(r"[\w-]+", name) and not os.path.isdir(name):
        found = ClassPath.parse(entry_points().get(name))
    return found


def own_classes(*names) -> list[str]:
    """Those of the names that stand for a class."""
    return [name for name in names if class_path(name) is not None]


def same_class(a, b) -> bool:
    """Whether two names stand for one class of a user's, whose file may have been moved."""
    if not (isinstance(a, str) and isinstance(b, str)) or (":" not in a and ":" not in b):
        return False
    found = class_path(a), class_path(b)
    return None not in found and found[0].identity == found[1].identity


def locate(value: str, key: str, where: str, config) -> str:
    """A class path whose file, or a file of weights, is in the working directory or a folder above `config`.

    Raises:
        LlavaError: there is no such file.
    """
    path = ClassPath.parse(value)
    source = value if path is None else path.source
    if path is not None and not path.is_file:
        return value
    found = find_file(source, config)
    if found is None:
        beside = "" if config is None else f" or beside {config}"
        raise LlavaError(
            f"{where}: {key} is {value!r}: found no file {source}, expected it in the working directory{beside}"
        )
    return str(found) if path is None else f"{found}:{path.name}"


def check_image(value, where: str) -> None:
    """Refuse a `vision_tower_image` that does not say how a picture becomes an encoder's pixels.

    Raises:
        LlavaError: what is missing or wrong.
    """
    if value is None:
        return
    lacking = [name for name in IMAGE_MEMBERS if name not in value]
    unknown = [str(name) for name in value if name not in IMAGE_MEMBERS]
    if lacking or unknown:
        found = f"no {', '.join(lacking)}" if lacking else f"unknown {', '.join(unknown)}"
        raise LlavaError(f"{where}: found {found}, expected {IMAGE_EXAMPLE}")
    size = value["size"]
    if type(size) is not int or size < 1:
        raise LlavaError(f"{where}: size is {size!r}, expected the side of the encoder's images in pixels")
    for name in ("mean", "std"):
        numbers = value[name]
        if not isinstance(numbers, (list, tuple)) or len(numbers) != 3 or not all(map(_is_number, numbers)):
            raise LlavaError(f"{where}: {name} is {numbers!r}, expected three numbers, of channels from 0 to 1")
    if not all(number > 0 for number in value["std"]):
        raise LlavaError(f"{where}: std is {value['std']!r}, expected numbers above 0")
    if value["interpolation"] not in INTERPOLATIONS:
        known = ", ".join(INTERPOLATIONS)
        raise LlavaError(f"{where}: interpolation is {value['interpolation']!r}, expected one of {known}")


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
