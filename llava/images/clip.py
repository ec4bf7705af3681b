"""Reading a clip through its codec: frames spread over it, and where in each of them something happens."""

import os
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np

from llava.errors import LlavaError
from llava.images import PICTURE_SUFFIXES
from llava.images.clip_samples import AnimationSamples, FileSamples, FolderSamples, Sample
from llava.images.energy import FUSIONS, Moved, changed_share, frame_energy, moved, thumbnail
from llava.images.reading import pyav, spread


class Clip(NamedTuple):
    """Sampled frames of a clip and their energy.

    Attributes:
        frames_THWC: uint8, RGB.
        frame_ids_T: int64, which frames of the clip they are; a clip of fewer frames repeats some.
        energy_THW: float32 of 0..1 over blocks: h x w of them cover a frame evenly (4x4 pixels of a large picture).
            Zero where a frame has none before it, or is the same as the one before.
        vectors: float32 [T, rows, columns, 2] of (dx, dy), by how many pixels of the frame the content of a block moved
            since the frame displayed before, camera included; None without motion. A block is `vector_block` of
            the energy's on a side.
        source: "exported" (vectors by the decoder, and by block matching for the frames where it gave none),
            "matched" (all by block matching), "difference" (no vectors: plain difference to the frame before).
        seconds: of the whole clip.
        times: the second of each frame.
        changed_T: float32, the share of each frame that is not in the sampled frame before it, wherever the camera
            turned; near 1 at a cut.
        vector_block: see `vectors`.
    """

    frames_THWC: np.ndarray
    frame_ids_T: np.ndarray
    energy_THW: np.ndarray
    vectors: np.ndarray | None
    source: str
    seconds: float
    times: list[float]
    changed_T: np.ndarray
    vector_block: int


def read_clip(path, frames=64, *, max_alive=16, size=None, motion=True, weights=(1, 1), fuse="weighted") -> Clip:
    """`frames` frames evenly from the first to the last, and where in each something moved or came up.

    Motion and what it does not explain of the luma are taken against the frame displayed before the sampled one, the
    camera's motion taken out, normalised and fused as in OneVision-Encoder's pipeline; its patched decoder is not
    needed. Vectors are those that the decoder exports (H.264, MPEG-4 and their like), else found by block matching.

    Args:
        path: a video file (PyAV reads it), an animated picture, or a folder of pictures in the natural order of names.
        frames: how many, T.
        max_alive: decoded pictures held at a time, at most, beside the T that are returned; at least 4.
        size: (width, height) that frames are scaled to; None leaves them as they are. The energy is not touched.
        motion: False for the plain difference to the frame before.
        weights: of motion and residual in the weighted mean.
        fuse: weighted | max | sum | geomean.

    Raises:
        LlavaError: missing, no video in it, nothing that decodes, frames of several sizes in a folder, or a file
            without PyAV installed; an argument out of range.
    """
    path, size = os.fspath(path), tuple(size) if isinstance(size, list) else size
    _check(frames, max_alive, size, weights, fuse)
    if not os.path.exists(path):
        raise LlavaError(f"video {path}: no such file or folder")
    folder = os.path.isdir(path)
    if not folder and not os.path.isfile(path):
        raise LlavaError(f"video {path}: found neither a file nor a folder")
    with nullcontext() if folder or path.lower().endswith(PICTURE_SUFFIXES) else pyav(path) as av:
        if av:
            samples = FileSamples(av, path, frames, size, max_alive, motion)
        else:
            samples = (FolderSamples if folder else AnimationSamples)(path, size)
        while True:
            ids = spread(samples.total, frames)
            taken = _Taken(len(set(ids)), motion, weights, fuse)
            for sample in samples.read(sorted(set(ids))):
                taken.add(sample, samples.luma)
            if taken.count == len(set(ids)):
                return taken.clip(ids, samples)
            samples.correct()


def _check(frames, max_alive, size, weights, fuse) -> None:
    for name, value, least in (("frames", frames, 1), ("max_alive", max_alive, 4)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            raise LlavaError(f"{name}: found {value!r}, expected a whole number of at least {least}")
    if size is not None and not (isinstance(size, tuple) and len(size) == 2 and min(size) >= 1):
        raise LlavaError(f"size: found {size!r}, expected (width, height)")
    if len(weights) != 2 or not all(np.isfinite(weights)) or min(weights) < 0 or not sum(weights):
        raise LlavaError(f"weights: found {weights!r}, expected two numbers, those of motion and residual, not both 0")
    if fuse not in FUSIONS:
        raise LlavaError(f"fuse: found {fuse!r}, expected one of {', '.join(FUSIONS)}")


class _Taken:
    """What is kept of the samples of one reading."""

    def __init__(self, count: int, motion: bool, weights, fuse: str):
        self.room, self.motion, self.weights, self.fuse = count, motion, tuple(weights), fuse
        self.count, self.exported, self.earlier = 0, False, None
        self.indices, self.times, self.vectors = [], [], {}

    def add(self, sample: Sample, luma) -> None:
        at = self.count
        if not at:
            self.luma = luma
            self.frames = np.empty((self.room, *sample.pixels.shape), np.uint8)
            self.energy = np.zeros((self.room, luma.height, luma.width), np.float32)
            self.changed = np.zeros(self.room, np.float32)
        self.frames[at] = sample.pixels
        if sample.before is not None:
            if self.motion:
                found = moved(sample.now, sample.before, luma, sample.vectors, sample.distances)
            else:
                found = Moved(
                    np.maximum(sample.now, sample.before) - np.minimum(sample.now, sample.before), None, False
                )
            self.energy[at] = frame_energy(found, luma.block, self.fuse, self.weights)
            self.exported |= found.exported
            self.vectors[at] = found.vectors
        small = thumbnail(sample.now)
        if self.earlier is not None:
            self.changed[at] = changed_share(small, self.earlier)
        self.earlier = small
        self.indices.append(sample.index)
        self.times.append(sample.time)
        self.count += 1

    def clip(self, ids: list[int], samples) -> Clip:
        """Every frame as often as it is in `ids`, turned upright; a repeated one has energy where it comes first."""
        places = np.unique(ids, return_inverse=True)[1]
        again = np.flatnonzero(np.diff(places, prepend=-1) == 0)
        frames, energy, changed = self.frames, self.energy, self.changed
        vectors = self._all_vectors() if self.motion else None
        if len(again):
            frames, energy, changed = frames[places], energy[places], changed[places]
            energy[again], changed[again] = 0, 0
            vectors = None if vectors is None else vectors[places]
        if vectors is not None:
            vectors[again] = 0
            width, height = self.luma.picture
            vectors *= np.float32([frames.shape[2] / width, frames.shape[1] / height])
        if samples.turns:
            frames, energy = (np.ascontiguousarray(np.rot90(each, samples.turns, (1, 2))) for each in (frames, energy))
            vectors = None if vectors is None else _turned(vectors, samples.turns)
        source = "difference" if vectors is None else "exported" if self.exported else "matched"
        numbers, times = np.array(self.indices, np.int64)[places], [self.times[place] for place in places]
        return Clip(frames, numbers, energy, vectors, source, samples.seconds, times, changed, self.luma.block)

    def _all_vectors(self) -> np.ndarray:
        rows, columns = (-(-side // self.luma.block) for side in (self.luma.height, self.luma.width))
        vectors = np.zeros((self.room, rows, columns, 2), np.float32)
        for at, field in self.vectors.items():
            vectors[at] = field[:rows, :columns]
        return vectors


def _turned(vectors: np.ndarray, quarters: int) -> np.ndarray:
    """A field [T, rows, columns, 2] of a picture that is turned by so many quarters counter-clockwise."""
    for _ in range(quarters):
        vectors = np.rot90(vectors, 1, (1, 2))[..., ::-1] * np.float32([1, -1])
    return np.ascontiguousarray(vectors)
