"""Clips through the codec: which frames are read, how few are decoded and held, and what is wrong with files."""

import io
import os
import struct
import subprocess
import sys
import wave
import weakref

import numpy as np
import pytest
from PIL import Image

from llava.errors import LlavaError
from llava.images import clip_samples
from llava.images.clip import read_clip
from llava.images.reading import load_video
from llava.images.video_patches import patch_energy, select
from tests.images.clips import inside, moving_square, view, write

av = pytest.importorskip("av", reason="PyAV (the video extra) is not installed")
LONG = bool(os.environ.get("LLAVA_LONG_TESTS"))
LONGER = pytest.mark.skipif(not LONG, reason="a minute more: scripts/test_long.sh runs it (LLAVA_LONG_TESTS)")


# --- frames ---


@pytest.mark.parametrize("kind", ["mp4", "mkv", "folder"])
def test_frames_are_those_of_load_video(tmp_path, kind):
    frames, _ = moving_square(13)
    if kind == "folder":
        path = str(tmp_path)
        for at, pixels in enumerate(frames):
            Image.fromarray(pixels).save(tmp_path / f"{at}.png")
    else:
        path = write(tmp_path / f"a.{kind}", frames)
    for count in (1, 5, 13, 20):
        clip, video = read_clip(path, count), load_video(path, frames_upbound=count, force_sample=True)
        wanted = np.stack([np.asarray(frame) for frame in video.frames])
        repeats = clip.frame_ids_T
        if kind == "folder" and count == 20:
            repeats = np.linspace(0, 12, 20, dtype=int)
        assert repeats.tolist() == clip.frame_ids_T.tolist()
        assert np.array_equal(clip.frames_THWC, wanted)
        assert clip.seconds == pytest.approx(video.seconds) and clip.times == pytest.approx(video.times, abs=2e-3)


def test_repeated_frames_have_energy_once(tmp_path):
    frames, _ = moving_square(3)
    clip = read_clip(write(tmp_path / "a.mp4", frames), 8)
    assert clip.frame_ids_T.tolist() == [0, 0, 0, 0, 1, 1, 1, 2]
    assert np.flatnonzero(clip.energy_THW.any((1, 2))).tolist() == [4, 7]
    assert np.flatnonzero(clip.vectors.any((1, 2, 3))).tolist() == [4, 7]
    assert np.array_equal(clip.frames_THWC[4], clip.frames_THWC[6])


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animations(tmp_path, suffix):
    frames, places = moving_square(7)
    pictures = [Image.fromarray(frame) for frame in frames]
    path = tmp_path / f"a.{suffix}"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=200, lossless=True)
    clip = read_clip(path, 4)
    assert clip.frame_ids_T.tolist() == [0, 2, 4, 6] and clip.source == "matched"
    assert clip.seconds == pytest.approx(1.4) and clip.times == pytest.approx([0, 0.4, 0.8, 1.2])
    for at, index in enumerate(clip.frame_ids_T):
        assert np.abs(clip.frames_THWC[at].astype(int) - frames[index][..., None]).max() <= 3
        if at:
            square = inside(places[index], 40, 8, clip.vectors.shape[1:])
            assert np.median(clip.vectors[at][square], axis=0) == pytest.approx([3, 2], abs=0.1)


def test_a_folder_is_read_in_natural_order(tmp_path):
    frames, _ = moving_square(12)
    for at, pixels in enumerate(frames):
        Image.fromarray(pixels).save(tmp_path / f"f{at}.png")
    clip = read_clip(tmp_path, 4)
    assert clip.frame_ids_T.tolist() == [0, 3, 7, 11] and clip.source == "matched"
    assert np.array_equal(clip.frames_THWC[..., 0], np.stack(frames)[clip.frame_ids_T])
    lossless = read_clip(write(tmp_path / "a.mkv", frames, "ffv1", pix_fmt="gray"), 4)
    assert np.array_equal(clip.energy_THW, lossless.energy_THW) and np.array_equal(clip.vectors, lossless.vectors)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (9, 150), (640, 4), (16, 16)])
def test_frames_of_any_shape(tmp_path, size):
    for at in range(3):
        Image.fromarray(view(size[1], size[0], at)).save(tmp_path / f"{at}.png")
    for motion in (True, False):
        clip = read_clip(tmp_path, 3, motion=motion, size=[32, 16])
        assert clip.frames_THWC.shape == (3, 16, 32, 3) and np.isfinite(clip.energy_THW).all()
        assert patch_energy(clip, 16).shape == (3, 1, 2)


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_rotation_is_applied(tmp_path, turns):
    frames, _ = moving_square(8)
    upright = read_clip(write(tmp_path / "a.mp4", frames), 4)
    turned = read_clip(write(tmp_path / "b.mp4", frames, rotation=90 * turns), 4, size=None)
    assert np.array_equal(turned.frames_THWC, np.rot90(upright.frames_THWC, turns, (1, 2)))
    assert np.array_equal(turned.energy_THW, np.rot90(upright.energy_THW, turns, (1, 2)))
    x, y = {1: (2, -3), 2: (-3, -2), 3: (-2, 3)}[turns]  # of (3, 2)
    moving = np.abs(turned.vectors[2]).sum(-1) > 1
    assert np.median(turned.vectors[2][moving], axis=0) == pytest.approx([x, y], abs=0.3)
    small = read_clip(tmp_path / "b.mp4", 4, size=(64, 48))
    assert small.frames_THWC.shape == (4, 48, 64, 3)


@pytest.mark.parametrize(
    ("codec", "size", "changes"),
    [
        ("libx265", (160, 128), {"pix_fmt": "yuv420p10le"}),
        ("libx264", (160, 128), {"pix_fmt": "yuv422p10le"}),
        ("libx264", (161, 127), {"pix_fmt": "yuv444p"}),
        ("libvpx-vp9", (163, 129), {}),
        ("mpeg4", (158, 122), {}),
        ("ffv1", (651, 483), {"pix_fmt": "yuv420p16le"}),
    ],
)
def test_ten_bits_and_odd_sizes(tmp_path, codec, size, changes):
    frames, _ = moving_square(8, size)
    clip = read_clip(write(tmp_path / "a.mkv", frames, codec, **changes), 8)
    assert clip.frames_THWC.shape == (8, size[1], size[0], 3)
    for at in range(8):
        assert np.abs(clip.frames_THWC[at].astype(int) - frames[at][..., None]).mean() < 3
    energy = patch_energy(clip, 16)
    assert energy.shape == (8, size[1] // 16, size[0] // 16)
    assert all(each[1:4, 1:4].mean() > 3 * each[4:].mean() for each in energy[1:3])


def test_size_scales_frames_and_vectors_alone(tmp_path):
    frames, _ = moving_square(8)
    path = write(tmp_path / "a.mp4", frames)
    clip, small = read_clip(path, 4), read_clip(path, 4, size=(80, 32))
    assert small.frames_THWC.shape == (4, 32, 80, 3)
    wanted = clip.frames_THWC.reshape(4, 32, 4, 80, 2, 3).mean((2, 4))
    assert np.abs(small.frames_THWC - wanted).mean() < 6
    assert np.array_equal(clip.energy_THW, small.energy_THW)
    np.testing.assert_allclose(small.vectors, clip.vectors * np.float32([0.5, 0.25]))


def test_a_variable_frame_rate(tmp_path):
    frames, _ = moving_square(12)
    times = [0, 1, 2, 10, 11, 30, 31, 32, 50, 51, 52, 90]
    clip = read_clip(write(tmp_path / "a.mkv", frames, times=times), 6)
    assert clip.frame_ids_T.tolist() == [0, 2, 4, 6, 8, 11]
    assert clip.times == pytest.approx([0, 0.2, 1.1, 3.1, 5.0, 9.0], abs=2e-3)
    assert np.abs(clip.frames_THWC[3].astype(int) - frames[6][..., None]).mean() < 3


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_two_readings_are_equal_whatever_the_threads(tmp_path, codec):
    frames, _ = moving_square(20, (320, 192), (2, 0))
    path = write(tmp_path / "a.mp4", frames, codec)
    one, two = read_clip(path, 8, max_alive=4), read_clip(path, 8, max_alive=32)
    for a, b in zip(one, two, strict=True):
        assert np.array_equal(a, b)


# --- long clips ---


class Held:
    """A decoded frame that can be counted."""

    def __init__(self, frame, alive):
        self.frame = frame
        alive.add(self)

    def __getattr__(self, name):
        return getattr(self.frame, name)


@pytest.fixture
def counted(monkeypatch):
    """[frames decoded, the most that were held at a time]"""
    found, alive, decoded, sample = (
        [0, 0],
        weakref.WeakSet(),
        clip_samples.FileSamples._decoded,
        clip_samples.FileSamples._sample,
    )

    def holding(self, container, stream):
        for frame in decoded(self, container, stream):
            held = Held(frame, alive)
            del frame
            found[0] += 1
            found[1] = max(found[1], len(alive))
            yield held
            del held

    def unwrapped(self, index, frame, before, distance):
        return sample(self, index, frame.frame, before and before.frame, distance)

    monkeypatch.setattr(clip_samples.FileSamples, "_decoded", holding)
    monkeypatch.setattr(clip_samples.FileSamples, "_sample", unwrapped)
    return found


def dark_to_light(count):
    """Frames that tell their number by the grey levels of their halves."""
    for at in range(count):
        frame = np.zeros((32, 48), np.uint8)
        frame[:16], frame[16:] = 20 + at // 16 % 14 * 16, 20 + at % 16 * 14
        yield frame


def number(pixels) -> int:
    high, low = (np.median(part[..., 0]) for part in (pixels[2:14], pixels[18:30]))
    return round((high - 20) / 16) * 16 + round((low - 20) / 14)


@pytest.mark.parametrize(
    ("codec", "suffix"), [("mpeg4", "mp4"), ("mpeg4", "mkv"), ("libx264", "mp4"), ("libx264", "ts")]
)
def test_a_long_clip_is_not_decoded_whole(tmp_path, counted, codec, suffix):
    total = 1500
    path = write(tmp_path / f"a.{suffix}", dark_to_light(total), codec, rate=25, g="12")
    clip = read_clip(path, 8)
    ids = np.linspace(0, total - 1, 8, dtype=int)
    assert clip.frame_ids_T.tolist() == ids.tolist()
    assert counted[0] < total / 3 and counted[1] <= 4
    assert [number(frame) for frame in clip.frames_THWC] == (ids % 224).tolist()
    assert clip.energy_THW[1:].any((1, 2)).all()
    assert clip.times == pytest.approx(ids / 25, abs=2e-3) and clip.seconds == pytest.approx(total / 25, abs=0.1)


def test_far_from_a_keyframe_of_a_long_clip_its_neighbour_is_taken(tmp_path, counted):
    path = write(tmp_path / "a.mp4", dark_to_light(6000), "mpeg4", rate=25, g="100", sc_threshold="1000000000")
    clip = read_clip(path, 8)
    ids = np.linspace(0, 5999, 8, dtype=int)
    wanted = np.where(ids % 100 > 48, ids // 100 * 100 + 1, ids)
    assert clip.frame_ids_T.tolist() == wanted.tolist() and not np.array_equal(wanted, ids)
    assert counted[0] < 8 * 25
    assert [number(frame) for frame in clip.frames_THWC] == (wanted % 224).tolist()


@LONGER
def test_a_film_of_two_hours(tmp_path, counted):
    total = 2 * 3600 * 24
    path = write(tmp_path / "a.mp4", dark_to_light(total), "libx264", rate=24, g="250", preset="ultrafast")
    clip = read_clip(path, 64)
    ids = np.linspace(0, total - 1, 64, dtype=int)
    assert counted[0] < 64 * 60 and counted[1] <= 4
    assert (clip.frame_ids_T <= ids).all() and (ids - clip.frame_ids_T).max() <= 250
    assert [number(frame) for frame in clip.frames_THWC] == (clip.frame_ids_T % 224).tolist()
    assert clip.seconds == pytest.approx(7200)


PEAK = """
import resource, sys
from llava.images.clip import read_clip
read_clip(sys.argv[1], 3, size=(160, 96))
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
clip = read_clip(sys.argv[2], 64, size=(160, 96))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
kept = sum(part.nbytes for part in (clip.frames_THWC, clip.energy_THW, clip.vectors)) / 1024
print(len(set(clip.frame_ids_T.tolist())), int(peak - base - kept))
"""


@pytest.mark.parametrize("minutes", [pytest.param(1, id="a_minute"), pytest.param(10, id="ten_minutes", marks=LONGER)])
def test_memory_does_not_grow_with_the_clip(tmp_path, minutes):
    frames = [view(180, 320, at) for at in range(8)]
    short = write(tmp_path / "short.mp4", frames)
    path = write(tmp_path / "a.mp4", (frames[at % 8] for at in range(minutes * 60 * 15)), rate=15, preset="ultrafast")
    shown = subprocess.run([sys.executable, "-c", PEAK, short, path], capture_output=True, text=True, check=True)
    count, kilobytes = map(int, shown.stdout.split())
    assert count == 64 and kilobytes < 24 * 1024  # a clip of a minute is 150 MB of pixels


def test_few_frames_are_held(tmp_path, counted):
    frames, _ = moving_square(60, step=(1, 1))
    read_clip(write(tmp_path / "a.mp4", frames), 32)
    assert counted[0] == 60 and counted[1] <= 3


# --- faults ---


def test_one_and_two_frames(tmp_path):
    frames, _ = moving_square(2)
    one = read_clip(write(tmp_path / "a.mp4", frames[:1]), 4)
    assert one.frame_ids_T.tolist() == [0] * 4 and not one.energy_THW.any()
    assert len(select(patch_energy(one, 16), method="codec", budget=0.5)) == 2 * 80
    two = read_clip(write(tmp_path / "b.mp4", frames), 4)
    assert two.frame_ids_T.tolist() == [0, 0, 0, 1] and two.energy_THW[3].any()
    Image.fromarray(frames[0]).save(tmp_path / "one.jpg")
    assert read_clip(tmp_path / "one.jpg", 2).frames_THWC.shape == (2, 128, 160, 3)
    (tmp_path / "folder").mkdir()
    Image.fromarray(frames[0]).save(tmp_path / "folder" / "one.jpg")
    assert read_clip(tmp_path / "folder", 2).seconds == 0.5


@pytest.mark.parametrize(
    ("suffix", "codec", "options"),
    [
        ("mkv", "libx264", {}),
        ("mp4", "libx264", {"movflags": "faststart"}),
        ("avi", "mpeg4", {}),
        ("ts", "libx264", {}),
    ],
)
def test_a_truncated_file_gives_what_is_there(tmp_path, suffix, codec, options):
    frames = [view(128, 160, at) for at in range(30)]
    path = write(tmp_path / f"a.{suffix}", frames, codec, container_options=options)
    content = (tmp_path / f"a.{suffix}").read_bytes()
    (tmp_path / f"a.{suffix}").write_bytes(content[: len(content) * 6 // 10])
    clip = read_clip(path, 8)
    assert 10 <= clip.frame_ids_T[-1] < 22
    assert clip.frame_ids_T.tolist() == np.linspace(0, clip.frame_ids_T[-1], 8, dtype=int).tolist()
    assert np.abs(clip.frames_THWC[3].astype(int) - frames[clip.frame_ids_T[3]][..., None]).mean() < 4


def test_a_truncated_long_file(tmp_path):
    path = write(tmp_path / "a.mp4", dark_to_light(1200), "mpeg4", g="12", container_options={"movflags": "faststart"})
    content = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(content[: len(content) // 2])
    clip = read_clip(path, 6)
    assert 300 < clip.frame_ids_T[-1] < 900 and len(set(clip.frame_ids_T.tolist())) == 6
    assert [number(frame) for frame in clip.frames_THWC] == (clip.frame_ids_T % 224).tolist()


def refused(message, path, **options):
    with pytest.raises(LlavaError, match=message) as caught:
        read_clip(path, **options)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_bad_files(tmp_path):
    refused("no such file or folder", tmp_path / "none.mp4")
    (tmp_path / "empty").mkdir()
    refused("found no pictures", tmp_path / "empty")
    for name, content in {
        "zero.mp4": b"",
        "text.mp4": b"no video at all\n" * 20,
        "text.gif": b"none",
        "x": b"1",
    }.items():
        (tmp_path / name).write_bytes(content)
        refused("cannot be read", tmp_path / name)
    path = tmp_path / "a.mp4"
    write(path, [view(128, 160, at) for at in range(9)])
    path.write_bytes(path.read_bytes()[:3000])
    refused("cannot be read", path)
    with av.open(str(tmp_path / "none.mkv"), "w") as container:
        container.add_stream("mpeg4", rate=10).width = 64
        container.start_encoding()
    refused("cannot be read", tmp_path / "none.mkv")
    os.mkfifo(tmp_path / "pipe.mp4")
    refused("neither a file nor a folder", tmp_path / "pipe.mp4")
    for at, size in enumerate([(40, 30), (40, 30), (30, 40)]):
        Image.new("RGB", size).save(tmp_path / "empty" / f"{at}.png")
    refused("expected one size", tmp_path / "empty", frames=3)


def test_sound_alone(tmp_path):
    with wave.open(str(tmp_path / "a.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", None))
        sound.writeframes(bytes(16000))
    refused("found no video stream", tmp_path / "a.wav")
    cover = io.BytesIO()
    Image.new("RGB", (32, 32)).save(cover, "PNG")
    with av.open(str(tmp_path / "b.flac"), "w") as container:
        stream = container.add_stream("flac", rate=8000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        silence.sample_rate = 8000
        container.mux(stream.encode(silence))
        container.mux(stream.encode())
    sound = (tmp_path / "b.flac").read_bytes()
    mime, picture = b"image/png", cover.getvalue()
    block = struct.pack(f">II{len(mime)}sIIIIII", 3, len(mime), mime, 0, 32, 32, 24, 0, len(picture)) + picture
    block = struct.pack(">I", (6 << 24) + len(block)) + block  # FLAC's own way to hold a cover
    (tmp_path / "b.flac").write_bytes(sound[:42] + block + sound[42:])
    with av.open(str(tmp_path / "b.flac")) as container:
        assert container.streams.video
    refused("found no video stream", tmp_path / "b.flac")
    with pytest.raises(LlavaError, match="found no video stream"):
        load_video(str(tmp_path / "b.flac"))


@pytest.mark.parametrize(
    "options",
    [
        {"frames": 0},
        {"frames": 2.5},
        {"frames": True},
        {"max_alive": 1},
        {"size": (0, 4)},
        {"size": (4,)},
        {"weights": (0, 0)},
        {"weights": (1, float("nan"))},
        {"weights": (-1, 2)},
        {"fuse": "mean"},
    ],
)
def test_bad_arguments(tmp_path, options):
    with pytest.raises(LlavaError, match=f"^{next(iter(options))}: found "):
        read_clip(tmp_path, **options)


def test_without_pyav(tmp_path, monkeypatch):
    frames, _ = moving_square(2)
    path = write(tmp_path / "a.mp4", frames)
    Image.fromarray(frames[0]).save(tmp_path / "a.gif")
    monkeypatch.setitem(sys.modules, "av", None)
    refused("needs PyAV", path)
    assert read_clip(tmp_path / "a.gif", 1).source == "matched"
