"""Lengths of records: headers of pictures and videos, texts in batches, several processes, what is kept."""

import importlib.util
import json
import os
import random

import numpy as np
import pyarrow
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPImageProcessorPil

from llava.data import lengths as module
from llava.data.length_cache import ENDING, LengthCache, Lengths, places
from llava.data.lengths import lengths_of, record_length, record_lengths
from llava.data.records import load_records
from llava.errors import LlavaError
from llava.images.headers import clip, image_size
from llava.images.reading import load_image, load_video, time_instruction
from llava.model.multimodal_encoder.base import FixedGrid
from llava.model.visual_merge import MergeRules, VisualTokenCounter
from tests.data.common import llava_parts, talk, tokenizer

PROCESSOR = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
WORDS = ("a", "temple", "in", "China,", "7:30", "<|im_start|>", "\n\n", "ünïcode", "中文", "!!", "<image>", "</s>")

# --- headers ---


@pytest.mark.parametrize("orientation", [None, 3, 6, 8])
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tiff", "gif", "bmp", "ico", "mpo", "avif", "ppm"])
def test_a_header_tells_the_size_that_is_read(tmp_path, kind, orientation):
    path, picture = str(tmp_path / f"a.{kind}"), Image.effect_noise((90, 40), 80).convert("RGB")
    options = {}
    if orientation is not None:
        if kind not in ("jpg", "png", "webp", "tiff"):
            return
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
    try:
        picture.save(path, **options)
    except (KeyError, OSError):
        pytest.skip(f"Pillow writes no {kind} here")
    assert image_size(path) == load_image(path).size


def test_headers_with_faults_are_those_of_reading(tmp_path):
    Image.new("RGB", (402, 2)).save(tmp_path / "long.png")
    (tmp_path / "text.png").write_text("hello")
    for name in ("long.png", "text.png", "missing.png"):
        faults = []
        for read in (image_size, load_image):
            with pytest.raises(LlavaError) as error:
                read(str(tmp_path / name))
            faults.append(str(error.value))
        assert faults[0] == faults[1]


SAMPLING = [
    {},
    {"video_fps": 3},
    {"frames_upbound": 4},
    {"frames_upbound": 40},
    {"frames_upbound": 40, "force_sample": True},
]


def same_clip(path: str, exact: bool, **options):
    found, video = clip(path, **options), load_video(path, **options)
    assert (found.frames, found.size) == (len(video.frames), video.frames[0].size) and found.exact == exact
    assert time_instruction(found) == time_instruction(video)


@pytest.mark.parametrize("options", SAMPLING)
@pytest.mark.parametrize("frames", [1, 13])
def test_a_folder_of_frames(tmp_path, frames, options):
    for at in range(frames):
        Image.new("RGB", (34, 20), (at, 0, 0)).save(tmp_path / f"{at}.png")
    same_clip(str(tmp_path), True, **options)


@pytest.mark.parametrize("kind", ["mp4", "mkv"])  # the header of the second does not tell how many frames there are
def test_a_video_file(tmp_path, kind):
    av = pytest.importorskip("av", reason="PyAV (the video extra) is not installed")
    path = str(tmp_path / f"a.{kind}")
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=6)
        stream.width, stream.height, stream.pix_fmt = 66, 34, "yuv420p"
        for at in range(25):
            pixels = np.full((34, 66, 3), at * 9, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    for options in SAMPLING:
        same_clip(path, False, **options)  # the header may promise more than there is


# --- texts ---


@pytest.mark.parametrize(
    ("version", "name"),
    [("qwen_1_5", "qwen"), ("v1", "llama"), ("llava_llama_3", "llama3"), ("mistral_instruct", "llama"), ("v0", "qwen")],
)
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(st.lists(st.lists(st.sampled_from(WORDS) | st.text(max_size=8), max_size=9), min_size=2, max_size=6))
def test_texts_in_batches_are_as_long_as_one_by_one(version, name, texts):
    texts = ["x " + " ".join(words) for words in texts[: len(texts) // 2 * 2]]
    records = [{"conversations": talk(*texts)}, {"conversations": talk(*texts[:2])}]
    family, loaded, args = llava_parts(tokenizer(name), version=version)
    expected = [len(loaded.preprocessor(record["conversations"])[0]) for record in records]
    assert lengths_of(records, family, loaded, args).tokens.tolist() == expected
    assert [record_length(record, family, loaded, args).tokens for record in records] == expected


# --- many records ---


class Parts:
    """Records in files of a folder, and what they are made into samples with."""

    def __init__(self, folder, files):
        self.folder, generator = folder, random.Random(0)
        (folder / "images").mkdir()
        self.sizes = [(generator.randint(10, 90), generator.randint(10, 90)) for _ in range(9)]
        for at, size in enumerate(self.sizes):
            Image.new("RGB", size).save(folder / "images" / f"{at}.png")
        for name, count in files.items():
            records = []
            for at in range(count):
                shown = at % 10  # the last picture is not there
                said = talk("<image>\nWhat? " + "x " * (at % 7), f"A temple {at}.")
                records.append({"id": f"{name}{at}", "image": f"{shown}.png", "conversations": said})
            (folder / name).write_text(json.dumps(records))

    def __call__(self, **options):
        grid = [[28, 56], [56, 28], [56, 56]]
        rules = MergeRules("spatial_unpad", "anyres", image_grid_pinpoints=grid)
        given = {"image_folder": str(self.folder / "images"), "image_aspect_ratio": "anyres"}
        given |= {"image_grid_pinpoints": grid} | options
        return llava_parts(tokenizer("qwen"), PROCESSOR, VisualTokenCounter(rules, FixedGrid(2)), **given)

    def expected(self, records) -> Lengths:
        """One by one, of the sizes that are known."""
        family, loaded, args = self()
        found = Lengths.empty(len(records))
        for at, record in enumerate(records):
            if (number := int(record["image"].split(".")[0])) < len(self.sizes):
                found.put(at, family.length(record, [self.sizes[number]], loaded, args))
        return found


@pytest.fixture
def parts(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Parts(tmp_path, {"a.json": 30, "b.json": 23})


@pytest.fixture
def asked(monkeypatch):
    """How many records were asked about, call by call."""
    seen, ask = [], module._Asker.__call__

    def watched(self, numbers):
        seen.append(len(numbers))
        return ask(self, numbers)

    monkeypatch.setattr(module._Asker, "__call__", watched)
    return seen


def same(a: Lengths, b: Lengths) -> bool:
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_one_cache_for_each_file(parts, asked):
    records, made = load_records(str(parts.folder / "{a,b}.json")), parts()
    first = record_lengths(records, *made)
    assert same(first, parts.expected(records)) and asked == [30, 23]
    assert first.tokens.dtype == first.patches.dtype == np.int32 and (first.tokens == 0).sum() == 5
    assert (parts.folder / f"a.json{ENDING}").is_file() and (parts.folder / f"b.json{ENDING}").is_file()
    again = record_lengths(records, *made)
    assert same(again, first) and asked[2:] == [3, 2]  # those without a length are asked about again
    assert not [name for name in os.listdir(parts.folder) if name.endswith(".tmp")]


def test_a_file_that_has_come_back(parts, asked):
    records, made = load_records(str(parts.folder / "a.json")), parts()
    record_lengths(records, *made)
    Image.new("RGB", (60, 20)).save(parts.folder / "images" / "9.png")
    parts.sizes.append((60, 20))
    found = record_lengths(records, *made)
    assert found.tokens.all() and same(found, parts.expected(records)) and asked == [30, 3]
    assert same(record_lengths(records, *made), found) and asked == [30, 3]


def test_rows_of_a_mixture_add_up(parts, asked):
    mixture, made, known = parts.folder / "mix.yaml", parts(), set()
    for strategy, count in (("end:9", 9), ("first:12", 12), ("all", 30), ("random:20", 20)):
        entry = {"json_path": str(parts.folder / "a.json"), "sampling_strategy": strategy}
        mixture.write_text(json.dumps({"datasets": [entry]}))
        records = load_records(str(mixture))
        assert len(records) == count and same(record_lengths(records, *made), parts.expected(records))
        rows = set(records.parts[0].rows)
        assert asked.pop() == len(rows - known) + len([row for row in rows & known if row % 10 == 9])
        known |= rows


def test_other_settings_and_other_content(parts, asked):
    records = load_records(str(parts.folder / "a.json"))
    first = record_lengths(records, *parts())
    other = record_lengths(records, *parts(image_aspect_ratio="square"))
    assert asked == [30, 30] and not same(first, other)
    assert same(record_lengths(records, *parts()), first) and asked[2:] == [3]  # both are kept
    text = (parts.folder / "a.json").read_text().replace("A temple", "A large old temple")
    (parts.folder / "a.json").write_text(text)
    records = load_records(str(parts.folder / "a.json"))
    found = record_lengths(records, *parts())
    assert asked[3:] == [30] and same(found, parts.expected(records)) and (found.tokens > first.tokens).any()


def test_only_the_newest_settings_are_kept(parts):
    cache, rows = LengthCache(str(parts.folder / "a.json")), np.arange(3)
    for number in range(11):
        cache.write(f"s{number}", rows, Lengths.empty(3)._replace(tokens=np.full(3, number, np.int32)))
    with pyarrow.ipc.open_file(places(str(parts.folder / "a.json"))[0]) as file:
        assert file.schema.names == ["row", "tokens", "patches", "exact"]
        assert file.schema.metadata[b"settings"].decode().split() == [f"s{number}" for number in range(10, 2, -1)]
    assert cache.read("s5", rows)[0].tokens.tolist() == [5] * 3 and not cache.read("s2", rows)[1].any()


def test_without_pyarrow_nothing_is_kept(parts, asked, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pyarrow" else find(name))
    records = load_records(str(parts.folder / "a.json"))
    assert same(record_lengths(records, *parts()), record_lengths(records, *parts())) and asked == [30, 30]
    assert "not kept for the next run, which takes pyarrow" in capsys.readouterr().out
    assert not (parts.folder / f"a.json{ENDING}").exists()


@pytest.mark.parametrize("content", [b"", b"not a cache", None])
def test_a_broken_cache_is_made_anew(parts, asked, content, capsys):
    records = load_records(str(parts.folder / "a.json"))
    first = record_lengths(records, *parts())
    path = parts.folder / f"a.json{ENDING}"
    path.write_bytes(path.read_bytes()[:-9] if content is None else content)
    assert same(record_lengths(records, *parts()), first) and asked == [30, 30]
    assert "cannot be read" in capsys.readouterr().out
    assert same(record_lengths(records, *parts()), first) and asked[2:] == [3]


def test_where_the_data_cannot_be_written(parts, asked, monkeypatch):
    """The user's cache folder takes it; a plain disk that is full does not stop a run."""
    records, write = load_records(str(parts.folder / "a.json")), LengthCache._write
    closed = [str(parts.folder / f"a.json{ENDING}")]

    def refuse(self, path, kept):
        if path in closed:
            raise PermissionError(13, "Permission denied")
        write(self, path, kept)

    monkeypatch.setattr(LengthCache, "_write", refuse)
    first = record_lengths(records, *parts())
    assert same(record_lengths(records, *parts()), first) and asked == [30, 3]
    assert len(list((parts.folder / "cache" / "llava" / "lengths").iterdir())) == 1
    closed += places(str(parts.folder / "a.json"))
    for _ in range(2):  # nothing is kept
        assert record_lengths(records, *parts(image_aspect_ratio="pad")).tokens.any()
    assert asked[2:] == [30, 30]


def test_several_processes_find_the_same(parts, monkeypatch):
    """Also in the middle of a run: none of its random numbers is used up."""
    monkeypatch.setattr(module, "_FEW", 0)
    monkeypatch.setattr(module, "_CHUNK", 7)
    records, before = load_records(str(parts.folder / "{a,b}.json")), torch.get_rng_state()
    found = record_lengths(records, *parts(), processes=2, keep=False)
    assert same(found, parts.expected(records)) and torch.get_rng_state().equal(before)
    assert not (parts.folder / f"a.json{ENDING}").exists()


def test_one_process_of_a_machine_asks(parts):
    """Three begin at once; each record is asked about once."""
    import multiprocessing

    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(3), context.Queue()

    def run():
        torch.set_num_threads(1)
        seen, ask = [], module._Asker.__call__
        module._Asker.__call__ = lambda self, numbers: (seen.append(len(numbers)), ask(self, numbers))[1]
        records = load_records(str(parts.folder / "a.json"))
        start.wait(60)
        results.put((record_lengths(records, *parts()).tokens.tolist(), sum(seen)))

    workers = [context.Process(target=run) for _ in range(3)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(60)
    assert found[0][0] == found[1][0] == found[2][0]
    # who comes when the others have ended asks about the three without a length once more
    assert 30 <= sum(count for _, count in found) <= 36 and sum(count >= 30 for _, count in found) == 1


# --- what samplers group by ---


def test_token_lengths_of_a_data_set(parts):
    from llava.data.dataset import LazySupervisedDataset

    records = load_records(str(parts.folder / "a.json"))
    family, loaded, args = parts(model_max_length=65)
    data, every = LazySupervisedDataset(records, family, loaded, args), parts.expected(records).tokens
    assert every.max() > 65 > every[every > 0].min()
    assert data.token_lengths() == [min(max(length, 1), 65) for length in every.tolist()]
    count = loaded.count_visual_tokens
    samples = {at: sample for at in range(9) if isinstance(sample := data[at], dict)}  # of the rest no label is left
    assert len(samples) > 4
    for at, sample in samples.items():  # an image that begins before the limit stays whole
        media = zip(sample["images"], sample["image_sizes"], strict=True)
        made = len(sample["input_ids"]) + sum(count(image.shape, size) - 1 for image, size in media)
        assert data.token_lengths()[at] == made
