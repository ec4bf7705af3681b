"""Data set and collator of a training run."""

import os
from functools import partial

from llava.data.dataset import LazySupervisedDataset, SampleArgs
from llava.data.records import Records, load_records
from llava.data.validate import validate_records
from llava.errors import LlavaError
from llava.utils import rank0_print


def read_records(data_args, *, version: str, refused: dict[str, str], seed: int = 0, key: str = "data_path") -> Records:
    """The records of a run, all of them checked; no picture is read, and no model is needed.

    Args:
        data_args: an object with LLaVA-NeXT's DataArguments: data_path (see `load_records`), image_folder, ...
        version: name of the conversation template whose rules the turns follow.
        refused: "image" or "video" -> what is wrong with a record that has one.
        seed: decides what a mixture's `random:X` picks.
        key: what messages call the path.

    Raises:
        LlavaError: a fault in the data files (see `load_records` and `validate_records`), or media of a kind that the
            model does not take.
    """
    if data_args.data_path is None:
        raise LlavaError(f"{key}: missing; expected LLaVA JSON or JSONL, or a mixture YAML")
    records, args = load_records(data_args.data_path, seed), SampleArgs.from_args(data_args)
    if not records:
        raise LlavaError(f"{key} {data_args.data_path}: found no records, expected at least one")
    for kind, fault in refused.items():
        seen = next((index for index, record in enumerate(records) if record.get(kind)), None)
        if seen is not None:
            raise LlavaError(f"{records.describe(seen)}: {fault}")
    validate_records(
        records,
        version=version,
        image_folder=args.image_folder,
        video_folder=args.video_folder,
        allow_absolute_paths=args.allow_absolute_paths,
        add_time_instruction=args.add_time_instruction,
        system_turn=args.system_turn,
        # one process per machine asks the file system; the others' runs end with it
        check_paths=int(os.environ.get("LOCAL_RANK", "0")) in (-1, 0),
    )
    rank0_print(f"{len(records):,} records from {', '.join(dict.fromkeys(part.path for part in records.parts))}")
    return records


def make_data(records: Records, family, loaded, args: SampleArgs) -> dict:
    """What the trainer needs of the records: `train_dataset` and `data_collator`; arguments as the data set's."""
    dataset = LazySupervisedDataset(records, family, loaded, args)
    return {"train_dataset": dataset, "data_collator": partial(family.collate, loaded=dataset.loaded, args=args)}
