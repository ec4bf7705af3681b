"""Sampled frames of a clip and the frames before them, in one pass: of a video file, a folder, an animation."""

from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

import numpy as np
from PIL import Image

from llava.errors import LlavaError
from llava.images.energy import Luma
from llava.images.reading import FOLDER_FPS, check_one_size, folder_pictures, load_image, opened_image, video_stream

_FAR = 100  # frames from one sample to the next at which a seek is tried
_LONG = 48  # frames to be decoded after a keyframe for which a sample may lie a little earlier instead ...
_EARLIER = 1 / 8  # ... by this share of the way from one sample to the next
_PAST = 16  # frames: no codec here refers further back
_WITHOUT_VECTORS = ("hevc", "vp8", "vp9", "av1", "libdav1d", "libaom-av1")  # decoders
_B_FRAME = 3  # FFmpeg's AV_PICTURE_TYPE_B


class _NoSeeking(Exception):
    """The file has no times, or its container cannot be sought in."""


class Sample(NamedTuple):
    """One sampled frame.

    Attributes:
        index: its number in the clip.
        time: its second.
        pixels: uint8 [H, W, 3], RGB; of a decoder's buffer, to be copied.
        now, before: uint8 luma maps of it and of the frame displayed before it, or None.
        vectors, distances: those that the decoder exported, or None, and how many frames back they may point.
    """

    index: int
    time: float
    pixels: np.ndarray
    now: np.ndarray
    before: np.ndarray | None
    vectors: np.ndarray | None = None
    distances: tuple[int, ...] = (1,)


class FolderSamples:
    """Of a folder of pictures, two a second."""

    turns = 0

    def __init__(self, path: str, size: tuple[int, int] | None):
        self.path, self.size, self.luma = path, size, None
        self.names = folder_pictures(path)
        self.total, self.seconds = len(self.names), len(self.names) / FOLDER_FPS

    def read(self, wanted: list[int]) -> Iterator[Sample]:
        """Those of these numbers, which rise."""
        last = earlier = first = None
        for index in wanted:
            before = earlier if last == index - 1 else self._picture(index - 1)
            picture = self._picture(index)
            first = first or picture.size
            check_one_size(self.path, [first, picture.size, *([before.size] if before else [])])
            self.luma = self.luma or Luma.of(*first)
            yield _of_picture(index, index / FOLDER_FPS, picture, before, self.luma, self.size)
            last, earlier = index, picture

    def _picture(self, index: int) -> Image.Image | None:
        return load_image(self.names[index]) if index >= 0 else None


class AnimationSamples:
    """Of an animated picture (GIF, WebP, PNG), or of a still one: one frame."""

    turns = 0

    def __init__(self, path: str, size: tuple[int, int] | None):
        self.path, self.size, self.seconds = path, size, 0.0
        with opened_image(path) as image:
            self.total, self.luma = getattr(image, "n_frames", 1), Luma.of(*image.size)

    def read(self, wanted: list[int]) -> Iterator[Sample]:
        """Those of these numbers, which rise, and the last of which is the clip's last."""
        asked, before, self.seconds = set(wanted), None, 0.0
        needed = asked | {index - 1 for index in wanted}
        with opened_image(self.path) as image:
            for index in range(wanted[-1] + 1):
                image.seek(index)
                picture = image.convert("RGB") if index in needed else None
                if index in asked:
                    yield _of_picture(index, self.seconds, picture, before, self.luma, self.size)
                before = picture
                self.seconds += (image.info.get("duration") or 1000 / FOLDER_FPS) / 1000


def _of_picture(index, time, picture, before, luma: Luma, size) -> Sample:
    now, earlier = (
        each and np.asarray(each.convert("L").resize((luma.width, luma.height), Image.Resampling.BOX))
        for each in (picture, before)
    )
    if size and size != picture.size:
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    return Sample(index, time, np.asarray(picture), now, earlier)


class FileSamples:
    """Of a video file.

    Frames are decoded from the first on; where samples lie far apart (a film), from the keyframe before each. There
    they are numbered by their time and the average rate, and one that is a long way from its keyframe, but not
    from one sample to the next, is the frame after the keyframe instead.

    Attributes:
        total, seconds: as the header says; `total` is corrected by what is found.
        turns: quarters by which the picture is to be turned counter-clockwise, after `read` has begun.
    """

    def __init__(self, av, path: str, frames: int, size, max_alive: int, motion: bool):
        self.av, self.path, self.size, self.max_alive, self.motion = av, path, size, max_alive, motion
        self.luma, self.turns, self.reached, self._start = None, 0, 0, None
        self._opened = av.open(path)  # opening looks at some frames, so it is done once
        try:
            self._read_header(self._opened, frames)
        except BaseException:
            if self._opened:
                self._opened.close()
            raise

    def _read_header(self, container, frames: int) -> None:
        stream = video_stream(container, self.path)
        self.fps = float(stream.average_rate or stream.guessed_rate or 0)
        duration = float(stream.duration * stream.time_base) if stream.duration else (container.duration or 0) / 1e6
        self.total = stream.frames or round(duration * self.fps)
        self.seeks = self.fps > 0 and self.total > _FAR * max(frames - 1, 1)
        if not stream.frames and not self.seeks:
            self.total, self._opened = sum(1 for packet in container.demux(stream) if packet.size), None
            container.close()
        self.fps = self.fps or 1.0
        if self.total < 1:
            raise LlavaError(f"video {self.path}: found no frames")

    @property
    def seconds(self) -> float:
        """Of the whole clip."""
        return self.total / self.fps

    def read(self, wanted: list[int]) -> Iterator[Sample]:
        """Those of these numbers, which rise; fewer if the file ends before, and `correct` is to be called then."""
        self.reached, self._first = 0, None
        self._colours, self._greys = (self.av.video.reformatter.VideoReformatter() for _ in range(2))
        opened, self._opened = self._opened, None
        with opened or self.av.open(self.path) as container:
            stream = video_stream(container, self.path)
            context, self._start = stream.codec_context, None
            if self.motion and context.codec.name not in _WITHOUT_VECTORS:
                context.flags2 |= self.av.codec.context.Flags2.export_mvs.value
                stream.thread_type = "SLICE"  # threads by frames export vectors of frames that are not finished
            else:
                stream.thread_type = "AUTO"
            context.thread_count = max(min(self.max_alive // 4, 4), 1)  # each of them holds frames
            if not self.seeks:
                yield from self._in_turn(container, stream, wanted)
                return
            try:
                yield from self._by_seeks(container, stream, wanted)
            except _NoSeeking:
                self.reached = 0

    def correct(self) -> None:
        """After a reading that found too few frames: what there is to sample from.

        Raises:
            LlavaError: none.
        """
        if self.seeks and not self.reached:
            self.seeks = False
        elif not 0 < self.reached < self.total:
            raise LlavaError(f"video {self.path}: found {self.reached} frames that decode")
        else:
            self.total = self.reached

    def _in_turn(self, container, stream, wanted) -> Iterator[Sample]:
        asked, before, anchor = set(wanted), None, 0
        for index, frame in enumerate(self._decoded(container, stream)):
            self._start = frame.pts if index == 0 else self._start
            if index in asked:
                yield self._sample(index, frame, before, index - anchor)
            self.reached = index + 1
            if index >= wanted[-1]:
                return
            before, anchor = frame, anchor if frame.pict_type == _B_FRAME else index

    def _by_seeks(self, container, stream, wanted) -> Iterator[Sample]:
        position, anchor, before, seeks, frames = -1, 0, None, True, self._decoded(container, stream)
        early = _EARLIER * self.total / max(len(wanted) - 1, 1)
        for want in wanted:
            if seeks and want - position > _FAR:
                index, frames = self._seek(container, stream, want)
                before, anchor, seeks = None, index, index > position
                if seeks and _LONG < want - index <= early:
                    want = index + 1
            for frame in frames:
                index = self._number(frame)
                if index >= want:
                    break
                before, anchor = frame, anchor if frame.pict_type == _B_FRAME else index
                position = max(position, index)
            else:
                self.reached = position + 1
                return
            if before is None and index > 0:  # it has no frame before it here: the next one stands for that
                yield self._sample(index, frame, next(frames, None), 0)
            else:
                yield self._sample(index, frame, before, index - anchor)
            before, anchor, position = frame, anchor if frame.pict_type == _B_FRAME else index, index
        self.reached = position + 1

    def _seek(self, container, stream, want: int) -> tuple[int, Iterator]:
        """The number of the first frame from a keyframe before `want` on, and the frames from there.

        Some containers lead to a keyframe after it, or behind the last one: then from further before.
        """
        for back in (1, 64, 512):
            target = self._start + max(want - back, 0) / (self.fps * float(stream.time_base))
            container.seek(int(target), stream=stream)
            frames = self._decoded(container, stream)
            first = next(frames, None)
            index = None if first is None else self._number(first)
            if first is not None and index < max(want, 1):
                break
        if first is None:
            raise _NoSeeking
        return index, chain([first], frames)

    def _number(self, frame) -> int:
        if frame.pts is None:
            raise _NoSeeking
        if self._start is None:
            self._start = frame.pts
        return round(float((frame.pts - self._start) * frame.time_base) * self.fps)

    def _decoded(self, container, stream) -> Iterator:
        """Frames one by one. What is damaged is left out, and the end may be missing; nothing at all is an error."""
        packets, some, fault = container.demux(stream), False, None
        while True:
            try:
                packet = next(packets, None)
                if packet is None:
                    break
                decoded = packet.decode()
            except self.av.FFmpegError as error:  # of a broken container there is no next packet
                fault = error
                continue
            some = some or bool(decoded)
            yield from decoded
        if fault and not some:
            raise fault

    def _sample(self, index: int, frame, before, distance: int) -> Sample:
        """`distance`: to the frame before that others may refer to; 0 if `before` is not displayed before it."""
        if self._first is None:
            self._first, self.turns = (frame.width, frame.height), round(frame.rotation / 90) % 4
            self.luma = Luma.of(*self._first)
        vectors, distances = None, (1,)
        if distance and (frame.width, frame.height) == self._first:
            exported = frame.side_data.get("MOTION_VECTORS")
            vectors = None if exported is None else exported.to_ndarray()
            distance = distance if distance <= _PAST else 1
            distances = (distance,)
            if frame.pict_type == _B_FRAME:
                distances = distance, *range(1, min(distance, 3))
                # FFmpeg exports nothing but zeros for those of MPEG-4
                if vectors is not None and not (vectors["motion_x"].any() or vectors["motion_y"].any()):
                    vectors = None
        now, earlier = (each and self._grey(each) for each in (frame, before))
        numbered = frame.pts is None or self._start is None
        time = index / self.fps if numbered else float((frame.pts - self._start) * frame.time_base)
        return Sample(index, time, self._rgb(frame), now, earlier, vectors, distances)

    def _grey(self, frame) -> np.ndarray:
        luma, area = self.luma, self.av.video.reformatter.Interpolation.AREA
        return _pixels(self._greys.reformat(frame, luma.width, luma.height, "gray", interpolation=area), 1)[..., 0]

    def _rgb(self, frame) -> np.ndarray:
        width, height = self._first
        if self.size:
            width, height = self.size[::-1] if self.turns % 2 else self.size
        if (width, height) == (frame.width, frame.height):
            return _pixels(self._colours.reformat(frame, width, height, "rgb24"), 3)
        smooth = self.av.video.reformatter.Interpolation.BICUBIC
        return _pixels(self._colours.reformat(frame, width, height, "rgb24", interpolation=smooth), 3)


def _pixels(frame, channels: int) -> np.ndarray:
    """[H, W, channels] of a packed frame's own memory."""
    plane = frame.planes[0]
    rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: frame.height, : frame.width * channels]
    return rows.reshape(frame.height, frame.width, channels)
