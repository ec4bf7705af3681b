"""Samples to batches."""

from dataclasses import dataclass

import torch

from llava.constants import IGNORE_INDEX
from llava.data.dataset import BadRecord


@dataclass
class DataCollatorForSupervisedDataset:
    """Pads samples on the right and gathers their images.

    A batch holds `input_ids`, `labels` (LongTensors [B, L]; pad id and -100 behind each row) and `attention_mask`
    (bool [B, L]). If any row has an image, also `images`, `image_sizes` and `modalities`, flat lists in the order of
    the -200s; a text-only row adds nothing to them. `bad_records` lists the records left out as "id: reason", if any.
    A batch with nothing left is one row without labels, so that every rank takes its step.

    Attributes:
        pad_token_id: what fills up short rows.
    """

    pad_token_id: int = 0

    def __call__(self, instances: list[dict | BadRecord]) -> dict:
        samples = [instance for instance in instances if not isinstance(instance, BadRecord)]
        bad = [str(item) for item in instances if isinstance(item, BadRecord) and item.kind == "bad"]
        rows, length = max(len(samples), 1), max((len(sample["input_ids"]) for sample in samples), default=2)
        input_ids = torch.full((rows, length), self.pad_token_id, dtype=torch.long)
        labels = torch.full((rows, length), IGNORE_INDEX, dtype=torch.long)
        attention_mask = torch.zeros(rows, length, dtype=torch.bool)
        attention_mask[:, 0] = True
        for row, sample in enumerate(samples):
            filled = len(sample["input_ids"])
            input_ids[row, :filled] = sample["input_ids"]
            labels[row, :filled] = sample["labels"]
            attention_mask[row, :filled] = True
        batch = {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}
        if any("images" in sample for sample in samples):
            for key in ("images", "image_sizes", "modalities"):
                batch[key] = [value for sample in samples for value in sample.get(key, ())]
        if bad:
            batch["bad_records"] = bad
        return batch
