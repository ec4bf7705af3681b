"""Which images or video a record names, and where they are."""

import os

from llava.errors import LlavaError


def media_of(record: dict) -> tuple[str | None, list[str]]:
    """("image", names), ("video", [name]) or (None, []) for a record without either.

    Raises:
        LlavaError: a value that is not a path, or not a list of paths.
    """
    image, video = record.get("image"), record.get("video")
    if image:
        names = image if isinstance(image, list) else [image]
        for name in names:
            if not isinstance(name, str) or not name:
                raise LlavaError(f"image: found {name!r}, expected a path")
        return "image", names
    if video:
        names = video if isinstance(video, list) else [video]
        if len(names) != 1 or not isinstance(names[0], str):
            raise LlavaError(f"video: found {video!r}, expected one path")
        return "video", names
    return None, []


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
