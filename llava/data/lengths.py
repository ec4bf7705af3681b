"""How long the samples of records will be in the language model, told before anything is decoded.

From the headers of pictures and videos (`llava.images.headers`) and the family's own `length`; texts are tokenised in
batches. Packing and samplers plan with these numbers. `record_lengths` asks in all processes that the machine allows,
and keeps the answers beside the data file (`llava.data.length_cache`).
"""

import contextlib
import hashlib
import json
import os
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from llava.data.length_cache import LengthCache, Lengths, one_process
from llava.data.paths import resolve_path, shown_media
from llava.images.headers import clip, image_size
from llava.images.reading import time_instruction
from llava.utils import rank0_print

_FORMAT = 1  # of what is kept; another number where the same settings give other lengths than before
_CHUNK = 512  # records that a worker process takes at once
_FEW = 4 * _CHUNK  # for so many no process is worth its start
_MOST_PROCESSES = 16
_TOLD = 10_000  # from so many records on there is a progress bar
# settings of `SampleArgs` that no length depends on
_NO_LENGTH = {"model_max_length", "seed", "early_mix_text"}

_image_size = lru_cache(maxsize=100_000)(image_size)  # a picture is often asked about in several records


class Layout(NamedTuple):
    """Whose tokens and visual tokens are counted: a `llava.families.Family` and what it has `Loaded`."""

    family: Any
    loaded: Any


def merged_length(record: dict, sizes: list[tuple[int, int]], layout: Layout, args) -> int:
    """Tokens of a record's sample in the language model, those of its pictures included; not cut to the longest length.

    Where patches are chosen by what a picture shows, and for a video, it is the most that it can be.

    Args:
        record: in LLaVA's form.
        sizes: (width, height) of its pictures, in order; of a video one, that of a frame.
        args: a `SampleArgs`.

    Raises:
        LlavaError: a conversation or a size that gives no sample.
    """
    return layout.family.length(record, sizes, layout.loaded, args).tokens


def record_length(record: dict, family, loaded, args):
    """The `Length` of one record's sample; the headers of its files are read.

    Raises:
        LlavaError: a file that is missing, leaves its folder, or has no header that can be read, or a conversation or
            a size that gives no sample. What is wrong behind a header is found in training.
    """
    kind, names = shown_media(record, args.add_time_instruction)
    folder = args.video_folder if kind == "video" else args.image_folder
    paths = [resolve_path(folder, name, args.allow_absolute_paths) for name in names]
    if kind != "video" or not paths:
        return family.length(record, [_image_size(path) for path in paths], loaded, args)
    from llava.data.dataset import with_time

    found = clip(paths[0], args.video_fps, args.frames_upbound, args.force_sample)
    if args.add_time_instruction:
        record = record | {"conversations": with_time(record["conversations"], time_instruction(found))}
    length = family.length(record, [found.size], loaded, args, frames=found.frames)
    return length._replace(exact=length.exact and found.exact)


def lengths_of(records, family, loaded, args) -> Lengths:
    """The lengths of some records, asked for in this process; 0 tokens of one that gives no sample."""
    found, encoder, ends = Lengths.empty(len(records)), family.text_encoder(loaded), [0]
    with encoder.put_off() as texts:
        for at, record in enumerate(records):
            begin = len(texts)
            try:
                found.put(at, record_length(record, family, loaded, args))
            except (ValueError, ZeroDivisionError):  # a LlavaError, or a size that the image processor cannot take
                del texts[begin:]
            ends.append(len(texts))
    with _one_thread():
        counts = np.cumsum([0, *encoder.count(texts)])
    found.tokens[:] += np.diff(counts[ends]).astype(np.int32)
    return found


@contextlib.contextmanager
def _one_thread():
    """The tokenizer's own threads are of no use beside worker processes, and are not fit to be forked."""
    name, before = "TOKENIZERS_PARALLELISM", os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def record_lengths(
    records, family, loaded, args, *, processes: int | None = None, keep: bool = True, worker_init_fn=None
) -> Lengths:
    """The lengths of the samples of all records, not cut to the longest length.

    One process of a machine asks, others that call this wait for what it keeps. Ranks of a run that plan with lengths
    should still agree on those of one of them: a file may be read on one machine and not on another. Records of 0
    tokens are asked for again by the next run.

    Args:
        records: a `llava.data.records.Records`.
        family, loaded: of `Family.prepare`; the model is not needed.
        args: a `SampleArgs`; a part's own folders come first.
        processes: None: as many as this process may use cores, at most 16.
        keep: whether they are read from the file beside each data file, and written to it.
        worker_init_fn: called in each of several processes when it begins, as a data loader's.
    """
    loaded, found = loaded.without_model(), []
    for part, own in records.by_part():
        ask = _Asker(own, family, loaded, args.within(part), processes, worker_init_fn, os.path.basename(part.path))
        settings = fingerprint(family, loaded, ask.args) if keep and os.path.isfile(part.path) else None
        found.append(ask(np.arange(len(own))) if settings is None else _of_part(part, ask, settings))
    _image_size.cache_clear()  # who asks again may have other pictures under the names
    return Lengths(*map(np.concatenate, zip(*found, strict=True))) if found else Lengths.empty(0)


class _Asker:
    """Asks for the lengths of some of the records of one file, in several processes."""

    def __init__(self, records: list, family, loaded, args, processes: int | None, worker_init_fn, name: str):
        self.records, self.family, self.loaded, self.args, self.name = records, family, loaded, args, name
        self.processes = processes or min(len(os.sched_getaffinity(0)), _MOST_PROCESSES)
        self.worker_init_fn = worker_init_fn

    def __call__(self, numbers: np.ndarray) -> Lengths:
        import torch
        from torch.utils.data import DataLoader
        from tqdm import tqdm

        chunks = _Chunks(self.records, numbers, self.family, self.loaded, self.args)
        loader = DataLoader(
            chunks,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=0 if len(numbers) <= _FEW or self.processes == 1 else min(self.processes, len(chunks)),
            worker_init_fn=self.worker_init_fn,
            generator=torch.Generator(),  # else it takes one of the run's random numbers
        )
        found, done = Lengths.empty(len(numbers)), 0
        what = {"desc": f"lengths of {self.name}", "unit": " records", "mininterval": 1.0}
        bar = tqdm(total=len(numbers), disable=len(numbers) < _TOLD, **what)
        with bar:
            for lengths in loader:
                end = done + len(lengths.tokens)
                found.put(slice(done, end), lengths)
                done = end
                bar.update(len(lengths.tokens))
        return found


class _Chunks:
    """Runs of records as a data set: an item is the lengths of one run."""

    def __init__(self, records: list, numbers: np.ndarray, *parts):
        self.records, self.numbers, self.parts = records, numbers, parts

    def __len__(self) -> int:
        return -(-len(self.numbers) // _CHUNK)

    def __getitem__(self, chunk: int) -> Lengths:
        if chunk >= len(self):
            raise IndexError(chunk)
        numbers = self.numbers[chunk * _CHUNK : (chunk + 1) * _CHUNK]
        return lengths_of([self.records[number] for number in numbers], *self.parts)


def _as_it_is(item):
    return item


def _of_part(part, ask: _Asker, settings: str) -> Lengths:
    """Those of a file's records, from what is kept of them as far as it goes."""
    rows = np.asarray(part.rows, dtype=np.int64)
    with one_process(part.path) as waited:
        cache = LengthCache(part.path)
        found, known = cache.read(settings, rows)
        # a file that could not be read may be there by now; the process that was waited for has just looked
        todo = np.flatnonzero(~known if waited else ~known | (found.tokens == 0))
        if len(todo):
            new = ask(todo)
            if not known[todo].all() or new.tokens.any():
                found.put(todo, new)
                cache.write(settings, rows, found)
    return found


def fingerprint(family, loaded, args) -> str | None:
    """A name for all settings that lengths depend on: tokenizer, template, images, tower, merge, patches, videos.

    None: one of them, a tower of somebody else's for example, does not say what it is.
    """
    images, prepare = loaded.image_processor, loaded.preprocessor
    said = {
        "format": _FORMAT,
        "family": family.name,
        "template": [loaded.template, loaded.system_turn],
        "prepare": prepare and [prepare.version, prepare.template, prepare.mm_use_im_start_end, prepare.own_system],
        "images": images and images.to_dict(),
        "visual tokens": loaded.count_visual_tokens,
        "args": {name: value for name, value in vars(args).items() if name not in _NO_LENGTH},
    }
    for name in ("image_folder", "video_folder"):
        folder = getattr(args, name)
        said["args"][name] = folder and os.path.abspath(folder)
    text = json.dumps(said, sort_keys=True, default=repr)
    if " at 0x" in text:  # Python's words for an object without others
        rank0_print("lengths: not kept beside the data, since a setting of the model does not say what it is")
        return None
    return hashlib.sha256((text + family.text_encoder(loaded).to_json()).encode()).hexdigest()[:32]
