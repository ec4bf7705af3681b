import numpy as np
import pytest
from PIL import Image

from llava.data.images import frame_indices, load_image, load_video, time_instruction
from llava.errors import LlavaError


def picture(path, value=0, size=(40, 30), mode="RGB"):
    Image.new(mode, size, value).save(path)
    return path


def noise(path, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    image = load_image(str(picture(tmp_path / "a.png", mode=mode)))
    assert image.mode == "RGB" and image.size == (40, 30)


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_a_truncated_image_is_an_error(tmp_path, kind):
    path = noise(tmp_path / f"a.{kind}")
    assert load_image(str(path)).size == (80, 60)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(LlavaError, match=rf"image .*a\.{kind}: cannot be read") as error:
        load_image(str(path))
    assert "\n" not in str(error.value)


def test_missing_and_not_an_image(tmp_path):
    with pytest.raises(LlavaError, match="no such file"):
        load_image(str(tmp_path / "a.png"))
    (tmp_path / "b.png").write_text("hello")
    with pytest.raises(LlavaError, match="cannot be read"):
        load_image(str(tmp_path / "b.png"))


@pytest.mark.parametrize("size", [(402, 2), (25_001, 200)])
def test_a_shape_that_would_fill_the_memory(tmp_path, size):
    with pytest.raises(LlavaError, match=f"found {size[0]}x{size[1]} pixels"):
        load_image(str(picture(tmp_path / "a.png", size=size)))


@pytest.fixture
def frames(tmp_path):
    folder = tmp_path / "clip"
    folder.mkdir()
    for at in range(12):
        picture(folder / f"{at:03d}.png", value=(at * 10, 0, 0))
    (folder / "notes.txt").write_text("not a frame")
    return str(folder)


@pytest.mark.parametrize(
    "names",
    [
        [f"{at}.png" for at in range(1, 13)],
        ["frame_1.png", "frame_2.jpg", "frame_10.png", "frame_11.JPG"],
        ["s1_2.png", "s1_10.png", "s2_1.png", "s10_1.png"],
        ["a02.png", "a2.png", "a10.png"],  # equal numbers: by the plain name
        ["img9b.png", "img9c.png", "img10a.png"],
    ],
)
def test_frames_come_in_natural_order(tmp_path, names):
    for at, name in enumerate(names):
        picture(tmp_path / name, value=(at * 10, 0, 0))
    (tmp_path / f"._{names[0]}").write_bytes(b"left by another system")
    found = load_video(str(tmp_path), frames_upbound=32)
    assert [frame.getpixel((0, 0))[0] for frame in found.frames] == [at * 10 for at in range(len(names))]


def test_a_folder_of_hidden_files_has_no_frames(tmp_path):
    picture(tmp_path / ".a.png")
    with pytest.raises(LlavaError, match="found no pictures in the folder"):
        load_video(str(tmp_path))


def reds(video):
    return [frame.getpixel((0, 0))[0] // 10 for frame in video.frames]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 1, 2, 3, 4, 6, 7, 8, 9, 11]),
        ({"frames_upbound": 32}, list(range(12))),
        ({"frames_upbound": 4}, [0, 3, 7, 11]),
        ({"frames_upbound": 24, "force_sample": True}, [int(at * 11 / 23) for at in range(24)]),
    ],
)
def test_a_folder_of_frames(frames, options, expected):
    video = load_video(frames, **options)
    assert reds(video) == expected
    assert video.seconds == 6.0
    assert video.times == [at / 2 for at in expected]


def test_time_instruction(frames):
    assert time_instruction(load_video(frames, frames_upbound=2)) == (
        "The video lasts for 6.00 seconds, and 2 frames are uniformly sampled from it. These frames are located at "
        "0.00s,5.50s.Please answer the following questions related to this video."
    )


def test_bad_folders(tmp_path, frames):
    with pytest.raises(LlavaError, match="no such file or folder"):
        load_video(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(LlavaError, match="found no pictures"):
        load_video(str(tmp_path / "empty"))
    picture(tmp_path / "clip" / "999.png", size=(50, 50))
    with pytest.raises(LlavaError, match="expected one size"):
        load_video(frames, frames_upbound=100)


@pytest.mark.parametrize(
    ("options", "indices", "times"),
    [
        ((100, 25.0, 1, 0, False), [0, 25, 50, 75], [0, 1, 2, 3]),
        ((100, 25.0, 5, 0, False), list(range(0, 100, 5)), list(range(20))),
        ((100, 25.0, 1, 2, False), [0, 99], [0, 99 / 25]),
        ((100, 25.0, 1, 8, False), [0, 25, 50, 75], [0, 1, 2, 3]),
        ((100, 25.0, 1, 5, True), [0, 24, 49, 74, 99], [0, 24 / 25, 49 / 25, 74 / 25, 99 / 25]),
        ((3, 10.0, 30, 0, False), [0, 1, 2], [0, 1, 2]),
    ],
)
def test_sampling_of_files(options, indices, times):
    found = frame_indices(*options)
    assert found[0] == indices
    assert found[1] == pytest.approx(times)


@pytest.fixture
def film(tmp_path):
    av = pytest.importorskip("av", reason="PyAV (the video extra) is not installed")
    path = tmp_path / "film.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for at in range(30):
            pixels = np.full((48, 64, 3), at * 8, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_a_video_file(film):
    video = load_video(str(film), video_fps=2)
    levels = [np.asarray(frame).mean() / 8 for frame in video.frames]
    assert levels == pytest.approx([0, 5, 10, 15, 20, 25], abs=0.6)
    assert video.frames[0].size == (64, 48) and video.frames[0].mode == "RGB"
    assert video.seconds == pytest.approx(3.0)
    bounded = load_video(str(film), frames_upbound=4, force_sample=True)
    assert [np.asarray(frame).mean() / 8 for frame in bounded.frames] == pytest.approx([0, 9, 19, 29], abs=0.6)
    assert bounded.times == pytest.approx([0, 0.9, 1.9, 2.9])


def test_a_broken_video_file(film):
    film.write_bytes(film.read_bytes()[:200])
    with pytest.raises(LlavaError, match=r"video .*film\.mp4: cannot be read"):
        load_video(str(film))
