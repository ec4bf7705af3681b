"""What lmms-eval's tasks give as images and videos, as `Inference` takes it: a PIL image, or a list of frames."""

import os

from llava.errors import LlavaError
from llava.images import PICTURE_SUFFIXES
from llava.images.reading import load_image, load_video


def read_visual(visual, max_frames: int):
    """One item of a task's `doc_to_visual`, whose kind has to be told from itself.

    Args:
        visual: a PIL image; a path, an image's by its ending, else a video's; frames as a list of PIL images or an
            array [T, H, W, 3]; a video reader; or a dictionary that holds one of these.
        max_frames: frames taken of a video, evenly spread.

    Raises:
        LlavaError: anything else, or what cannot be read.
    """
    from PIL import Image

    visual = _content(visual)
    is_picture = isinstance(visual, str) and visual.lower().endswith(PICTURE_SUFFIXES) and not os.path.isdir(visual)
    return read_image(visual) if is_picture or isinstance(visual, Image.Image) else read_video(visual, max_frames)


def read_image(visual):
    """A PIL image in RGB from a PIL image or a path."""
    from PIL import Image

    visual = _content(visual)
    if isinstance(visual, Image.Image):
        return visual if visual.mode == "RGB" else visual.convert("RGB")
    if isinstance(visual, str):
        return load_image(visual)
    raise LlavaError(f"image: found {type(visual).__name__}, expected a PIL image or a path")


def read_video(visual, max_frames: int) -> list:
    """`max_frames` PIL frames, evenly spread, of a path, a list of frames, an array or a reader (decord, torchcodec).

    A shorter file repeats frames, as LLaVA-NeXT's own evaluation does; what came as frames is taken as it is.
    """
    visual = _content(visual)
    if isinstance(visual, str):
        return load_video(visual, frames_upbound=max_frames, force_sample=True).frames
    if not hasattr(visual, "__len__") or len(visual) == 0:
        raise LlavaError(f"video: found {type(visual).__name__}, expected a path, frames or a reader")
    indices = list(range(len(visual)))
    if len(visual) > max_frames:
        indices = [round(i * (len(visual) - 1) / max(max_frames - 1, 1)) for i in range(max_frames)]
    if hasattr(visual, "get_batch"):  # decord
        frames = visual.get_batch(indices)
        frames = frames.asnumpy() if hasattr(frames, "asnumpy") else frames
    elif hasattr(visual, "get_frames_at"):  # torchcodec: channels first
        frames = visual.get_frames_at(indices=indices).data.permute(0, 2, 3, 1)
    else:
        frames = [visual[index] for index in indices]
    return [_frame(frame) for frame in frames]


def _frame(frame):
    import numpy as np
    from PIL import Image

    if isinstance(frame, str | Image.Image):
        return read_image(frame)
    pixels = np.asarray(frame)
    if pixels.ndim != 3 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8:
        raise LlavaError(f"video: found a frame of {pixels.dtype} {pixels.shape}, expected uint8 [H, W, 3]")
    return Image.fromarray(pixels)


def _content(visual):
    """What a dictionary holds; anything else as it is."""
    if not isinstance(visual, dict):
        return visual
    for key in ("video_start", "video_end", "start_time", "end_time"):
        if visual.get(key) is not None:
            raise LlavaError(f"video: found {key}, expected a whole video (clips are not cut here)")
    if visual.get("type") == "audio" or "sampling_rate" in visual:
        raise LlavaError("audio: not taken, expected images or video")
    for key in ("url", "path", "image", "video"):
        if visual.get(key) is not None:
            return visual[key]
    raise LlavaError(f"visual: found a dictionary of {sorted(visual)}, expected url or path")
