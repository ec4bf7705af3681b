"""Which images or video a record names, and where they are."""

import os
import reprlib

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.errors import LlavaError

_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 100


def brief(value) -> str:
    """A value for a message: as `repr`, but of one short line however long it is."""
    return _BRIEF.repr(value)


def media_of(record: dict) -> tuple[str | None, list[str]]:
    """("image", names), ("video", [name]) or (None, []) for a record without either.

    Raises:
        LlavaError: a value that is not a path, or not a list of paths; an image and a video at once.
    """
    image, video = record.get("image"), record.get("video")
    if image and video:
        raise LlavaError(f"image and video: found {brief(image)} and {brief(video)}, expected one of them")
    if image:
        names = image if isinstance(image, list) else [image]
        for name in names:
            if not isinstance(name, str) or not name:
                raise LlavaError(f"image: found {brief(name)}, expected a path")
        return "image", names
    if video:
        names = video if isinstance(video, list) else [video]
        if len(names) != 1 or not isinstance(names[0], str):
            raise LlavaError(f"video: found {brief(video)}, expected one path")
        return "video", names
    return None, []


def shown_media(record: dict, add_time_instruction: bool = False) -> tuple[str | None, list[str]]:
    """`media_of`, but no names where no turn has an `<image>`: LLaVA-NeXT trains such a record as text.

    Args:
        add_time_instruction: the first turn of a video record is given its `<image>` then.
    """
    kind, names = media_of(record)
    if not names or (kind == "video" and add_time_instruction):
        return kind, names
    texts = (turn.get("value", turn.get("content")) for turn in record["conversations"])
    return kind, names if any(DEFAULT_IMAGE_TOKEN in text for text in texts) else []


def resolve_path(folder: str | None, name: str, allow_absolute_paths: bool = False) -> str:
    """The path of `name` inside `folder`. Links inside the folder may point anywhere.

    Args:
        folder: where relative names start; None: they are paths of their own, and any is allowed.
        allow_absolute_paths: let a name be absolute or climb out with `..`.

    Raises:
        LlavaError: the name leaves the folder.
    """
    if not folder:
        return name
    if not allow_absolute_paths and (os.path.isabs(name) or ".." in name.replace("\\", "/").split("/")):
        raise LlavaError(
            f"path {name!r}: leaves the folder {folder}, expected a path inside it (or set allow_absolute_paths)"
        )
    return os.path.join(folder, name)
