"""Samples to batches."""

from dataclasses import dataclass

import torch

from llava.constants import IGNORE_INDEX
from llava.data.dataset import BadRecord
from llava.model.host import HostCopies


def pad_rows(instances: list, pad_token_id: int) -> tuple[dict, list[dict]]:
    """Rows padded on the right.

    Args:
        instances: samples with `input_ids` and `labels` (LongTensors [L]), and `BadRecord`s.
        pad_token_id: what fills up short rows.

    Returns:
        a batch of `input_ids`, `labels` (LongTensors [B, L]; pad id and -100 behind each row), `attention_mask` (bool
        [B, L]) and, if there are any, `bad_records` and `no_label`: the records left out, as "id: reason"; and the
        samples in it. A batch with nothing left is one row without labels, so that every rank takes its step.
    """
    samples, left_out = _divide(instances)
    rows, length = max(len(samples), 1), max((len(sample["input_ids"]) for sample in samples), default=2)
    input_ids = torch.full((rows, length), pad_token_id, dtype=torch.long)
    labels = torch.full((rows, length), IGNORE_INDEX, dtype=torch.long)
    attention_mask = torch.zeros(rows, length, dtype=torch.bool)
    attention_mask[:, 0] = True
    for row, sample in enumerate(samples):
        filled = len(sample["input_ids"])
        input_ids[row, :filled] = sample["input_ids"]
        labels[row, :filled] = sample["labels"]
        attention_mask[row, :filled] = True
    batch = {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}
    return batch | left_out, samples


def pack_rows(instances: list, pad_token_id: int) -> tuple[dict, list[dict], list[int]]:
    """One row of all samples, one behind the other.

    Args:
        instances, pad_token_id: as `pad_rows`.

    Returns:
        a batch as that of `pad_rows`, but `input_ids` and `labels` are [1, L] and there is no `attention_mask`, since
        nothing is padding. The first token of a sample has no label: nothing predicts it. Then the samples in it, and
        the lengths of what the row is made of. A batch with nothing left is one row of two tokens without labels.
    """
    samples, left_out = _divide(instances)
    rows = [(sample["input_ids"], sample["labels"].clone()) for sample in samples]
    rows = rows or [(torch.full((2,), pad_token_id), torch.full((2,), IGNORE_INDEX))]
    for _, labels in rows:
        labels[0] = IGNORE_INDEX
    input_ids, labels = (torch.cat(parts)[None] for parts in zip(*rows, strict=True))
    return {"input_ids": input_ids, "labels": labels} | left_out, samples, [len(ids) for ids, _ in rows]


def _divide(instances: list) -> tuple[list[dict], dict[str, list[str]]]:
    """Samples, and what a batch says of the records left out: "bad_records" and "no_label", as far as there are any."""
    samples = [instance for instance in instances if not isinstance(instance, BadRecord)]
    left_out = {"bad_records": [], "no_label": []}
    for item in instances:
        if isinstance(item, BadRecord):
            left_out["no_label" if item.kind == "no_label" else "bad_records"].append(str(item))
    return samples, {kind: found for kind, found in left_out.items() if found}


def record_ids(samples: list[dict]) -> list[str]:
    """The ids of the records that samples were made of, as far as they have one."""
    return [sample["id"] for sample in samples if "id" in sample]


@dataclass
class DataCollatorForSupervisedDataset:
    """LLaVA's batches: `pad_rows`, and the images of all rows.

    If any row has an image: `images`, `image_sizes`, `modalities`, and `patch_alphas` where those are drawn: flat lists
    in the order of the -200s; a text-only row adds nothing to them. `host`: the `HostCopies` of `input_ids`, `labels`
    and `attention_mask`, `record_ids`, and `patch_levels`, a list as the others, where patches are chosen.

    Attributes:
        pad_token_id: what fills up short rows.
        pack: whether the model is to lay the rows one after the other, each with its images in it, instead of padding
            them. `host.packed` tells it so.
    """

    pad_token_id: int = 0
    pack: bool = False

    def __call__(self, instances: list[dict | BadRecord]) -> dict:
        batch, samples = pad_rows(instances, self.pad_token_id)
        for key in ("images", "image_sizes", "modalities", "patch_alphas"):
            if any(key in sample for sample in samples):
                batch[key] = [value for sample in samples for value in sample.get(key, ())]
        host = {key: batch[key] for key in ("input_ids", "labels", "attention_mask")}
        host["record_ids"] = record_ids(samples)
        if any("patch_levels" in sample for sample in samples):
            host["patch_levels"] = [levels for sample in samples for levels in sample.get("patch_levels", ())]
        if self.pack:
            host["packed"] = batch["attention_mask"].sum(1).tolist()
        return batch | {"host": HostCopies(**host)}
