"""Clips through the codec: vectors, residual and energy."""

import os

import numpy as np
import pytest

from llava.images.clip import read_clip
from llava.images.video_patches import patch_energy, select
from tests.images.clips import CODECS, inside, moving_square, write

av = pytest.importorskip("av", reason="PyAV (the video extra) is not installed")
LONG = bool(os.environ.get("LLAVA_LONG_TESTS"))


def all_codecs():
    for codec, (suffixes, _, _, exports) in CODECS.items():
        for at, suffix in enumerate(suffixes):
            if at == 0 or LONG or codec == "libx264":
                yield pytest.param(codec, suffix, exports, id=f"{codec}-{suffix}")


@pytest.mark.parametrize(("codec", "suffix", "exports"), all_codecs())
def test_every_codec_and_container(tmp_path, codec, suffix, exports):
    frames, places = moving_square(24)
    clip = read_clip(write(tmp_path / f"a.{suffix}", frames, codec), 8)
    assert clip.frame_ids_T.tolist() == [0, 3, 6, 9, 13, 16, 19, 23] and clip.frame_ids_T.dtype == np.int64
    assert clip.frames_THWC.shape == (8, 128, 160, 3) and clip.frames_THWC.dtype == np.uint8
    assert clip.source == ("exported" if exports else "matched")
    late = 0.11 if suffix == "avi" else 2e-3  # it has no times of its own
    assert clip.seconds == pytest.approx(2.4) and clip.times == pytest.approx(clip.frame_ids_T / 10, abs=late)
    for at, index in enumerate(clip.frame_ids_T):
        off = np.abs(clip.frames_THWC[at].astype(int) - frames[index][..., None])
        assert off.mean() < 3, index
    assert clip.energy_THW.shape[0] == 8 and clip.energy_THW.dtype == np.float32
    assert not clip.energy_THW[0].any() and clip.energy_THW.min() >= 0 and clip.energy_THW.max() <= 1
    energy = patch_energy(clip, 16)
    for at in range(1, 8):
        square = inside(places[clip.frame_ids_T[at]], 40, 8, clip.vectors.shape[1:])
        found = clip.vectors[at][square]
        assert np.median(found, axis=0) == pytest.approx([3, 2], abs=0.3)
        near = inside(places[clip.frame_ids_T[at]], 40, 16, energy.shape[1:], margin=26)
        assert near.ravel()[energy[at].argsort(axis=None)[-4:]].all()


@pytest.mark.parametrize(
    ("size", "pan", "step", "codec"),
    [
        ((200, 152), (0, 0), (3, -2), "ffv1"),
        ((200, 152), (-2, 1), (2, 3), "ffv1"),
        ((320, 192), (2, 0), (-3, 5), "ffv1"),
        ((640, 480), (4, -2), (-2, 4), "ffv1"),
        ((1280, 720), (4, -4), (-8, 4), "ffv1"),
        ((640, 480), (8, 0), (0, 8), "libx264"),
        ((200, 152), (2, -1), (-3, 2), "libx264"),
        ((200, 152), (2, 0), (-3, 1), "mpeg4"),
    ],
)
def test_known_motion_is_found_and_the_camera_does_not_count(tmp_path, size, pan, step, codec):
    scale, side = (4, 160) if size[1] > 400 else (1, 48)
    start = tuple((all_ - side) // 2 - 3 * each for all_, each in zip(size, step, strict=True))
    frames, places = moving_square(7, size, pan, step, side, start, cell=2 * scale)
    extra = {"pix_fmt": "gray"} if codec == "ffv1" else {"bf": "3"}
    clip = read_clip(write(tmp_path / "a.mkv", frames, codec, **extra), 7)
    least, tolerance = (0.9, 1e-6) if codec == "ffv1" else (0.75, 0.3)
    for at in range(1, 7):
        shape = clip.vectors.shape[1:]
        square = inside(places[at], side, 8, shape)
        far = ~inside(places[at], side, 8, shape, margin=8 * scale + 16)
        far[[0, 1, 2, -3, -2, -1]] = far[:, [0, 1, 2, -3, -2, -1]] = False  # what comes in at the border
        assert square.sum() > 20 and far.sum() > 20
        found = np.abs(clip.vectors[at] - step).max(-1) <= tolerance
        if not (codec == "mpeg4" and at == 4):  # which its encoder codes without vectors: too far from its reference
            assert found[square].mean() > least, at
        resting = np.abs(clip.vectors[at] - pan).max(-1) <= tolerance
        assert resting[far].mean() > 0.95, at
        if codec == "ffv1":
            pixels = np.repeat(np.repeat(far & resting, clip.vector_block, 0), clip.vector_block, 1)
            assert not clip.energy_THW[at][pixels[: clip.energy_THW.shape[1], : clip.energy_THW.shape[2]]].any()


def test_frames_that_look_ahead_have_vectors_too(tmp_path):
    """FFmpeg exports those of MPEG-4's B-frames as zeros."""
    frames, _ = moving_square(11, (160, 128), (2, 0), (-3, 1), 48, (66, 35))
    clip = read_clip(write(tmp_path / "a.mkv", frames, "mpeg4", bf="3"), 11)
    for vectors in clip.vectors[1:]:
        assert np.median(vectors.reshape(-1, 2), axis=0) == pytest.approx([2, 0], abs=0.1)


def slow_energy(now, before, vectors, block, weights):
    """Pixel by pixel, of grey frames as they are: difference to where the vectors come from, and their lengths."""
    height, width = now.shape
    residual, motion = np.zeros((height, width)), np.zeros((height, width))
    median = np.median(vectors.reshape(-1, 2).astype(float), axis=0)
    for y in range(height):
        for x in range(width):
            dx, dy = vectors[y // block, x // block].astype(float)
            motion[y, x] = np.hypot(dx - median[0], dy - median[1])
            from_y, from_x = np.clip(y - dy, 0, height - 1), np.clip(x - dx, 0, width - 1)
            y0, x0 = int(from_y), int(from_x)
            y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
            rows = [before[a, x0] + (before[a, x1] - before[a, x0]) * (from_x - x0) for a in (y0, y1)]
            residual[y, x] = abs(int(now[y, x]) - int(rows[0] + (rows[1] - rows[0]) * (from_y - y0) + 0.5))
    lengths = np.hypot(*(vectors.reshape(-1, 2).astype(float) - median).T)
    residual = np.clip(residual / max(np.percentile(residual, 95), 1), 0, 1)
    motion = np.clip(motion / max(np.percentile(lengths, 95), 1e-6), 0, 1)
    return (weights[0] * motion + weights[1] * residual) / sum(weights)


@pytest.mark.parametrize(("step", "pan"), [((3, 2), (0, 0)), ((2, -2), (-1, 2))])
def test_energy_equals_a_slow_direct_computation(tmp_path, step, pan):
    frames, _ = moving_square(4, (96, 72), pan, step, 24, (30, 30))
    path = write(tmp_path / "a.mkv", frames, "ffv1", pix_fmt="gray")
    clip = read_clip(path, 4, weights=(1, 3))
    for at in (1, 2, 3):
        before = frames[at - 1].astype(float)
        wanted = slow_energy(frames[at], before, clip.vectors[at], clip.vector_block, (1, 3))
        np.testing.assert_allclose(clip.energy_THW[at], wanted, atol=1e-5)
        plain = np.abs(frames[at].astype(float) - before)
        wanted = np.clip(plain / max(np.percentile(plain, 95), 1), 0, 1)
        np.testing.assert_allclose(read_clip(path, 4, motion=False).energy_THW[at], wanted, atol=1e-5)
    assert read_clip(path, 4, motion=False).source == "difference"


def test_fusions(tmp_path):
    frames, _ = moving_square(3, (96, 72), (0, 0), (3, 2), 24, (30, 30))
    path = write(tmp_path / "a.mkv", frames, "ffv1", pix_fmt="gray")
    motion, residual = (read_clip(path, 3, weights=each).energy_THW for each in ((1, 0), (0, 1)))
    assert motion.any() and residual.any() and not np.array_equal(motion, residual)
    for how, wanted in {
        "weighted": (motion + residual) / 2,
        "max": np.maximum(motion, residual),
        "sum": np.minimum(motion + residual, 1),
        "geomean": np.sqrt(motion * residual),
    }.items():
        np.testing.assert_allclose(read_clip(path, 3, fuse=how).energy_THW, wanted, atol=1e-6)


def test_the_residual_of_a_flat_square_lies_along_its_edge(tmp_path):
    frames, places = moving_square(6, (160, 128), (0, 0), (4, 0), 48, (24, 40), flat=True)
    clip = read_clip(write(tmp_path / "a.mkv", frames, "ffv1", pix_fmt="gray"), 6, weights=(1, 2))
    for at in range(1, 6):
        x, y = places[at]
        edge = np.zeros((128, 160), bool)
        edge[y - 8 : y + 56, x - 12 : x + 60] = True
        edge[y + 8 : y + 40, x + 8 : x + 40] = False
        assert clip.energy_THW[at][edge].any() and not clip.energy_THW[at][~edge].any()


@pytest.mark.parametrize("codec", ["libx264", "libx265", "mpeg4"])
def test_a_panning_background_is_not_chosen(tmp_path, codec):
    frames, places = moving_square(32, (320, 192), (2, 0), (-3, 2), 48, (240, 20), cell=3)
    clip = read_clip(write(tmp_path / "a.mp4", frames, codec), 16)
    energy = patch_energy(clip, 16)
    kept = select(energy, method="codec", budget=0.12, changed_T=clip.changed_T)
    assert not (clip.changed_T > 0.6).any()
    later = kept[kept[:, 0] > 0]
    near = np.stack([inside(places[at], 48, 16, energy.shape[1:], margin=28) for at in clip.frame_ids_T])
    assert near[tuple(later.T)].mean() > 0.9 and near[1:].mean() < 0.25
    by_difference = read_clip(tmp_path / "a.mp4", 16, motion=False)
    plain = select(patch_energy(by_difference, 16), method="saliency", budget=0.12, changed_T=clip.changed_T)
    assert near[tuple(plain[plain[:, 0] > 0].T)].mean() < 0.88  # which does not know of the camera


def test_cuts(tmp_path):
    generator = np.random.default_rng(0)
    scenes = [np.kron(generator.integers(0, 256, (6, 8)), np.ones((24, 24))).astype(np.uint8) for _ in range(3)]
    frames = [np.roll(scenes[at // 10], 2 * at, 1) for at in range(30)]
    clip = read_clip(write(tmp_path / "a.mp4", frames), 9)  # of which none is the first of its scene but the first
    assert clip.frame_ids_T.tolist() == [0, 3, 7, 10, 14, 18, 21, 25, 29]
    assert np.flatnonzero(clip.changed_T > 0.9).tolist() == [3, 6]
    assert clip.changed_T[[1, 2, 4, 5, 7, 8]].max() < 0.5


@pytest.mark.parametrize("codec", ["libx264", "mpeg4", "libx265"])
@pytest.mark.parametrize("pan", [(0, 0), (2, 1)])
def test_noise_is_not_chosen(tmp_path, codec, pan):
    generator = np.random.default_rng(0)
    frames, places = moving_square(24, (128, 128), pan, (1, 1), 28, (20, 20), cell=3)
    frames = [np.clip(frame + generator.normal(0, 10, frame.shape), 0, 255).astype(np.uint8) for frame in frames]
    clip = read_clip(write(tmp_path / "a.mp4", frames, codec), 12)
    energy = patch_energy(clip, 16)
    later = select(energy, method="codec", budget=1 / 12 + 0.06, changed_T=clip.changed_T)[64:]
    near = np.stack([inside(places[at], 28, 16, energy.shape[1:], margin=20) for at in clip.frame_ids_T])
    assert near[tuple(later.T)].mean() > 0.8 and near[1:].mean() < 0.2
    assert clip.changed_T.max() < 0.5
