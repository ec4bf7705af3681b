"""From LLaVA-format records to questions, and from predictions to scores; imports nothing heavy."""

import os
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation
from llava.data.paths import media_of, resolve_path
from llava.data.turns import leading_system, place_image, read_turns
from llava.data.validate import check_record
from llava.errors import LlavaError


@dataclass
class Question:
    """One answer to be given: `turns` are the true (speaker, text) turns before it, its own question last."""

    id: str
    kind: str
    images: list[str]
    turns: list[tuple[str, str]]
    answer: str
    paths: list[str] = field(default_factory=list)  # `images` resolved in the image folder
    system: str | None = None  # the record's own system text, for templates that take one

    @property
    def text(self) -> str:
        """The question alone, without `<image>`."""
        return self.turns[-1][1].replace(DEFAULT_IMAGE_TOKEN, "").strip()


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
            questions += _record_questions(record, name, image_folder, template, allow_absolute_paths)
        except LlavaError as error:
            raise LlavaError(f"{data_path}: record {name}: {error}") from None
    if not questions:
        raise LlavaError(f"{data_path}: found no record, expected questions")
    return questions


def _record_questions(record, name, image_folder, template, allow_absolute_paths) -> list[Question]:
    check_record(record, template)
    media, images = media_of(record)
    if media == "video":
        raise LlavaError("video: found a video record, expected images or text")
    paths = [resolve_path(image_folder, image, allow_absolute_paths) for image in images]
    for path in paths:
        if not os.path.isfile(path):
            raise LlavaError(f"image {path}: found no such file")
    turns = [(speaker, place_image(text)) for speaker, text in read_turns(record["conversations"])]
    if any(speaker == "system" for speaker, _ in turns):
        raise LlavaError("conversations: found a system turn, expected human and gpt")
    questions = []
    for index, (speaker, answer) in enumerate(turns):
        if speaker == "gpt":
            used = sum(text.count(DEFAULT_IMAGE_TOKEN) for _, text in turns[:index])
            kind = str(record.get("kind", "all"))
            system = leading_system(record["conversations"])
            questions.append(Question(name, kind, images[:used], turns[:index], answer, paths[:used], system))
    return questions


def open_conversation(turns: list[tuple[str, str]], template: Conversation) -> Conversation:
    """The (speaker, text) turns, and an answer that is still to be given."""
    conversation = template.copy()
    roles = dict(zip(("human", "gpt"), conversation.roles, strict=True))
    for speaker, text in turns:
        conversation.append_message(roles[speaker], text)
    conversation.append_message(roles["gpt"], None)
    return conversation


def build_prompt(question: Question, template: Conversation) -> str:
    """The prompt text up to where the answer begins."""
    return open_conversation(question.turns, template).get_prompt()


def add_images(text: str, count: int, template: Conversation, config) -> str:
    """A question's text with an `<image>` for each of its pictures: those it has, or else all of them in front.

    Args:
        config: the model's; it may want `<im_start>` and `<im_end>` around an image.

    Raises:
        LlavaError: the text has another number of them.
    """
    found = text.count(DEFAULT_IMAGE_TOKEN)
    if not found and count:
        text = " ".join([DEFAULT_IMAGE_TOKEN] * count) + "\n" + text
    elif found != count:
        raise LlavaError(f"text: found {found} <image> for {count} images, expected as many, or none")
    if not count:
        return text
    return place_image(text, "mmtag" in template.version, getattr(config, "mm_use_im_start_end", False))


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
