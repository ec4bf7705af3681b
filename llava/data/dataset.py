"""Records to training samples: what every family has in common."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.utils.data import Dataset, get_worker_info

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.data.paths import media_of, resolve_path, shown_media
from llava.data.preprocess import Encoded
from llava.data.records import Part, Records
from llava.errors import LlavaError
from llava.images.processing import PixelOptions
from llava.images.reading import load_image, load_video, time_instruction

_STATS = ("truncated", "no_label")
_MAX_WORKERS = 256


class NoLabel(LlavaError):
    """A sample that has nothing to learn: no answer with text, or none of it within the longest length.

    cut: whether it was cut to that length.
    """

    cut = False


@dataclass(frozen=True)
class BadRecord:
    """A record that gives no sample.

    Attributes:
        id: the record's id.
        reason: one line.
        kind: "bad" (unreadable image, ...) or "no_label" (nothing to learn); each has a limit that stops a run.
    """

    id: str
    reason: str
    kind: str = "bad"

    def __str__(self) -> str:
        return f"{self.id}: {self.reason}"


@dataclass(frozen=True)
class SampleArgs:
    """How records become samples; most names and defaults are LLaVA-NeXT's.

    Attributes:
        native_resolution: the model's, for image_aspect_ratio native.
        model_max_length: longest sample, in tokens with those of its pictures; None: no limit.
        patch_choice: the `PatchChoice` of a run whose alpha is drawn for each image; else None.
        seed: of the run, for what is drawn.
        pack_sequences: whether a batch's samples share one row, one behind the other, instead of being padded.
    """

    image_folder: str | None = None
    video_folder: str | None = None
    image_aspect_ratio: str | None = "square"
    image_grid_pinpoints: object = None
    native_resolution: Callable[[int, int], tuple[int, int]] | None = None
    video_fps: float = 1
    frames_upbound: int = 0
    force_sample: bool = False
    add_time_instruction: bool = False
    early_mix_text: bool = False
    allow_absolute_paths: bool = False
    system_turn: str = "template"
    model_max_length: int | None = None
    patch_choice: object = None
    seed: int = 0
    pack_sequences: bool = False

    @classmethod
    def from_args(cls, data_args, **changes) -> "SampleArgs":
        """From any object with attributes of these names; a missing one has its default."""
        found = {name: getattr(data_args, name, default) for name, default in vars(cls()).items()}
        return cls(**(found | changes))

    @property
    def pixels(self) -> PixelOptions:
        return PixelOptions(self.image_aspect_ratio, self.image_grid_pinpoints, self.native_resolution)

    def within(self, part: Part) -> "SampleArgs":
        """With the folders that a part of the records has of its own."""
        own = {name: getattr(part, name) for name in ("image_folder", "video_folder") if getattr(part, name)}
        return replace(self, **own) if own else self


@dataclass(frozen=True)
class Media:
    """What a record shows.

    Attributes:
        kind: "image", "video" or None: what the record names.
        paths: of the files; none where the conversation has no `<image>` for what it names.
        pictures: PIL images; of a video one list, its frames.
        sizes: (width, height) of each.
        conversation: the record's, with the times of a video's frames where they are asked for.
    """

    kind: str | None
    paths: list[str]
    pictures: list
    sizes: list[tuple[int, int]]
    conversation: list


def read_media(record: dict, args: SampleArgs) -> Media:
    """A record's pictures or video, read from disk.

    Raises:
        LlavaError: a file that is missing, cannot be read or leaves its folder.
    """
    kind, names = shown_media(record, args.add_time_instruction)
    conversation = record["conversations"]
    folder = args.video_folder if kind == "video" else args.image_folder
    paths = [resolve_path(folder, name, args.allow_absolute_paths) for name in names]
    if kind != "video" or not paths:
        pictures = [load_image(path) for path in paths]
        return Media(kind, paths, pictures, [picture.size for picture in pictures], conversation)
    video = load_video(paths[0], args.video_fps, args.frames_upbound, args.force_sample)
    if args.add_time_instruction:
        conversation = with_time(conversation, time_instruction(video))
    return Media(kind, paths, [video.frames], [video.frames[0].size], conversation)


def fit(
    encoded: Encoded, sizes: list[int], limit: int | None, whole_images: bool
) -> tuple[list[int], list[int], int, bool]:
    """A sample, cut where its sequence with every image's tokens in place passes `limit` tokens (None: never).

    Args:
        encoded: with one -200 for each image.
        sizes: tokens of each image, in order.
        limit: in tokens.
        whole_images: what does not fit whole goes, and all behind it; else an image that begins before the limit
            stays, even if its tokens reach beyond it, and then nothing follows it.

    Returns:
        ids, labels, how many images are left, and whether anything was cut.

    Raises:
        LlavaError: another number of -200 than of images.
        NoLabel: there is no text of an answer in it, or none is left. The tokens of the template alone teach nothing.
    """
    ids, labels, answer = encoded
    if answer is None:
        raise NoLabel("no answer has text, so there is nothing to learn")
    if (found := ids.count(IMAGE_TOKEN_INDEX)) != len(sizes):
        raise LlavaError(f"conversations: found {found} <image> for {len(sizes)} images, expected as many")
    if limit is None or len(ids) - len(sizes) + sum(sizes) <= limit:
        return ids, labels, len(sizes), False
    merged = kept = 0
    end = len(ids)
    for position, token in enumerate(ids):
        size = sizes[kept] if token == IMAGE_TOKEN_INDEX else 1
        if merged + (size if whole_images else 1) > limit:
            end = position
            break
        merged += size
        kept += token == IMAGE_TOKEN_INDEX
    if answer >= end:
        error = NoLabel(f"no label left after truncation to {limit} tokens")
        error.cut = True
        raise error
    return ids[:end], labels[:end], kept, True


class LazySupervisedDataset(Dataset):
    """Samples made on demand; an index is a record's number, or (epoch, number).

    An item is what the family's `sample` makes of the record, with its `id`. A record that cannot be read is a
    `BadRecord` instead, in every run and on every rank alike.

    Args:
        records: what to train on.
        family: the model's; knows how samples are made.
        loaded: the model's tokenizer and processors; the model itself is not kept.
        args: how samples are made.
    """

    def __init__(self, records: Records, family, loaded, args: SampleArgs):
        self.records, self.family, self.loaded, self.args = records, family, loaded.without_model(), args
        # one row per worker process (and one for this), in shared memory, so that no count is lost
        self._counts = torch.zeros(_MAX_WORKERS, len(_STATS), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int | tuple[int, int]) -> dict | BadRecord:
        item, cut = self.peek(index)
        if cut:
            self._count("truncated")
        if isinstance(item, BadRecord) and item.kind == "no_label":
            self._count("no_label")
        return item

    def peek(self, index: int | tuple[int, int]) -> tuple[dict | BadRecord, bool]:
        """An item, and whether it was cut to the longest length; it is not counted."""
        epoch, index = index if isinstance(index, tuple) else (0, index)
        args, name = self.args.within(self.records.part(index)), self.records.record_id(index)
        try:
            sample = self.family.sample(self.records[index], self.loaded, args, at=(epoch, index))
        except NoLabel as error:
            return BadRecord(name, str(error), "no_label"), error.cut
        except LlavaError as error:
            return BadRecord(name, str(error)), False
        cut = sample.pop("truncated", False)
        return {**sample, "id": name}, cut

    @property
    def draws(self) -> bool:
        """Whether something is drawn for each epoch anew, so that an index must say which one it is."""
        return self.args.patch_choice is not None

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
        return [sign * _words(record) for sign, record in zip(self.modalities, self.records, strict=True)]

    def token_lengths(self, **how) -> list[int]:
        """Tokens per record in the language model, at most the longest length and at least 1, from the headers of its
        pictures; `how` is `record_lengths`'."""
        from llava.data.lengths import record_lengths

        tokens = record_lengths(self.records, self.family, self.loaded, self.args, **how).tokens
        return tokens.clip(1, self.args.model_max_length).tolist()

    @property
    def modalities(self) -> list[int]:
        """Per record 1 with an image or video (or if text is mixed in early), else -1."""
        return [1 if self.args.early_mix_text or media_of(record)[0] else -1 for record in self.records]

    def _count(self, name: str) -> None:
        worker = get_worker_info()
        self._counts[(worker.id + 1) % _MAX_WORKERS if worker else 0, _STATS.index(name)] += 1


def _words(record: dict) -> int:
    return sum(len(turn.get("value", turn.get("content", "")).split()) for turn in record["conversations"])


def with_time(source: list, instruction: str) -> list:
    """The conversation with the clip's times in front of its first human turn, and `<image>` before them."""
    first = next((at for at, turn in enumerate(source) if turn.get("from", turn.get("role")) in ("human", "user")), 0)
    key = "value" if "value" in source[first] else "content"
    text = source[first][key].replace(DEFAULT_IMAGE_TOKEN, "")
    turn = {**source[first], key: f"{DEFAULT_IMAGE_TOKEN}\n{instruction}\n{text}"}
    return [*source[:first], turn, *source[first + 1 :]]
