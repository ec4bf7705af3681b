"""Clips that the tests make: a square that moves by a known vector over a view that pans by another."""

from fractions import Fraction
from itertools import chain

import numpy as np

# encoder: (suffixes, options, pixel format, whether its decoder exports vectors)
CODECS = {
    "libx264": (("mp4", "mkv", "mov", "avi", "ts"), {"preset": "veryfast", "qp": "8"}, "yuv420p", True),
    "mpeg4": (("mp4", "avi", "mkv"), {"q:v": "2"}, "yuv420p", True),
    "libx265": (("mp4", "mkv"), {"preset": "ultrafast", "x265-params": "log-level=none:qp=8"}, "yuv420p", False),
    "libvpx-vp9": (("webm", "mp4"), {"deadline": "realtime", "cpu-used": "8", "crf": "8"}, "yuv420p", False),
    "libsvtav1": (("mp4", "webm"), {"preset": "12", "crf": "12"}, "yuv420p", False),
    "libvpx": (("webm",), {"deadline": "realtime", "crf": "4", "b:v": "4M"}, "yuv420p", False),
    "ffv1": (("mkv",), {}, "bgr0", False),
    "mjpeg": (("avi",), {"q:v": "2"}, "yuvj420p", False),
    "mpeg2video": (("mpg",), {"q:v": "2"}, "yuv420p", True),
}


def view(height: int, width: int, seed: int = 0, cell: int = 2) -> np.ndarray:
    """Grey levels [height, width] from 40 to 215, of squares of `cell` pixels, smoothed so that codecs keep them."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (height // cell + 3, width // cell + 3)).astype(float)
    small = (small[1:, 1:] + small[:-1, 1:] + small[1:, :-1] + small[:-1, :-1]) / 4
    small = 40 + 175 * (small - small.min()) / np.ptp(small)
    return np.repeat(np.repeat(small, cell, 0), cell, 1)[:height, :width].astype(np.uint8)


def moving_square(count, size=(160, 128), pan=(0, 0), step=(3, 2), side=40, start=(16, 16), cell=2, flat=False):
    """`count` grey frames [H, W], and the (x, y) of the square in each; `pan` and `step` are (x, y) of the content."""
    width, height = size
    far = [abs(each) * count for each in pan]
    wide = view(height + far[1], width + far[0], cell=cell)
    square = np.full((side, side), 230, np.uint8) if flat else view(side, side, 1, cell)
    if flat:
        wide[:] = 60
    frames, places = [], []
    for at in range(count):
        x0, y0 = (far[i] * (pan[i] > 0) - pan[i] * at for i in (0, 1))
        frame = wide[y0 : y0 + height, x0 : x0 + width].copy()
        x, y = start[0] + step[0] * at, start[1] + step[1] * at
        frame[y : y + side, x : x + side] = square
        frames.append(frame)
        places.append((x, y))
    return frames, places


def inside(place, side, block, shape, margin=0):
    """[rows, columns]: the blocks that lie wholly in the square at `place` and `margin` pixels around it."""
    starts = [np.arange(count) * block for count in shape[:2]]
    down, across = (
        (start >= at - margin) & (start + block <= at + side + margin)
        for start, at in zip(starts, place[::-1], strict=True)
    )
    return down[:, None] & across


def write(path, frames, codec="libx264", rate=10, times=None, rotation=None, **changes):
    """A clip of [H, W] or [H, W, 3] uint8 frames; `changes` are options of the encoder, and `pix_fmt`."""
    import av

    _, options, pix_fmt, _ = CODECS[codec]
    pix_fmt = changes.pop("pix_fmt", pix_fmt)
    container_options = changes.pop("container_options", {})
    with av.open(str(path), "w", options=container_options) as container:
        stream = container.add_stream(codec, rate=rate, options={**options, **changes})
        frames = iter(frames)
        first = next(frames)
        stream.height, stream.width = first.shape[:2]
        stream.pix_fmt = pix_fmt
        if codec in ("mpeg4", "mpeg2video", "mjpeg"):
            stream.bit_rate = 20_000_000
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for at, pixels in enumerate(chain([first], frames)):
            pixels = np.repeat(pixels[..., None], 3, 2) if pixels.ndim == 2 else pixels
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[at], Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)
