"""Reading pictures and videos from disk."""

import contextlib
import math
import os
import re
from typing import NamedTuple

import numpy as np
from PIL import Image

from llava.errors import LlavaError
from llava.images import PICTURE_SUFFIXES

FOLDER_FPS = 2.0  # LLaVA-NeXT takes a folder of frames for two frames a second ...
_FOLDER_FRAMES = 10  # ... and gives the model ten of them unless told otherwise
_MAX_SIDE, _MAX_RATIO = 25_000, 200


class Video(NamedTuple):
    """Sampled frames (PIL, RGB, all of one size), the clip's seconds, and the seconds of each frame."""

    frames: list[Image.Image]
    seconds: float
    times: list[float]


def load_image(path: str) -> Image.Image:
    """The whole picture as RGB.

    Raises:
        LlavaError: missing, not a picture, cut short, or of a shape that would fill the memory when it is squared or
            scaled up (a side over 25,000 pixels, or one over 200 times the other).
    """
    with opened_image(path) as image:
        return image.convert("RGB")


@contextlib.contextmanager
def opened_image(path: str):
    """A picture of which only the header has been read; what is wrong with it, also while it is decoded, is told as
    `load_image` says."""
    try:
        with Image.open(path) as image:
            long, short = max(image.size), min(image.size)
            if long > _MAX_SIDE or long > _MAX_RATIO * short:
                raise LlavaError(f"image {path}: found {image.width}x{image.height} pixels, which is too long a shape")
            yield image
    except LlavaError:
        raise
    except FileNotFoundError:
        raise LlavaError(f"image {path}: no such file") from None
    except MemoryError:
        raise
    except Exception as error:  # decoders raise nearly anything for broken data
        reason = str(error) or type(error).__name__
        raise LlavaError(f"image {path}: cannot be read ({reason})") from None


def load_video(path: str, video_fps=1, frames_upbound: int = 0, force_sample: bool = False) -> Video:
    """Frames of a video file, or of a folder of pictures in the natural order of their names (2 before 10).

    A file is sampled as LLaVA-NeXT does: `video_fps` frames a second, but evenly spread `frames_upbound` frames if
    that would be more (or always, with `force_sample`); 0 sets no bound. A folder counts as two frames a second and
    gives all its frames, or evenly spread ones if there are more than the bound (10 if none is set).

    Raises:
        LlavaError: missing, without frames, broken, or a file without PyAV installed.
    """
    if not os.path.exists(path):
        raise LlavaError(f"video {path}: no such file or folder")
    if os.path.isdir(path):
        return _load_folder(path, frames_upbound, force_sample)
    return _load_file(path, video_fps, frames_upbound, force_sample)


def time_instruction(video) -> str:
    """What LLaVA-NeXT tells the model about a clip's length and frames (with `add_time_instruction`).

    video: a `Video`, or what else has its seconds and times.
    """
    times = ",".join(f"{time:.2f}s" for time in video.times)
    count = len(video.times)
    return (
        f"The video lasts for {video.seconds:.2f} seconds, and {count} frames are uniformly sampled from it. "
        f"These frames are located at {times}.Please answer the following questions related to this video."
    )


def frame_indices(total: int, fps: float, video_fps, frames_upbound: int, force_sample: bool):
    """Which of `total` frames are taken from a file of `fps` frames a second, and the second of each.

    Without a bound the times are counted in sampling steps, as LLaVA-NeXT does: seconds only where video_fps is 1.
    """
    step = max(round(fps / video_fps), 1)
    indices = list(range(0, total, step))
    if frames_upbound > 0 and (len(indices) > frames_upbound or force_sample):
        indices = spread(total, frames_upbound)
        return indices, [index / fps for index in indices]
    return indices, [index / step for index in indices]


def spread(total: int, count: int) -> list[int]:
    """`count` of `total` frames, evenly from the first to the last; some more than once if there are fewer."""
    return np.linspace(0, total - 1, count, dtype=int).tolist()


def _natural(name: str) -> tuple:
    """What names sort by, digits in them as numbers; the name itself decides between equal ones (1 and 01)."""
    parts = re.split(r"([0-9]+)", name)  # text and digits in turn
    return [int(part) if at % 2 else part for at, part in enumerate(parts)], name


def folder_pictures(path: str) -> list[str]:
    """The paths of a folder's pictures, in the natural order of their names.

    Raises:
        LlavaError: there are none.
    """
    pictures = (name for name in os.listdir(path) if name.lower().endswith(PICTURE_SUFFIXES))
    names = sorted((name for name in pictures if not name.startswith(".")), key=_natural)
    if not names:
        raise LlavaError(f"video {path}: found no pictures in the folder, expected frames")
    return [os.path.join(path, name) for name in names]


def folder_frames(path: str, frames_upbound: int, force_sample: bool) -> tuple[list[str], float, list[float]]:
    """Of a folder of pictures: the paths of the frames that are taken, the clip's seconds, the seconds of each frame.

    Raises:
        LlavaError: there are none.
    """
    names = folder_pictures(path)
    bound = frames_upbound if frames_upbound > 0 else _FOLDER_FRAMES
    more = len(names) > bound or (force_sample and frames_upbound > 0)
    indices = spread(len(names), bound) if more else list(range(len(names)))
    return [names[index] for index in indices], len(names) / FOLDER_FPS, [index / FOLDER_FPS for index in indices]


def check_one_size(path: str, sizes: list[tuple[int, int]]) -> None:
    """Refuse the frames of a folder if they are not all of one (width, height)."""
    if len(set(sizes)) > 1:
        raise LlavaError(f"video {path}: found frames of sizes {sorted(set(sizes))}, expected one size")


def _load_folder(path: str, frames_upbound: int, force_sample: bool) -> Video:
    names, seconds, times = folder_frames(path, frames_upbound, force_sample)
    frames = [load_image(name) for name in names]
    check_one_size(path, [frame.size for frame in frames])
    return Video(frames, seconds, times)


class VideoHeader(NamedTuple):
    """What a video file says of itself: its frames, those of a second, and (width, height)."""

    frames: int
    fps: float
    size: tuple[int, int]


def read_header(path: str) -> VideoHeader:
    """The header of a video file; frames are decoded, to be counted, only where it does not say how many there are.

    Raises:
        LlavaError: broken, without frames, or PyAV is not installed.
    """
    with pyav(path) as av:
        with av.open(path) as container:
            stream = video_stream(container, path)
            fps = float(stream.average_rate or stream.guessed_rate or 0)
            total, size = stream.frames, (stream.width, stream.height)
        if not total:
            total = _count_frames(av, path)
        if not fps or not math.isfinite(fps) or not total:
            raise LlavaError(f"video {path}: found {total} frames at {fps} a second")
        return VideoHeader(total, fps, size)


def video_stream(container, path: str):
    """The first video stream of an opened file that is not the cover of a piece of music.

    Raises:
        LlavaError: there is none.
    """
    for stream in container.streams.video:
        if not stream.disposition & type(stream.disposition).attached_pic:
            return stream
    raise LlavaError(f"video {path}: found no video stream")


@contextlib.contextmanager
def pyav(path: str):
    """PyAV; what is wrong with a file is a `LlavaError`."""
    try:
        import av
    except ImportError:
        raise LlavaError(f"video {path}: reading a video file needs PyAV; install it with: pip install av") from None
    try:
        yield av
    except (av.FFmpegError, OSError) as error:
        raise LlavaError(f"video {path}: cannot be read ({error})") from None


def _load_file(path: str, video_fps, frames_upbound: int, force_sample: bool) -> Video:
    total, fps, _ = read_header(path)
    with pyav(path) as av:
        indices, times = frame_indices(total, fps, video_fps, frames_upbound, force_sample)
        frames = _decode(av, path, set(indices))
        if len(frames) < len(set(indices)):  # the header promised more frames than there are
            total = _count_frames(av, path)
            indices, times = frame_indices(total, fps, video_fps, frames_upbound, force_sample)
            frames = _decode(av, path, set(indices))
        if not indices or len(frames) < len(set(indices)):
            raise LlavaError(f"video {path}: found {len(frames)} frames that decode")
        return Video([frames[index] for index in indices], total / fps, times)


def _count_frames(av, path: str) -> int:
    with av.open(path) as container:
        return sum(1 for _ in container.decode(video_stream(container, path)))


def _decode(av, path: str, wanted: set[int]) -> dict[int, Image.Image]:
    """The wanted frames by number; decoding stops after the last of them."""
    frames, last = {}, max(wanted, default=-1)
    with av.open(path) as container:
        stream = video_stream(container, path)
        stream.thread_type = "AUTO"
        for index, frame in enumerate(container.decode(stream)):
            if index in wanted:
                frames[index] = frame.to_image()
            if index >= last:
                break
    return frames
