"""What pictures and videos say of themselves in their headers; nothing is decoded."""

import os
from typing import NamedTuple

from llava.errors import LlavaError
from llava.images.reading import check_one_size, folder_frames, frame_indices, opened_image, read_header


class Clip(NamedTuple):
    """What `llava.images.reading.load_video` will find.

    Attributes:
        frames: how many it takes.
        size: (width, height) of each.
        seconds: of the clip.
        times: the second of each frame.
        exact: False where a file's header may promise more frames than there are; it is the most, then.
    """

    frames: int
    size: tuple[int, int]
    seconds: float
    times: list[float]
    exact: bool


def image_size(path: str) -> tuple[int, int]:
    """(width, height) of what `llava.images.reading.load_image` reads, orientation included.

    Raises:
        LlavaError: missing, not a picture, or of a shape that `load_image` refuses. What is wrong behind the header
            is not seen.
    """
    with opened_image(path) as image:
        return image.size


def clip(path: str, video_fps=1, frames_upbound: int = 0, force_sample: bool = False) -> Clip:
    """Of a video file or a folder of frames; arguments as `load_video`'s.

    Raises:
        LlavaError: missing, without frames, broken, or a file without PyAV installed.
    """
    if not os.path.exists(path):
        raise LlavaError(f"video {path}: no such file or folder")
    if os.path.isdir(path):
        names, seconds, times = folder_frames(path, frames_upbound, force_sample)
        sizes = [image_size(name) for name in names]
        check_one_size(path, sizes)
        return Clip(len(names), sizes[0], seconds, times, exact=True)
    total, fps, size = read_header(path)
    indices, times = frame_indices(total, fps, video_fps, frames_upbound, force_sample)
    return Clip(len(indices), size, total / fps, times, exact=False)
