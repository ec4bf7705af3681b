"""Data sets of LLaVA-NeXT's train.py, for programs with a loop of their own; this project's runs use `llava.data`.

Prompts and labels follow `llava.conversation.default_conversation`, which such a program sets:

    conversation_lib.default_conversation = conversation_lib.conv_templates["qwen_1_5"]
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from llava import conversation as conversation_lib
from llava.constants import IGNORE_INDEX
from llava.conversation import SeparatorStyle
from llava.data import preprocess as prompts
from llava.data.dataset import SampleArgs, read_media
from llava.data.paths import resolve_path
from llava.data.records import load_records
from llava.data.turns import leading_system, place_image
from llava.errors import LlavaError
from llava.images.processing import process_image, process_pictures, processor_sides
from llava.images.reading import load_image


def preprocess_multimodal(sources: list, data_args) -> list:
    """Conversations with each single `<image>` at the front of its turn; changed in place, as in LLaVA-NeXT.

    data_args: has `is_multimodal` (False: nothing is done) and `mm_use_im_start_end`.
    """
    if not data_args.is_multimodal:
        return sources
    mmtag, wrapped = "mmtag" in conversation_lib.default_conversation.version, data_args.mm_use_im_start_end
    for source in sources:
        for turn in source:
            key = "value" if "value" in turn else "content"
            turn[key] = place_image(turn[key], mmtag, wrapped)
    return sources


def preprocess(sources: list, tokenizer, has_image: bool = False) -> dict:
    """Tokens and labels under `default_conversation`.

    Args:
        sources: conversations that have been through `preprocess_multimodal`; left as they are.
        tokenizer: a Hugging Face tokenizer with a fast backend.
        has_image: whether `<image>` stands for an image.

    Returns:
        `input_ids` and `labels`, LongTensors [B, L], padded on the right; nothing is cut.

    Raises:
        LlavaError: a conversation that does not fit the template, or a default that is none of `conv_templates`.
    """
    return _preprocess(sources, tokenizer, has_image, _default_name())


def _preprocess(sources, tokenizer, has_image: bool, version: str, system: str | None = None) -> dict:
    if system is not None:
        sources = [
            [{"from": "system", "value": system}, *source[leading_system(source) is not None :]] for source in sources
        ]
    how = {"system_turn": "template" if system is None else "record"}
    return prompts.preprocess(sources, tokenizer, has_image, version, placed=True, **how)


def _default_name() -> str:
    """What `default_conversation` is called in `conv_templates`."""
    found = conversation_lib.default_conversation
    for same in (lambda template: template is found, lambda template: template == found):
        for name, template in conversation_lib.conv_templates.items():
            if same(template):
                return name
    raise LlavaError(f"default_conversation: found a template {found.version!r} that is none of conv_templates")


def preprocess_plain(sources: list, tokenizer) -> dict:
    """An image and its caption; see `preprocess`."""
    return _of_style(sources, tokenizer, True, "plain", SeparatorStyle.PLAIN)


def preprocess_v1(sources: list, tokenizer, has_image: bool = False) -> dict:
    """Vicuna's templates; see `preprocess`."""
    return _of_style(sources, tokenizer, has_image, "v1", SeparatorStyle.TWO)


def preprocess_llama_2(sources: list, tokenizer, has_image: bool = False) -> dict:
    """Templates of Llama 2 and Mistral; see `preprocess`."""
    return _of_style(sources, tokenizer, has_image, "llama_2", SeparatorStyle.LLAMA_2)


def preprocess_mpt(sources: list, tokenizer, has_image: bool = False) -> dict:
    """MPT's templates; see `preprocess`."""
    return _of_style(sources, tokenizer, has_image, "mpt", SeparatorStyle.MPT)


def preprocess_gemma(sources: list, tokenizer, has_image: bool = False) -> dict:
    """Gemma's template; see `preprocess`."""
    return _of_style(sources, tokenizer, has_image, "gemma", SeparatorStyle.GEMMA)


def _of_style(sources, tokenizer, has_image: bool, kind: str, style: SeparatorStyle) -> dict:
    found = conversation_lib.default_conversation.sep_style
    if found is not style:
        raise LlavaError(f"preprocess_{kind}: found default_conversation of style {found.name}, expected {style.name}")
    return _preprocess(sources, tokenizer, has_image, _default_name())


def preprocess_qwen(
    sources: list, tokenizer, has_image: bool = False, max_len=2048, system_message="You are a helpful assistant."
) -> dict:
    """Qwen's template, whatever the default is; `max_len` is not read, as in LLaVA-NeXT. See `preprocess`."""
    usual = system_message == "You are a helpful assistant."
    return _preprocess(sources, tokenizer, has_image, "qwen_1_5", None if usual else system_message)


def preprocess_llama3(
    sources: list, tokenizer, has_image: bool = False, max_len=2048, system_message: str | None = None
) -> dict:
    """Llama 3's template, whatever the default is; `system_message` None: the template's. See `preprocess_qwen`."""
    return _preprocess(sources, tokenizer, has_image, "llava_llama_3", system_message)


class LazySupervisedDataset(Dataset):
    """Samples made on demand.

    An item has `input_ids` and `labels` (LongTensors [L]), `id`, and where the record has an image or video, `image`: a
    list of (pixels [3, H, W] or [n, 3, H, W], (width, height), "image" or "video"). With `data_args.is_multimodal` a
    record of text alone has one black image of the kind "text".

    Args:
        data_path: as `llava.data.load_records`.
        tokenizer: a Hugging Face tokenizer with a fast backend.
        data_args: LLaVA-NeXT's DataArguments, with `image_processor` and `mm_use_im_start_end`.

    Raises:
        LlavaError: data that cannot be read; of an item: its record. None is replaced by another.
    """

    def __init__(self, data_path: str, tokenizer, data_args):
        super().__init__()
        self.list_data_dict = load_records(data_path)
        self.tokenizer, self.data_args = tokenizer, data_args

    def __len__(self) -> int:
        return len(self.list_data_dict)

    @property
    def lengths(self) -> list[int]:
        """Words per record, plus 128 for one with an image."""
        return [_words(record) + (128 if "image" in record else 0) for record in self.list_data_dict]

    @property
    def modality_lengths(self) -> list[int]:
        """Words per record: negative for text alone, unless text is mixed in early."""
        mixed = getattr(self.data_args, "early_mix_text", False)
        shows = [mixed or "image" in record or "video" in record for record in self.list_data_dict]
        return [_words(r) if shown else -_words(r) for r, shown in zip(self.list_data_dict, shows, strict=True)]

    def process_image(self, image_file: str, overwrite_image_aspect_ratio: str | None = None):
        """(pixels, (width, height), "image") of one file of the image folder."""
        args = SampleArgs.from_args(self.data_args)
        image = load_image(resolve_path(args.image_folder, image_file, args.allow_absolute_paths))
        aspect = overwrite_image_aspect_ratio or args.image_aspect_ratio
        how = aspect, args.image_grid_pinpoints, args.native_resolution
        return process_image(image, self.data_args.image_processor, *how), image.size, "image"

    def __getitem__(self, i: int) -> dict[str, Any]:
        try:
            return self._item(self.list_data_dict[i], i)
        except LlavaError as error:
            raise LlavaError(f"{self.list_data_dict.describe(i)}: {error}") from None

    def _item(self, record: dict, i: int) -> dict[str, Any]:
        args = SampleArgs.from_args(self.data_args).within(self.list_data_dict.part(i))
        processor = getattr(self.data_args, "image_processor", None)
        media = read_media(record, args)
        sources = [copy.deepcopy(media.conversation)]
        if media.kind is not None:
            sources = preprocess_multimodal(sources, self.data_args)
        made = preprocess(sources, self.tokenizer, has_image=media.kind is not None)
        item = {"input_ids": made["input_ids"][0], "labels": made["labels"][0]}
        if media.kind is not None:
            pixels = process_pictures(media.pictures, processor, args.pixels, media.paths)
            item["image"] = [(p, size, media.kind) for p, size in zip(pixels, media.sizes, strict=True)]
        elif getattr(self.data_args, "is_multimodal", False):
            side = processor_sides(processor)[0]
            item["image"] = [(torch.zeros(1, 3, side, side), (side, side), "text")]
        return {**item, "id": record.get("id", i)}


def _words(record: dict) -> int:
    return sum(len(turn.get("value", turn.get("content", "")).split()) for turn in record["conversations"])


@dataclass
class DataCollatorForSupervisedDataset:
    """Items of `LazySupervisedDataset` to a batch that a model here takes: `model(**batch)`.

    `input_ids` and `labels` [B, L], cut to the tokenizer's `model_max_length` and padded on its `padding_side` with its
    pad id (0 where it has none) and -100; `attention_mask` bool [B, L], False on padding alone; and of items with an
    `image` the flat lists `images`, `image_sizes` and `modalities`.
    """

    tokenizer: Any

    def __call__(self, instances: list[dict]) -> dict:
        limit, pad = self.tokenizer.model_max_length, self.tokenizer.pad_token_id or 0
        rows = [(item["input_ids"][:limit], item["labels"][:limit]) for item in instances]
        shape = len(rows), max(len(ids) for ids, _ in rows)
        batch = {
            "input_ids": torch.full(shape, pad, dtype=torch.long),
            "labels": torch.full(shape, IGNORE_INDEX, dtype=torch.long),
            "attention_mask": torch.zeros(shape, dtype=torch.bool),
        }
        for at, (ids, labels) in enumerate(rows):
            left = shape[1] - len(ids) if self.tokenizer.padding_side == "left" else 0
            for name, values in (("input_ids", ids), ("labels", labels), ("attention_mask", True)):
                batch[name][at, left : left + len(ids)] = values
        if any("image" in item for item in instances):
            shown = [image for item in instances for image in item.get("image", ())]
            for name, values in zip(("images", "image_sizes", "modalities"), zip(*shown, strict=True), strict=True):
                batch[name] = list(values)
        return batch


def make_supervised_data_module(tokenizer, data_args) -> dict:
    """`train_dataset`, `eval_dataset` (None) and `data_collator` of a run's data arguments."""
    dataset = LazySupervisedDataset(tokenizer=tokenizer, data_path=data_args.data_path, data_args=data_args)
    return {
        "train_dataset": dataset,
        "eval_dataset": None,
        "data_collator": DataCollatorForSupervisedDataset(tokenizer=tokenizer),
    }
