"""Reading pictures and videos; the code is in `llava.images.reading`."""

from llava.data.paths import resolve_path
from llava.images.reading import Video, frame_indices, load_image, load_video, time_instruction

__all__ = ["Video", "frame_indices", "load_image", "load_video", "resolve_path", "time_instruction"]
