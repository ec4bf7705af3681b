"""Records to training samples."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset, get_worker_info

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.data.paths import media_of, resolve_path
from llava.data.preprocess import Preprocessor
from llava.data.records import Records
from llava.errors import LlavaError
from llava.images.processing import PixelOptions, process_pictures
from llava.images.reading import load_image, load_video, time_instruction

_STATS = ("truncated", "no_label")
_MAX_WORKERS = 256


@dataclass(frozen=True)
class BadRecord:
    """A record that gives no sample.

    Attributes:
        id: the record's id.
        reason: one line.
        kind: "bad" (unreadable image, ...: counts towards the limit that stops a run) or "no_label" (nothing left to
            learn after truncation).
    """

    id: str
    reason: str
    kind: str = "bad"

    def __str__(self) -> str:
        return f"{self.id}: {self.reason}"


@dataclass(frozen=True)
class MediaOptions:
    """How images and videos are read; the names and defaults are LLaVA-NeXT's."""

    image_folder: str | None = None
    video_folder: str | None = None
    image_aspect_ratio: str | None = "square"
    image_grid_pinpoints: object = None
    native_resolution: Callable[[int, int], tuple[int, int]] | None = None  # for image_aspect_ratio native
    video_fps: float = 1
    frames_upbound: int = 0
    force_sample: bool = False
    add_time_instruction: bool = False
    early_mix_text: bool = False
    allow_absolute_paths: bool = False

    @classmethod
    def from_args(cls, data_args) -> "MediaOptions":
        """From any object with attributes of these names; a missing one has its default."""
        return cls(**{name: getattr(data_args, name, default) for name, default in vars(cls()).items()})


def truncate(ids: list[int], labels: list[int], visual: list[int], limit: int) -> tuple[list[int], list[int], int]:
    """Cut a sample where its merged sequence, with every image's tokens in place, passes `limit` tokens.

    An image that begins before the limit stays, even if its tokens reach beyond it; then nothing follows it.

    Args:
        visual: number of tokens of each image, in order.

    Returns:
        ids, labels, and how many images are left.
    """
    merged = images = 0
    for position, token in enumerate(ids):
        if merged >= limit:
            return ids[:position], labels[:position], images
        if token == IMAGE_TOKEN_INDEX:
            merged += visual[images]
            images += 1
        else:
            merged += 1
    return ids, labels, images


class RecordDataset(Dataset):
    """Samples made on demand from records; a subclass says in `_sample` how.

    Args:
        records: what to train on.
        options: how images and videos are read.
    """

    def __init__(self, records: Records, options: MediaOptions):
        self.records = records
        self.options = options
        # one row per worker process (and one for this), in shared memory, so that no count is lost
        self._counts = torch.zeros(_MAX_WORKERS, len(_STATS), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict | BadRecord:
        try:
            return self._sample(index)
        except LlavaError as error:
            return BadRecord(self.records.record_id(index), str(error))

    @property
    def stats(self) -> dict[str, int]:
        """How many samples were made so far that were `truncated`, and that had `no_label` left, over all workers."""
        return dict(zip(_STATS, self._counts.sum(dim=0).tolist(), strict=True))

    @property
    def lengths(self) -> list[int]:
        """Words per record, plus 128 for one with an image, as LLaVA-NeXT estimates them."""
        return [_words(record) + (128 if record.get("image") else 0) for record in self.records]

    @property
    def modality_lengths(self) -> list[int]:
        """Words per record: positive with an image or video (or if text is mixed in early), else negative."""
        signs = (1 if self.options.early_mix_text or media_of(record)[0] else -1 for record in self.records)
        return [sign * _words(record) for sign, record in zip(signs, self.records, strict=True)]

    def _sample(self, index: int) -> dict | BadRecord:
        """Raises `LlavaError` for a record that cannot be read."""
        raise NotImplementedError

    def _without_label(self, index: int, labels: list[int], limit: int) -> BadRecord | None:
        """Counts a sample that was cut to `limit` tokens; what it becomes if nothing is left to learn."""
        self._count("truncated")
        if any(label != IGNORE_INDEX for label in labels[1:]):  # the first token is nobody's prediction
            return None
        self._count("no_label")
        reason = f"no label left after truncation to {limit} tokens"
        return BadRecord(self.records.record_id(index), reason, "no_label")

    def _count(self, name: str) -> None:
        worker = get_worker_info()
        self._counts[(worker.id + 1) % _MAX_WORKERS if worker else 0, _STATS.index(name)] += 1


class LazySupervisedDataset(RecordDataset):
    """Samples of LLaVA models.

    An item is a dictionary with `input_ids` and `labels` (LongTensors [L]; -200 marks an image), `id`, and, where the
    record has images, `images` (list of [3, H, W], or [n, 3, H, W] for crops and frames), `image_sizes` (list of
    (width, height)) and `modalities` (list of "image" or "video"), one per -200. A record that cannot be read is a
    `BadRecord` instead, in every run and on every rank alike.

    Args:
        records: what to train on.
        tokenizer: a Hugging Face tokenizer with a fast backend.
        options: how images and videos are read.
        image_processor: the vision tower's.
        version, supervise, mm_use_im_start_end: see `llava.data.preprocess`.
        model_max_length: longest merged sequence; longer samples are cut, and counted in `stats`.
        count_visual_tokens: `(pixel_shape, image_size, modality) -> int`, what one `<image>` becomes; if it has a
            method `of_pixels`, what it is at most, and that method tells it from the pixels themselves.
    """

    def __init__(
        self,
        records: Records,
        tokenizer,
        options: MediaOptions,
        *,
        image_processor=None,
        version: str = "qwen_1_5",
        supervise: str | None = None,
        mm_use_im_start_end: bool = False,
        model_max_length: int | None = None,
        count_visual_tokens: Callable[[tuple, tuple, str], int] | None = None,
    ):
        super().__init__(records, options)
        self.image_processor = image_processor
        self.preprocessor = Preprocessor(tokenizer, version, supervise, mm_use_im_start_end)
        self.model_max_length = model_max_length
        self.count_visual_tokens = count_visual_tokens

    def _sample(self, index: int) -> dict | BadRecord:
        record = self.records[index]
        source = record["conversations"]
        kind, names = media_of(record)
        images: list[torch.Tensor] = []
        sizes: list[tuple[int, int]] = []
        if kind == "image":
            images, sizes = self._images(index, names)
        elif kind == "video":
            images, sizes, source = self._video(index, names[0], source)
        ids, labels = self.preprocessor(source, has_image=bool(names))
        if ids.count(IMAGE_TOKEN_INDEX) != len(images):
            found = ids.count(IMAGE_TOKEN_INDEX)
            raise LlavaError(f"conversations: found {found} <image> for {len(images)} images, expected as many")
        if self.model_max_length is not None:
            visual = self._visual(images, sizes, kind, len(ids) - len(images))
            if len(ids) - len(images) + sum(visual) > self.model_max_length:
                ids, labels, kept = truncate(ids, labels, visual, self.model_max_length)
                images, sizes = images[:kept], sizes[:kept]
                if (nothing := self._without_label(index, labels, self.model_max_length)) is not None:
                    return nothing
        sample = {
            "input_ids": torch.tensor(ids, dtype=torch.long),
            "labels": torch.tensor(labels, dtype=torch.long),
            "id": self.records.record_id(index),
        }
        if images:
            sample.update(images=images, image_sizes=sizes, modalities=[kind] * len(images))
        return sample

    def _images(self, index: int, names: list[str]) -> tuple[list[torch.Tensor], list[tuple[int, int]]]:
        """Pixels and (width, height) of a record's images; unless native, several are squared and get one crop each."""
        folder = self.records.part(index).image_folder or self.options.image_folder
        paths = [resolve_path(folder, name, self.options.allow_absolute_paths) for name in names]
        pictures = [load_image(path) for path in paths]
        pixels = process_pictures(pictures, self.image_processor, self._pixel_options(), paths)
        return pixels, [picture.size for picture in pictures]

    def _pixel_options(self) -> PixelOptions:
        options = self.options
        return PixelOptions(options.image_aspect_ratio, options.image_grid_pinpoints, options.native_resolution)

    def _video(self, index: int, name: str, source: list) -> tuple[list[torch.Tensor], list[tuple[int, int]], list]:
        """Frames [T, 3, H, W] of a record's video, their (width, height), and the conversation to go with them."""
        options = self.options
        folder = self.records.part(index).video_folder or options.video_folder
        path = resolve_path(folder, name, options.allow_absolute_paths)
        video = load_video(path, options.video_fps, options.frames_upbound, options.force_sample)
        if options.add_time_instruction:
            source = _with_time(source, time_instruction(video))
        frames = process_pictures([video.frames], self.image_processor, self._pixel_options(), [path])
        return frames, [video.frames[0].size], source

    def _visual(self, images: list[torch.Tensor], sizes: list[tuple[int, int]], modality: str, text: int) -> list[int]:
        """Tokens of each image; where they depend on what it shows, the most they can be if that fits beside `text`."""
        count = self.count_visual_tokens
        if count is None:
            return [1] * len(images)
        found = [count(tuple(image.shape), size, modality) for image, size in zip(images, sizes, strict=True)]
        if text + sum(found) > self.model_max_length and hasattr(count, "of_pixels"):
            return [count.of_pixels(image, size, modality) for image, size in zip(images, sizes, strict=True)]
        return found


def _words(record: dict) -> int:
    return sum(len(turn.get("value", turn.get("content", "")).split()) for turn in record["conversations"])


def _with_time(source: list, instruction: str) -> list:
    """The conversation with the clip's times in front of its first human turn, and `<image>` before them."""
    first = next((at for at, turn in enumerate(source) if turn.get("from", turn.get("role")) in ("human", "user")), 0)
    key = "value" if "value" in source[first] else "content"
    text = source[first][key].replace(DEFAULT_IMAGE_TOKEN, "")
    turn = {**source[first], key: f"{DEFAULT_IMAGE_TOKEN}\n{instruction}\n{text}"}
    return [*source[:first], turn, *source[first + 1 :]]
