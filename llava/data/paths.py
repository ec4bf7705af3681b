"""Which images or video a record names, and where they are."""

import os
import re
import reprlib
from functools import lru_cache

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.errors import LlavaError

_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 100


def brief(value) -> str:
    """A value for a message: as `repr`, but of one short line however long it is."""
    return _BRIEF.repr(value)


# the places of a codec's patches in a record, without case and separators (OneVision-Encoder's positions_thw)
_PATCH_PLACES = re.compile(
    r"(positions?thw|patchpositions?(thw)?|vis(ible)?(idx|ids|index|indexes|indices)(thw)?)(npy|files?|paths?)*"
)


def refuse_codec_data(record: dict, where: str = "") -> None:
    """LlavaError for a record whose pictures are patches of a clip, cut out by a codec and laid side by side.

    As plain images, which is what else it says, they would be trained on without a word.
    """
    for key, value in record.items():
        if _is_patch_places(key) and value is not None and (not hasattr(value, "__len__") or len(value)):
            raise LlavaError(
                f"{where}{key}: found {brief(value)}: patches of a video that a codec chose, which are not read yet; "
                "expected whole pictures or a video, without this key"
            )


@lru_cache(maxsize=4096)
def _is_patch_places(key: str) -> bool:
    return _PATCH_PLACES.fullmatch(re.sub(r"[\W_]+", "", str(key)).lower()) is not None


def media_of(record: dict) -> tuple[str | None, list[str]]:
    """("image", names), ("video", [name]) or (None, []) for a record without either.

    Raises:
        LlavaError: a value that is not a path, or not a list of paths; an image and a video at once; codec data.
    """
    refuse_codec_data(record)
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

    An absolute name may lie inside too: below the folder as it is written, or as its own links spell it.

    Args:
        folder: where relative names start; None: they are paths of their own, and any is allowed.
        allow_absolute_paths: let a name lie outside.

    Raises:
        LlavaError: the name leaves the folder.
    """
    if not folder:
        return name
    if not allow_absolute_paths and not _lies_inside(folder, name.replace("\\", "/")):
        raise LlavaError(
            f"path {name!r}: leaves the folder {folder}, expected a path inside it (or set allow_absolute_paths)"
        )
    return os.path.join(folder, name)


def _lies_inside(folder: str, name: str) -> bool:
    if ".." not in name.split("/"):
        plain = os.path.normpath(name)
        if not os.path.isabs(name) or _begins_with(plain, os.path.abspath(folder)):
            return True
        if _begins_with(plain, os.path.realpath(folder)):
            return True
    elif not os.path.isabs(name):
        if os.path.normpath(name).split(os.sep)[0] == "..":  # out of the folder, wherever it goes from there
            return False
        name = os.path.join(folder, name)
    # the file system tells where links and ".." lead; the file itself may be a link to anywhere
    parent, last = os.path.split(name.rstrip("/"))
    try:
        return last not in ("", "..") and _begins_with(os.path.realpath(parent), os.path.realpath(folder))
    except ValueError:  # a null byte: no path
        return False


def _begins_with(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)
