"""Conversations to token ids and labels.

The prompt is built turn by turn (`Conversation.turns`), and which characters the model has to produce is known from
building it. A template is tokenised either turn by turn (qwen, llama 3) or as one text (the others, where cutting the
text would change its tokens); in both cases a token is supervised if it covers a supervised character.
"""

import dataclasses
from typing import NamedTuple

import torch

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import SeparatorStyle, Turn, get_template
from llava.data.turns import NOISE, check_system_turn, check_turns, leading_system, place_image, read_turns
from llava.errors import LlavaError
from llava.text_encoding import TextEncoder, text_encoder

SUPERVISE = ("llava_next", "answers_only")


class Encoded(NamedTuple):
    """Token ids, their labels, and where in them the first token of an answer's own text is (None: there is none)."""

    ids: list[int]
    labels: list[int]
    answer: int | None


class _Unit(NamedTuple):
    """How LLaVA-NeXT trains a template that is tokenised turn by turn."""

    system: str | None  # the system text it trains with, where that is not the template's own
    special: tuple[str, ...]  # tokens it supervises wherever they stand, in addition to whole answer turns


# LLaVA-NeXT trains every qwen template, qwen_2_5 too, with this system text.
_QWEN = _Unit("<|im_start|>system\nYou are a helpful assistant.", ("<|im_start|>", "<|im_end|>", "\n"))
_LLAMA_3 = _Unit(None, ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"))
_UNITS = {SeparatorStyle.CHATML: _QWEN, SeparatorStyle.LLAMA_3: _LLAMA_3}
_LIKE_LLAVA_NEXT = {*_UNITS, SeparatorStyle.PLAIN, SeparatorStyle.TWO, SeparatorStyle.LLAMA_2}


def resolve_supervise(version: str, supervise: str | None = None) -> str:
    """The label convention of a template: `supervise` if given, else LLaVA-NeXT's where it is known.

    "llava_next": as LLaVA-NeXT labels; under qwen and llama 3 templates that includes the answer's header and the
    special tokens of every turn. "answers_only": the answer and the token that ends it.

    Raises:
        LlavaError: unknown template or convention, or "llava_next" for a template it is not defined for.
    """
    style = get_template(version).sep_style
    if supervise is None:
        return "llava_next" if style in _LIKE_LLAVA_NEXT else "answers_only"
    if supervise not in SUPERVISE:
        raise LlavaError(f"supervise: found {supervise!r}, expected one of {', '.join(SUPERVISE)}")
    if supervise == "llava_next" and style not in _LIKE_LLAVA_NEXT:
        raise LlavaError(f"supervise: llava_next is not defined for template {version!r}; expected answers_only")
    return supervise


class Preprocessor:
    """Turns conversations into ids and labels for one template and tokenizer; what is fixed is prepared once.

    Args:
        tokenizer: a Hugging Face tokenizer with a fast backend.
        version: template name.
        supervise: see `resolve_supervise`.
        mm_use_im_start_end: wrap every `<image>` in `<im_start>` and `<im_end>`.
        system_turn: "template": a conversation's own leading system turn is dropped, as LLaVA-NeXT does; "record": it
            takes the place of the template's system text.
        placed: the turns have been through `place_image` already.

    Raises:
        LlavaError: "record" for a template that has no place for a system text.
    """

    def __init__(
        self,
        tokenizer,
        version: str,
        supervise: str | None = None,
        mm_use_im_start_end: bool = False,
        system_turn: str = "template",
        placed: bool = False,
    ):
        self.template = get_template(version)
        self.version = version
        check_system_turn(version, system_turn)
        self.own_system = system_turn == "record"
        self.llava_next = resolve_supervise(version, supervise) == "llava_next"
        self.mm_use_im_start_end = mm_use_im_start_end
        self.encoder = text_encoder(tokenizer)
        self.placed = placed
        self._mmtag = "mmtag" in self.template.version
        human, gpt = self.template.roles
        self._roles = {"human": human, "gpt": gpt, "system": human.replace("user", "system")}
        self._unit = _UNITS.get(self.template.sep_style)
        system = self._unit.system if self._unit else None
        self._base = dataclasses.replace(self.template, system=system or self.template.system, messages=[])
        self._special = self._special_ids() if self._unit and self.llava_next else frozenset()

    def __call__(self, source: list, has_image: bool = False) -> tuple[list[int], list[int]]:
        """Ids (-200 marks an image) and labels of one conversation, equally long.

        Raises:
            LlavaError: the conversation does not fit the template.
        """
        return self.encode(source, has_image)[:2]

    def encode(self, source: list, has_image: bool = False) -> Encoded:
        """As a call, and where the first answer is."""
        turns = read_turns(source)
        check_turns(turns, self.template)
        if self.template.sep_style is SeparatorStyle.PLAIN:
            return self._plain(turns)
        if has_image and not self.placed:
            turns = [(speaker, place_image(text, self._mmtag, self.mm_use_im_start_end)) for speaker, text in turns]
        messages = [(self._roles[speaker], text) for speaker, text in turns]
        system = leading_system(source) if self.own_system else None
        base = self._base if system is None else self._base.with_system(system)
        conversation = dataclasses.replace(base, messages=messages)
        if self._unit:
            return self._by_turn(conversation.turns(closed=True), has_image)
        return self._whole(conversation.turns(), has_image)

    def _special_ids(self) -> frozenset[int]:
        """Ids of the always supervised tokens; a text that is not one token of the vocabulary is left out."""
        found = (self.encoder.fixed_ids(text) for text in self._unit.special)
        return frozenset(ids[0] for ids in found if len(ids) == 1)

    def _plain(self, turns: list[tuple[str, str]]) -> Encoded:
        """One image and its caption; whatever else the human's turn says is dropped."""
        start = len(DEFAULT_IMAGE_TOKEN)
        said = DEFAULT_IMAGE_TOKEN + turns[1][1].replace(NOISE, "")
        turn = Turn(said + self._base.sep, start, len(said))
        return encode_spans(self.encoder, turn.text, [(start, len(turn.text))], True, bos=True, answers=turn.answer)

    def _by_turn(self, pieces: list[Turn], has_image: bool) -> Encoded:
        head = pieces[0].text
        ids = list(self.encoder.encode(head).ids if self.own_system else self.encoder.fixed_ids(head))
        labels, answer = [IGNORE_INDEX] * len(ids), None
        for piece in pieces[1:]:
            spans = []
            if piece.answer_start is not None:
                spans = [(0 if self.llava_next else piece.answer_start, len(piece.text))]
            found = encode_spans(self.encoder, piece.text, spans, images=has_image, answers=piece.answer)
            if answer is None and found.answer is not None:
                answer = len(ids) + found.answer
            ids += found.ids
            labels += found.labels
        if self._special:
            special = self._special
            labels = [token if token in special else label for token, label in zip(ids, labels, strict=True)]
        return Encoded(ids, labels, answer)

    def _whole(self, pieces: list[Turn], has_image: bool) -> Encoded:
        spans, answers, length = [], [], 0
        for piece in pieces:
            if piece.answer_start is not None:
                spans.append((length + piece.answer_start, length + len(piece.text)))
            answers += [(length + begin, length + end) for begin, end in piece.answer]
            length += len(piece.text)
        text = "".join(piece.text for piece in pieces)
        return encode_spans(self.encoder, text, spans, has_image, bos=True, answers=answers)


def encode_spans(
    encoder: TextEncoder, text: str, spans: list[tuple[int, int]], images: bool, bos: bool = False, answers=()
) -> Encoded:
    """Ids and labels of a text; every `<image>` in it becomes -200, and what is between them is tokenised by itself.

    Args:
        spans: supervised characters (begin, end), in order.
        images: whether `<image>` is an image; else it is text.
        bos: whether the text is given the token that starts a sequence.
        answers: the characters of the answers' own text, in order.
    """
    ids: list[int] = []
    labels: list[int] = []
    answer, at = None, 0
    for index, chunk in enumerate(text.split(DEFAULT_IMAGE_TOKEN) if images else (text,)):
        if index:
            ids.append(IMAGE_TOKEN_INDEX)
            labels.append(IGNORE_INDEX)
            at += len(DEFAULT_IMAGE_TOKEN)
        found, offsets = encoder.encode(chunk, add_special_tokens=bos and index == 0)
        starts = index == 0 and bos and bool(found) and found[0] == encoder.bos_token_id
        end = at + len(chunk)
        if answer is None and (said := _inside(answers, at, end)):
            marked = _labels(found, offsets, said[:1], skip_first=starts)
            answer = next((len(ids) + i for i, label in enumerate(marked) if label != IGNORE_INDEX), None)
        ids += found
        labels += _labels(found, offsets, _inside(spans, at, end), skip_first=starts)
        at = end
    return Encoded(ids, labels, answer)


def _inside(spans, at: int, end: int) -> list[tuple[int, int]]:
    """The parts of spans within characters `at` to `end`, counted from `at`."""
    return [(max(begin, at) - at, min(stop, end) - at) for begin, stop in spans if begin < end and stop > at]


def _labels(ids: list[int], offsets: list[tuple[int, int]], spans: list[tuple[int, int]], skip_first: bool):
    """Labels of a chunk: a token's id where the token touches a span, else -100."""
    labels = [IGNORE_INDEX] * len(ids)
    position = 1 if skip_first else 0
    for begin, stop in spans:
        while position < len(ids) and max(offsets[position][1], offsets[position][0] + 1) <= begin:
            position += 1
        while position < len(ids) and offsets[position][0] < stop:
            labels[position] = ids[position]
            position += 1
    return labels


def preprocess(
    sources: list,
    tokenizer,
    has_image: bool = False,
    version: str = "qwen_1_5",
    supervise: str | None = None,
    mm_use_im_start_end: bool = False,
    system_turn: str = "template",
    placed: bool = False,
) -> dict:
    """Tokenise a batch of conversations and label what is to be learned (LLaVA-NeXT's `preprocess`).

    Args:
        sources: list of conversations `[{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]`.
        tokenizer: a Hugging Face tokenizer with a fast backend.
        has_image: whether `<image>` stands for an image; without, it is text. Template "plain" always has one.
        version: template name.
        supervise: see `resolve_supervise`.
        mm_use_im_start_end: wrap every `<image>` in `<im_start>` and `<im_end>`.
        system_turn, placed: see `Preprocessor`.

    Returns:
        `input_ids` and `labels`, LongTensors [B, L], padded on the right with the pad id and -100. Nothing is cut.

    Raises:
        LlavaError: unknown template, or a conversation that does not fit it.
    """
    prepare = Preprocessor(tokenizer, version, supervise, mm_use_im_start_end, system_turn, placed)
    rows = [prepare(source, has_image) for source in sources]
    pad = tokenizer.pad_token_id or 0
    length = max((len(ids) for ids, _ in rows), default=0)
    input_ids = torch.full((len(rows), length), pad, dtype=torch.long)
    targets = torch.full((len(rows), length), IGNORE_INDEX, dtype=torch.long)
    for row, (ids, labels) in enumerate(rows):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        targets[row, : len(labels)] = torch.tensor(labels)
    return {"input_ids": input_ids, "labels": targets}
