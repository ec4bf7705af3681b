"""True answers in their files, and which answer of a model belongs to which."""

from collections import Counter, defaultdict
from dataclasses import dataclass

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.data.forms import canonical
from llava.data.records import read_file
from llava.data.turns import read_turns
from llava.errors import LlavaError
from llava.eval.questions import question_ids

_CONVERSATIONS = ("conversations", "messages", "texts")


@dataclass
class Reference:
    """A question's true answers.

    Attributes:
        key: the question's id, as text.
        id: as its file has it.
        question: its text; None where the file does not say.
        row: what the metric reads: `answer` or `answers`, and `options` for a choice.
    """

    key: str
    id: str | int
    question: str | None
    row: dict

    @property
    def category(self) -> str:
        return str(self.row.get("category", self.row.get("kind", "all")))


def read_references(path: str) -> list[Reference]:
    """The references of a file: rows with `answer` or `answers`, or records, of which every answer is one.

    Raises:
        LlavaError: no row, a row without id, or a record without turns.
    """
    found = []
    for number, row in enumerate(read_file(path), start=1):
        name = key_of(path, number, row)
        own = row.get("question_id", row.get("id"))
        if {"answer", "answers"} & row.keys() or not any(row.get(key) for key in _CONVERSATIONS):
            found.append(Reference(name, own, row.get("text", row.get("question")), row))
            continue
        try:
            record = canonical(row)
            turns = read_turns(record["conversations"])
        except LlavaError as error:
            raise LlavaError(f"{path}: row {number} (question {name}): {error}") from None
        pairs = [(turns[at - 1][1], text) for at, (speaker, text) in enumerate(turns) if speaker == "gpt"]
        for key, (question, answer) in zip(question_ids(own, len(pairs)), pairs, strict=True):
            found.append(Reference(str(key), key, question, {**record, "answer": answer}))
    if not found:
        raise LlavaError(f"{path}: found no row, expected true answers")
    return found


def key_of(path: str, number: int, row: dict) -> str:
    """A row's id, as text."""
    name = row.get("question_id", row.get("id"))
    if name is None:
        raise LlavaError(f"{path}: row {number}: found no question_id")
    return str(name)


def match_answers(answers: list[dict], references: list[Reference], paths: tuple[str, str]) -> list[str | None]:
    """The predicted text of every reference, None where there is no answer row.

    Where several references share an id, the question tells them apart.

    Raises:
        LlavaError: an answer that belongs to no reference or to another question, or two for one.
    """
    by_key = defaultdict(list)
    for number, row in enumerate(answers, start=1):
        if not isinstance(row.get("text"), str):
            raise LlavaError(f"{paths[0]}: row {number}: text: found {row.get('text')!r}, expected the answer")
        by_key[key_of(paths[0], number, row)].append(row)
    counts = Counter(reference.key for reference in references)
    matched, used = [], 0
    for reference in references:
        key, rows = reference.key, by_key.get(reference.key, [])
        if counts[key] > 1:
            rows = [row for row in rows if _plain(row.get("prompt")) == _plain(reference.question)]
        if len(rows) > 1:
            raise LlavaError(f"{paths[0]}: question {key}: found {len(rows)} answers, expected one")
        if rows and not _same_question(rows[0].get("prompt"), reference.question):
            said = f"found the answer to {rows[0]['prompt'][:60]!r}, expected one to {reference.question[:60]!r}"
            raise LlavaError(f"{paths[0]}: question {key}: {said}, which {paths[1]} asks")
        matched.append(rows[0]["text"] if rows else None)
        used += len(rows)
    if used < len(answers):
        extra = next((key for key in by_key if key not in counts), None)
        where = f"question {extra}" if extra else f"{len(answers) - used} answers"
        raise LlavaError(f"{paths[0]}: {where}: found no reference in {paths[1]}")
    return matched


def _plain(text) -> str:
    return " ".join(text.replace(DEFAULT_IMAGE_TOKEN, " ").lower().split()) if isinstance(text, str) else ""


def _same_question(prompt, question) -> bool:
    """Whether one is in the other: a prompt may add what form the answer should have, and a file may say nothing."""
    one, other = _plain(prompt), _plain(question)
    return one in other or other in one
