"""Data set and collator of a training run."""

import os
from collections.abc import Callable

from llava.data.collator import DataCollatorForSupervisedDataset
from llava.data.dataset import LazySupervisedDataset, MediaOptions
from llava.data.preprocess import resolve_supervise
from llava.data.records import load_records
from llava.data.validate import validate_records
from llava.utils import rank0_print


def make_supervised_data_module(
    tokenizer,
    data_args,
    *,
    image_processor=None,
    version: str,
    model_max_length: int | None = None,
    count_visual_tokens: Callable[[tuple, tuple, str], int] | None = None,
    seed: int = 0,
) -> dict:
    """Load and check the records of a run, and make what the trainer needs of them.

    Args:
        tokenizer: a Hugging Face tokenizer with a fast backend.
        data_args: an object with LLaVA-NeXT's DataArguments (data_path, image_folder, video_folder,
            image_aspect_ratio, ...), `supervise`, `allow_absolute_paths` and `mm_use_im_start_end`.
        image_processor: the vision tower's.
        version: template name.
        model_max_length: longest merged sequence; None: no limit.
        count_visual_tokens: `(pixel_shape, (width, height), modality) -> int`, what one `<image>` becomes.
        seed: decides what a mixture's `random:X` picks.

    Returns:
        `train_dataset` and `data_collator`.

    Raises:
        LlavaError: a fault in the data files; see `load_records` and `validate_records`.
    """
    supervise = resolve_supervise(version, getattr(data_args, "supervise", None))
    records = load_records(data_args.data_path, seed)
    options = MediaOptions.from_args(data_args)
    validate_records(
        records,
        version=version,
        image_folder=options.image_folder,
        video_folder=options.video_folder,
        allow_absolute_paths=options.allow_absolute_paths,
        add_time_instruction=options.add_time_instruction,
        # one process per machine asks the file system; the others' runs end with it
        check_paths=int(os.environ.get("LOCAL_RANK", "0")) in (-1, 0),
    )
    rank0_print(f"{len(records):,} records from {', '.join(dict.fromkeys(part.path for part in records.parts))}")
    dataset = LazySupervisedDataset(
        records,
        tokenizer,
        options,
        image_processor=image_processor,
        version=version,
        supervise=supervise,
        mm_use_im_start_end=bool(getattr(data_args, "mm_use_im_start_end", False)),
        model_max_length=model_max_length,
        count_visual_tokens=count_visual_tokens,
    )
    pad = tokenizer.pad_token_id
    return {
        "train_dataset": dataset,
        "data_collator": DataCollatorForSupervisedDataset(0 if pad is None else pad),
    }
