"""A video file's frames as one array, as LLaVA-NeXT's readers give them. PyAV reads the file in both."""

import numpy as np

from llava.errors import LlavaError
from llava.images.reading import _decode, frame_indices, load_video, pyav, video_stream


def process_video_with_decord(video_file: str, data_args):
    """Frames of a video, sampled as in training; decord itself is not needed.

    Args:
        video_file: a file, or a folder of pictures (see `load_video`).
        data_args: has LLaVA-NeXT's `video_fps`, `frames_upbound` and `force_sample`.

    Returns:
        (frames uint8 [T, H, W, 3], the video's seconds, the frames' times as "0.00s,1.00s", T).

    Raises:
        LlavaError: missing, broken, without frames, or PyAV is not installed.
    """
    video = load_video(video_file, data_args.video_fps, data_args.frames_upbound, data_args.force_sample)
    times = ",".join(f"{time:.2f}s" for time in video.times)
    return _stacked(video.frames), video.seconds, times, len(video.frames)


def process_video_with_pyav(video_file: str, data_args):
    """Frames alone, uint8 [T, H, W, 3].

    They differ from `process_video_with_decord`'s as in LLaVA-NeXT: the rate is the number of frames by the last
    frame's time, and `force_sample` is not read. Arguments and errors are the same.
    """
    with pyav(video_file) as av:
        total, seconds = _count(av, video_file)
        rate = total / seconds if seconds else 1.0
        indices, _ = frame_indices(total, rate, data_args.video_fps, data_args.frames_upbound, False)
        frames = _decode(av, video_file, set(indices))
        return _stacked([frames[index] for index in indices])


def _count(av, path: str) -> tuple[int, float]:
    """Frames that decode, and the last one's time in seconds."""
    total, last = 0, 0.0
    with av.open(path) as container:
        stream = video_stream(container, path)
        stream.thread_type = "AUTO"
        for frame in container.decode(stream):
            total, last = total + 1, float(frame.time or 0)
    if not total:
        raise LlavaError(f"video {path}: found no frames that decode")
    return total, last


def _stacked(frames: list) -> np.ndarray:
    return np.stack([np.asarray(frame) for frame in frames])
