"""From LLaVA-format records to questions, and from predictions to scores; imports nothing heavy."""

import os
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation
from llava.data.forms import canonical
from llava.data.paths import media_of, resolve_path
from llava.data.turns import leading_system, place_image, read_turns
from llava.data.validate import check_record
from llava.errors import LlavaError


@dataclass
class Question:
    """One answer to be given: `turns` are the true (speaker, text) turns before it, its own question last; the record's
    own system text, if any, first."""

    id: str
    kind: str
    images: list[str]
    turns: list[tuple[str, str]]
    answer: str
    paths: list[str] = field(default_factory=list)  # `images` resolved in the image folder
    record: int = 0  # number of its record among those that were read

    @property
    def text(self) -> str:
        """The question alone, without its images' `<image>`."""
        text = self.turns[-1][1]
        return (text.replace(DEFAULT_IMAGE_TOKEN, "") if self.paths else text).strip()

    def prompt(self, inference) -> list[int]:
        """Token ids for an `Inference`; without a picture an `<image>` is text, as in training."""
        return inference.prompt(self.turns, images=bool(self.paths))


def read_questions(
    records: list[dict],
    data_path: str,
    image_folder: str | None,
    template: Conversation,
    allow_absolute_paths: bool = False,
) -> list[Question]:
    """The questions of the records of `data_path`: every answer is one, asked after the true earlier turns.

    Records name their `kind`; those without are of the kind "all".

    Raises:
        LlavaError: names the file and the record's id.
    """
    questions = []
    for row, record in enumerate(records):
        name = str(record.get("id", f"row {row}"))
        try:
            found = _record_questions(record, name, image_folder, template, allow_absolute_paths)
        except LlavaError as error:
            raise LlavaError(f"{data_path}: record {name}: {error}") from None
        questions += [replace(question, record=row) for question in found]
    if not questions:
        raise LlavaError(f"{data_path}: found no record, expected questions")
    return questions


def _record_questions(record, name, image_folder, template, allow_absolute_paths) -> list[Question]:
    record = canonical(record)
    check_record(record, template, system_turn="record")
    media, images = media_of(record)
    if media == "video":
        raise LlavaError("video: found a video record, expected images or text")
    paths = [resolve_path(image_folder, image, allow_absolute_paths) for image in images]
    for path in paths:
        if not os.path.isfile(path):
            raise LlavaError(f"image {path}: no such file")
    turns = read_turns(record["conversations"])
    if media is not None:
        turns = [(speaker, place_image(text)) for speaker, text in turns]
    if any(speaker == "system" for speaker, _ in turns):
        raise LlavaError("conversations: found a system turn, expected human and gpt")
    questions = []
    for index, (speaker, answer) in enumerate(turns):
        if speaker == "gpt":
            used = sum(text.count(DEFAULT_IMAGE_TOKEN) for _, text in turns[:index]) if images else 0
            kind = str(record.get("kind", "all"))
            system = leading_system(record["conversations"])
            before = turns[:index] if system is None else [("system", system), *turns[:index]]
            questions.append(Question(name, kind, images[:used], before, answer, paths[:used]))
    return questions


def question_ids(record_id, count: int) -> list:
    """The ids of a record's questions: its own where it has one, else ID#1, ID#2, ... in their order."""
    return [record_id] if count == 1 else [f"{record_id}#{number}" for number in range(1, count + 1)]


def add_images(text: str, count: int) -> str:
    """A question's text with an `<image>` for each of its pictures: those it has, or else all of them in front. Without
    pictures an `<image>` is text.

    Raises:
        LlavaError: the text has another number of them.
    """
    found = text.count(DEFAULT_IMAGE_TOKEN)
    if not found and count:
        return " ".join([DEFAULT_IMAGE_TOKEN] * count) + "\n" + text
    if count and found != count:
        raise LlavaError(f"text: found {found} <image> for {count} images, expected as many, or none")
    return text


def is_correct(prediction: str, answer: str) -> bool:
    """Equal but for blanks at the ends."""
    return prediction.strip() == answer.strip()


def score(questions: list[Question], predictions: list[str]) -> dict:
    """`{exact_match, n, by_kind: {kind: {exact_match, n}}}`; the shares lie between 0 and 1."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for question, prediction in zip(questions, predictions, strict=True):
        hits[question.kind].append(is_correct(prediction, question.answer))
    everything = [hit for kind in hits.values() for hit in kind]
    by_kind = {kind: {"exact_match": sum(hit) / len(hit), "n": len(hit)} for kind, hit in sorted(hits.items())}
    return {"exact_match": sum(everything) / len(everything), "n": len(everything), "by_kind": by_kind}


def chance(questions: list[Question]) -> dict[str, float]:
    """Per kind, the share of its most frequent answer: what one who sees nothing can reach."""
    answers: dict[str, Counter] = defaultdict(Counter)
    for question in questions:
        answers[question.kind][question.answer.strip()] += 1
    return {kind: counts.most_common(1)[0][1] / counts.total() for kind, counts in sorted(answers.items())}
