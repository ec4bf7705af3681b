"""Records to Qwen2-VL's training samples: its chat template with labels, images with adaptive patches, batches."""

from dataclasses import dataclass

import torch
from torch.utils.data import Sampler

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import Turn
from llava.data.collator import DataCollatorForSupervisedDataset
from llava.data.dataset import BadRecord, MediaOptions, RecordDataset
from llava.data.images import load_image, resolve_path
from llava.data.paths import media_of
from llava.data.preprocess import encode_spans
from llava.data.records import Records
from llava.data.turns import leading_system, place_image, read_turns
from llava.errors import LlavaError
from llava.model.adaptive_patches import PatchChoice
from llava.text_encoding import text_encoder

SYSTEM = "You are a helpful assistant."  # where a record has no system text of its own
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_END = "<|im_end|>"


def chat_turns(turns: list[tuple[str, str]], system: str | None = None) -> list[Turn]:
    """A conversation as Qwen2-VL's chat template writes it, piece by piece; the first piece is the system's.

    An `<image>` stays `<image>`; a newline right behind one, as LLaVA's data has it, is left out, since Qwen2-VL's own
    prompts have none there.

    Args:
        turns: ("human" | "gpt" | "system", text), as `read_turns` gives them.
        system: system text; None: Qwen2-VL's own.
    """
    pieces = [Turn(f"<|im_start|>system\n{SYSTEM if system is None else system}{_END}\n")]
    for speaker, text in turns:
        header = f"<|im_start|>{_ROLES[speaker]}\n"
        body = text.replace(DEFAULT_IMAGE_TOKEN + "\n", DEFAULT_IMAGE_TOKEN) + _END
        pieces += [Turn(header + body, len(header) if speaker == "gpt" else None), Turn("\n")]
    return pieces


def chat_prompt(turns: list[tuple[str, str]], system: str | None = None) -> str:
    """The prompt up to where the answer begins, one `<|image_pad|>` for each image: what the processor takes."""
    text = "".join(turn.text for turn in chat_turns(turns, system)) + "<|im_start|>assistant\n"
    return text.replace(DEFAULT_IMAGE_TOKEN, IMAGE)


def check_chat_template(processor, where: str) -> None:
    """Refuse a model whose chat template writes something else than `chat_turns`; one without a template passes."""
    if getattr(processor, "chat_template", None) is None and processor.tokenizer.chat_template is None:
        return
    turns = [("human", "<image>\nWhat?"), ("gpt", "A b."), ("human", "So?")]
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    messages = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": "A b."}]},
        {"role": "user", "content": [{"type": "text", "text": "So?"}]},
    ]
    for system in (None, "Be brief."):
        first = [] if system is None else [{"role": "system", "content": [{"type": "text", "text": system}]}]
        if processor.chat_template is not None:
            theirs = processor.apply_chat_template(first + messages, tokenize=False, add_generation_prompt=True)
        else:
            theirs = processor.tokenizer.apply_chat_template(
                first + messages, tokenize=False, add_generation_prompt=True
            )
        if theirs != chat_prompt(turns, system):
            raise LlavaError(f"{where}: its chat template writes {theirs!r}, expected Qwen2-VL's")


@dataclass(frozen=True)
class AlphaRange:
    """`PatchChoice.draw` between two numbers, with the run's seed."""

    low: float
    high: float
    seed: int = 0

    def draw(self, epoch: int, record: int, image: int) -> float:
        return PatchChoice("budget", (self.low, self.high)).draw(self.seed, epoch, record, image)

    @property
    def middle(self) -> float:
        return PatchChoice("budget", (self.low, self.high)).middle


class EpochSampler(Sampler):
    """Another sampler's indices as (epoch, index), so that a data set in any worker process knows the epoch."""

    def __init__(self, sampler: Sampler):
        self.sampler, self.epoch = sampler, 0

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __iter__(self):
        return ((self.epoch, index) for index in self.sampler)


def truncate(ids: list[int], labels: list[int], visual: list[int], limit: int) -> tuple[list[int], list[int], int]:
    """Cut a sample to `limit` tokens; an image that does not fit whole goes, and all behind it.

    Args:
        ids, labels: with one -200 for each image.
        visual: number of tokens that each image takes, in order.

    Returns:
        ids, labels, and how many images are left.
    """
    merged = images = 0
    for position, token in enumerate(ids):
        merged += visual[images] if token == IMAGE_TOKEN_INDEX else 1
        if merged > limit:
            return ids[:position], labels[:position], images
        images += token == IMAGE_TOKEN_INDEX
    return ids, labels, images


class Qwen2VLDataset(RecordDataset):
    """Samples of Qwen2-VL, made on demand; an index is a record's, or (epoch, record's).

    An item is a dictionary with `input_ids`, `labels` (LongTensors [L]), `id`, and, where the record has images,
    `pixel_values`, `image_grid_thw` and, if patches are chosen, `image_patch_levels`, as the image processor makes
    them. A record that cannot be read is a `BadRecord` instead, in every run and on every rank alike.

    Args:
        records: what to train on.
        processor: `AdaptiveQwen2VLProcessor`; its image processor's settings hold.
        options: how images are read.
        model_max_length: longest sample; longer ones are cut, and counted in `stats`.
        alpha: drawn for each image; None: the image processor's.
    """

    def __init__(
        self,
        records: Records,
        processor,
        options: MediaOptions,
        *,
        model_max_length: int | None = None,
        alpha: AlphaRange | None = None,
    ):
        super().__init__(records, options)
        self.image_processor = processor.image_processor
        self.encoder = text_encoder(processor.tokenizer)
        self.model_max_length = model_max_length
        self.alpha = alpha
        self._start, self._pad, self._end = (
            processor.tokenizer.convert_tokens_to_ids(token)
            for token in ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
        )

    def __getitem__(self, index: int | tuple[int, int]) -> dict | BadRecord:
        epoch, index = index if isinstance(index, tuple) else (0, index)
        try:
            return self._sample(index, epoch)
        except LlavaError as error:
            return BadRecord(self.records.record_id(index), str(error))

    def tokens(self, source: list, images: bool) -> tuple[list[int], list[int]]:
        """Ids (-200 marks an image) and labels of one conversation: answers, with the token that ends them.

        Raises:
            LlavaError: not a conversation, or one that spells out image tokens.
        """
        turns = [(speaker, place_image(text) if images else text) for speaker, text in read_turns(source)]
        ids: list[int] = []
        labels: list[int] = []
        for turn in chat_turns(turns, leading_system(source)):
            spans = [] if turn.answer_start is None else [(turn.answer_start, len(turn.text))]
            more_ids, more_labels = encode_spans(self.encoder, turn.text, spans, images)
            ids += more_ids
            labels += more_labels
        if self._pad in ids:
            raise LlavaError("conversations: found <|image_pad|> in a text, expected <image> for an image")
        return ids, labels

    def _sample(self, index: int, epoch: int = 0) -> dict | BadRecord:
        record = self.records[index]
        names = media_of(record)[1]
        ids, labels = self.tokens(record["conversations"], bool(names))
        if ids.count(IMAGE_TOKEN_INDEX) != len(names):
            found = ids.count(IMAGE_TOKEN_INDEX)
            raise LlavaError(f"conversations: found {found} <image> for {len(names)} images, expected as many")
        images = [self._image(index, name, number, epoch) for number, name in enumerate(names)]
        counts = [_language_tokens(image) for image in images]
        limit = self.model_max_length
        if limit is not None and len(ids) + sum(counts) + len(counts) > limit:  # an image stands between two marks
            ids, labels, kept = truncate(ids, labels, [count + 2 for count in counts], limit)
            images = images[:kept]
            if (nothing := self._without_label(index, labels, limit)) is not None:
                return nothing
        ids, labels = self._expand(ids, labels, counts)
        sample = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "id": self.records.record_id(index)}
        for key in images[0] if images else ():
            sample[key] = torch.cat([image[key] for image in images])
        return sample

    def _image(self, index: int, name: str, number: int, epoch: int) -> dict:
        """What the image processor makes of the record's image of this number."""
        folder = self.records.part(index).image_folder or self.options.image_folder
        path = resolve_path(folder, name, self.options.allow_absolute_paths)
        picture = load_image(path)
        settings = {} if self.alpha is None else {"alpha": self.alpha.draw(epoch, index, number)}
        try:
            return dict(self.image_processor(images=[picture], return_tensors="pt", **settings))
        except ValueError as error:  # sizes such as 2000 x 5 that no processor takes
            reason = f"image {path}: found {picture.width}x{picture.height} pixels that cannot be processed"
            raise LlavaError(f"{reason} ({error})") from None

    def _expand(self, ids: list[int], labels: list[int], counts: list[int]) -> tuple[list[int], list[int]]:
        """Every -200 as the tokens of its image, between the two marks."""
        left = iter(counts)
        new_ids: list[int] = []
        new_labels: list[int] = []
        for token, label in zip(ids, labels, strict=True):
            image = [self._start, *[self._pad] * next(left), self._end] if token == IMAGE_TOKEN_INDEX else None
            new_ids += image or [token]
            new_labels += [IGNORE_INDEX] * len(image) if image else [label]
        return new_ids, new_labels


def _language_tokens(image: dict) -> int:
    """Tokens that one processed image takes in the language model."""
    from llava.model.qwen2_vl.layout import MERGE, token_counts

    if "image_patch_levels" in image:
        return token_counts(image["image_patch_levels"], image["image_grid_thw"])[0][1]
    return len(image["pixel_values"]) // MERGE**2


@dataclass
class Qwen2VLCollator:
    """Pads samples on the right and gathers their images.

    A batch holds what the model's `forward` takes, and `bad_records`, if any, as `DataCollatorForSupervisedDataset`'s.
    A batch without images gets one of four patches, as a masked token behind the last row: it has no influence, but
    each of several processes runs the vision encoder in each step, as ZeRO-3 and DDP need.

    Attributes:
        pad_token_id: what fills up short rows.
        image_token_id: `<|image_pad|>`.
        patch_values: numbers in a row of `pixel_values`.
        levels: whether batches carry `image_patch_levels`.
    """

    pad_token_id: int
    image_token_id: int
    patch_values: int
    levels: bool

    def __call__(self, instances: list[dict | BadRecord]) -> dict:
        batch = DataCollatorForSupervisedDataset(self.pad_token_id)(instances)
        batch["attention_mask"] = batch["attention_mask"].long()
        found = [sample for sample in instances if isinstance(sample, dict) and "pixel_values" in sample]
        if not found:
            rows = len(batch["input_ids"])
            for key, fill in (("input_ids", self.pad_token_id), ("labels", IGNORE_INDEX), ("attention_mask", 0)):
                batch[key] = torch.cat([batch[key], torch.full((rows, 1), fill)], dim=1)
            batch["input_ids"][-1, -1] = self.image_token_id
            found = [self._no_image()]
        for key in ("pixel_values", "image_grid_thw", *(["image_patch_levels"] if self.levels else [])):
            batch[key] = torch.cat([sample[key] for sample in found])
        batch["mm_token_type_ids"] = (batch["input_ids"] == self.image_token_id).long()
        return batch

    def _no_image(self) -> dict:
        return {
            "pixel_values": torch.zeros(4, self.patch_values),
            "image_grid_thw": torch.tensor([[1, 2, 2]]),
            "image_patch_levels": torch.ones(4, dtype=torch.uint8),
        }
