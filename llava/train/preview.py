"""What a run is about to learn from: one sample as text, with what is supervised marked, and how much that is."""

from llava.constants import IGNORE_INDEX
from llava.data.dataset import BadRecord
from llava.errors import LlavaError
from llava.utils import rank0_print

LOOKED_AT = 8  # records, spread evenly over the data
_MOST = 2000  # characters of the sample that is shown


def show_samples(dataset) -> None:
    """Print the first of some samples, and the share of supervised tokens in all of them; the same on every rank.

    Raises:
        LlavaError: none of the records gives a sample.
    """
    count = min(len(dataset), LOOKED_AT)
    items = [dataset.peek(number * len(dataset) // count)[0] for number in range(count)]
    samples = [item for item in items if not isinstance(item, BadRecord)]
    lost = [item for item in items if isinstance(item, BadRecord)]
    if not samples:
        raise LlavaError(f"none of the {count} records that were looked at gives a sample; the first is {lost[0]}")
    visual, tokenizer = dataset.family.visual_token(dataset.loaded), dataset.loaded.tokenizer
    rank0_print(f"a sample, record {samples[0]['id']}, what is supervised in «»:")
    text = marked_text(samples[0]["input_ids"].tolist(), samples[0]["labels"].tolist(), tokenizer, visual)
    rank0_print("\n".join(f"  | {line}" for line in _shortened(text).split("\n")))
    supervised = sum(int((sample["labels"] != IGNORE_INDEX).sum()) for sample in samples)
    words = sum(int((sample["input_ids"] != visual).sum()) for sample in samples)
    rank0_print(f"supervised: {supervised / words:.0%} of the text tokens of {len(samples)} samples")
    if lost:
        rank0_print(f"note: {len(lost)} of {count} records that were looked at give no sample; the first is {lost[0]}")


def marked_text(ids: list[int], labels: list[int], tokenizer, visual: int) -> str:
    """A sample as text: «supervised» tokens, and each image as `<image>`, with its number of tokens if it has some."""
    pieces, at = [], 0
    while at < len(ids):
        kind = ids[at] == visual, labels[at] == IGNORE_INDEX
        end = at
        while end < len(ids) and (ids[end] == visual, labels[end] == IGNORE_INDEX) == kind:
            end += 1
        if kind[0]:
            pieces.append("<image>" if end == at + 1 else f"<image: {end - at} tokens>")
        else:
            text = tokenizer.decode(ids[at:end])
            pieces.append(text if kind[1] else f"«{text}»")
        at = end
    return "".join(pieces)


def _shortened(text: str) -> str:
    if len(text) <= _MOST:
        return text
    return f"{text[: _MOST // 2]}\n[... {len(text) - _MOST:,} characters ...]\n{text[-_MOST // 2 :]}"
