"""Prompt templates: how a conversation becomes text, under LLaVA-NeXT's names and with its wording.

A template is data. Each `SeparatorStyle` has one `_Layout` that says what is written before the first turn, around a
turn, and for a turn that is still to be generated; `Conversation` joins them. Because `turns()` also knows where an
answer starts, training labels are built from the same pieces (see `llava.data.preprocess`).
"""

import dataclasses
import difflib
from enum import Enum, auto
from typing import Any, NamedTuple

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation_pictures import ShowsPictures
from llava.errors import LlavaError


class SeparatorStyle(Enum):
    """How a template separates its turns."""

    SINGLE = auto()
    TWO = auto()
    MPT = auto()
    PLAIN = auto()
    CHATML = auto()
    LLAMA_2 = auto()
    LLAMA_3 = auto()
    QWEN = auto()
    GEMMA = auto()


@dataclasses.dataclass(frozen=True)
class _Layout:
    """The fixed text of a style; `{system}`, `{role}`, `{sep}`, `{sep2}` are filled in.

    `open`, `close` and `pending` are (even turn, odd turn); `pending` is a turn without text, to be generated.
    `first` replaces the opening of turn 0. `*_bare` is used when the system text is empty.
    """

    head: str
    open: tuple[str, str]
    close: tuple[str, str]
    pending: tuple[str, str]
    head_bare: str | None = None
    first: str | None = None
    first_bare: str | None = None
    tail: str = ""
    strip: bool = False


def _same(text: str) -> tuple[str, str]:
    return text, text


_HEADER = "<|start_header_id|>{role}<|end_header_id|>\n\n"

_LAYOUTS = {
    SeparatorStyle.SINGLE: _Layout("{system}{sep}", _same("{role}: "), _same("{sep}"), _same("{role}:")),
    SeparatorStyle.TWO: _Layout("{system}{sep}", _same("{role}: "), ("{sep}", "{sep2}"), _same("{role}:")),
    SeparatorStyle.MPT: _Layout("{system}{sep}", _same("{role}"), _same("{sep}"), _same("{role}")),
    SeparatorStyle.PLAIN: _Layout("{system}", _same(""), ("{sep}", "{sep2}"), _same("")),
    SeparatorStyle.CHATML: _Layout(
        "{system}{sep}\n", _same("{role}\n"), _same("{sep}\n"), _same("{role}\n"), head_bare=""
    ),
    SeparatorStyle.GEMMA: _Layout("", _same("{role}"), _same("{sep}"), _same("{role}")),
    SeparatorStyle.LLAMA_2: _Layout(
        "",
        ("{sep}[INST] ", " "),
        (" [/INST]", " {sep2}"),
        _same(""),
        first="[INST] <<SYS>>\n{system}\n<</SYS>>\n\n",
        first_bare="[INST] ",
    ),
    SeparatorStyle.LLAMA_3: _Layout(
        "<|begin_of_text|>" + _HEADER.format(role="system") + "{system}{sep}",
        _same(_HEADER),
        _same("{sep}"),
        _same(""),
        tail=_HEADER.format(role="assistant"),
        strip=True,
    ),
}


class Turn(NamedTuple):
    """A piece of the prompt; the characters from `answer_start` to the end are the model's (None: none of them), those
    up to `answer_end` the answer's own, before what closes its turn."""

    text: str
    answer_start: int | None = None
    answer_end: int | None = None

    @property
    def answer(self) -> list[tuple[int, int]]:
        """Where the answer's own text begins and ends; empty where there is none."""
        if self.answer_start is None:
            return []
        text = self.text[: self.answer_end]
        begin = len(text) - len(text[self.answer_start :].lstrip())
        return [(begin, len(text))] if begin < len(text) else []


@dataclasses.dataclass
class Conversation(ShowsPictures):
    """A template and the messages so far.

    messages: `[role, text]` pairs; the text may be a tuple `(text, image or images, ...)`, or None for the turn that
    the model is to write.
    """

    system: str
    roles: tuple[str, str]
    messages: list
    offset: int
    sep_style: SeparatorStyle = SeparatorStyle.SINGLE
    sep: str = "###"
    sep2: str | None = None
    version: str = "Unknown"
    tokenizer_id: str = ""
    tokenizer: Any = None
    stop_str: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    skip_next: bool = False

    def get_prompt(self) -> str:
        """The conversation as text.

        Raises:
            ValueError: the style has no layout, or the turns are out of order for a style that fixes it.
        """
        return "".join(turn.text for turn in self.turns()) + self._layout.tail

    def turns(self, closed: bool = False) -> list[Turn]:
        """The prompt in pieces: what stands before the first turn, then one piece per turn.

        The blank between a header and its answer counts as the answer's, since sentencepiece joins it to the word.
        `closed` writes a turn of empty text as a whole turn rather than as one that is still to be generated.
        """
        layout, messages = self._layout, self._text_messages()
        head = layout.head if self.system or layout.head_bare is None else layout.head_bare
        pieces = [Turn(self._fill(head))]
        for index, (role, text) in enumerate(messages):
            self._check_order(index, role, text)
            odd = index % 2
            if text is None or (not text and not closed):
                pieces.append(Turn(self._fill(layout.pending[odd], role)))
                continue
            opening = self._fill(self._opening(layout, index), role)
            said = opening + (text.strip() if layout.strip else text)
            is_answer = role == self.roles[1] and (odd or self.roles[0] != self.roles[1])
            answer = (len(opening.rstrip(" ")), len(said)) if is_answer else ()
            pieces.append(Turn(said + self._fill(layout.close[odd], role), *answer))
        return pieces

    def append_message(self, role: str, message) -> None:
        """Add a turn; `message` None leaves it to be generated."""
        self.messages.append([role, message])

    def copy(self) -> "Conversation":
        """An independent copy: appending to it leaves the template as it is."""
        return dataclasses.replace(self, messages=[[role, message] for role, message in self.messages])

    @property
    def takes_system(self) -> bool:
        """Whether the template has a place for a system text."""
        layout = self._layout
        return self.sep_style is not SeparatorStyle.PLAIN and "{system}" in layout.head + (layout.first or "")

    def with_system(self, text: str) -> "Conversation":
        """A copy with another system text in the template's own wrapping, the header of a system turn kept.

        Raises:
            LlavaError: the template has no place for one.
        """
        if not self.takes_system:
            raise LlavaError(f"template {self.version}: has no place for a system text, expected none")
        first, newline, _ = self.system.partition("\n")
        header = first + newline if first.startswith("<|") else ""
        return dataclasses.replace(self.copy(), system=header + (text.strip() if self._layout.strip else text))

    def dict(self) -> dict:
        """The conversation as plain data, images left out."""
        messages = [[role, text[0] if isinstance(text, tuple) else text] for role, text in self.messages]
        names = ("system", "roles", "offset", "sep", "sep2")
        return {"messages": messages, **{name: getattr(self, name) for name in names}}

    @property
    def _layout(self) -> _Layout:
        if self.sep_style not in _LAYOUTS:
            raise ValueError(f"Invalid style: {self.sep_style}")
        return _LAYOUTS[self.sep_style]

    def _fill(self, text: str, role: str = "") -> str:
        sep2 = self.sep if self.sep2 is None else self.sep2
        return text.format(system=self.system, role=role, sep=self.sep, sep2=sep2) if text else ""

    def _opening(self, layout: _Layout, index: int) -> str:
        if index == 0 and layout.first is not None:
            return layout.first if self.system else layout.first_bare
        return layout.open[index % 2]

    def _check_order(self, index: int, role: str, text) -> None:
        if self.sep_style is SeparatorStyle.GEMMA and role != self.roles[index % 2]:
            raise ValueError("Conversation should alternate user/assistant/user/assistant/...")
        if self.sep_style is SeparatorStyle.LLAMA_2 and index == 0 and (not text or role != self.roles[0]):
            raise ValueError("first message should come from user and not be empty")

    def _text_messages(self) -> list:
        """Messages with their texts only; images become `<image>` where the style counts them itself.

        A first message that brings an image gets it in front, or in a round of its own under "mmtag" templates.
        """
        counts_images = self.sep_style in (SeparatorStyle.CHATML, SeparatorStyle.LLAMA_3)
        messages = []
        for index, (role, message) in enumerate(self.messages):
            if not isinstance(message, tuple):
                messages.append((role, message))
                continue
            text = message[0]
            bare = text.replace(DEFAULT_IMAGE_TOKEN, "").strip()
            if index == 0 and "mmtag" in self.version:
                messages += [(self.roles[0], "<Image><image></Image>"), (self.roles[1], "Received."), (role, bare)]
            elif index == 0:
                given = text.startswith(DEFAULT_IMAGE_TOKEN)
                messages.append((role, text if given else f"{DEFAULT_IMAGE_TOKEN}\n{bare}"))
            else:
                messages.append((role, DEFAULT_IMAGE_TOKEN * len(message[1]) + text if counts_images else text))
        return messages


def _template(style: SeparatorStyle, system: str, roles: tuple[str, str], sep: str, **fields) -> Conversation:
    messages = fields.pop("messages", [])
    return Conversation(system, roles, messages, len(messages), style, sep, **fields)


_ASSISTANT = "The assistant gives helpful, detailed, and polite answers to the {}'s questions."
_CHAT_HUMAN = "A chat between a curious human and an artificial intelligence assistant. " + _ASSISTANT.format("human")
_CHAT_USER = "A chat between a curious user and an artificial intelligence assistant. " + _ASSISTANT.format("user")
_SEES = (
    "able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
_VISION = f"You are a helpful language and vision assistant. You are {_SEES}"
_MMTAG = "The visual content will be provided with the following format: <Image>visual content</Image>."
_CHAT_MMTAG = (
    f"A chat between a curious user and an artificial intelligence assistant. The assistant is {_SEES}{_MMTAG}"
)
_ABOUT_VISUALS = "Answer the questions about the visual content that the user provides."
_LLAMA_2_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
_V0_EXAMPLE = [
    ["Human", "What are the key differences between renewable and non-renewable energy sources?"],
    [
        "Assistant",
        "Renewable energy sources are those that can be replenished naturally in a relatively short amount of time, "
        "such as solar, wind, hydro, geothermal, and biomass. Non-renewable energy sources, on the other hand, are "
        "finite and will eventually be depleted, such as coal, oil, and natural gas. Here are some key differences "
        "between renewable and non-renewable energy sources:\n"
        "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable energy sources are "
        "finite and will eventually run out.\n"
        "2. Environmental impact: Renewable energy sources have a much lower environmental impact than non-renewable "
        "sources, which can lead to air and water pollution, greenhouse gas emissions, and other negative effects.\n"
        "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically have lower "
        "operational costs than non-renewable sources.\n"
        "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote locations "
        "than non-renewable sources.\n"
        "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different situations "
        "and needs, while non-renewable sources are more rigid and inflexible.\n"
        "6. Sustainability: Renewable energy sources are more sustainable over the long term, while non-renewable "
        "sources are not, and their depletion can lead to economic and social instability.\n",
    ],
]

_HUMAN, _USER = ("Human", "Assistant"), ("USER", "ASSISTANT")
_IM, _IM_LINE = ("<|im_start|>user", "<|im_start|>assistant"), ("<|im_start|>user\n", "<|im_start|>assistant\n")
_IM_SYSTEM = "<|im_start|>system\n"
_V1 = {"sep2": "</s>", "version": "v1"}
_LLAMA_V2 = {"sep2": "</s>", "version": "llama_v2"}
_S = SeparatorStyle

_vicuna_v0 = _template(_S.SINGLE, _CHAT_HUMAN, _HUMAN, "###", messages=_V0_EXAMPLE)
_vicuna_v1 = _template(_S.TWO, _CHAT_USER, _USER, " ", **_V1)
_mistral_instruct = _template(_S.LLAMA_2, "", _USER, "", **_LLAMA_V2)
_plain = _template(_S.PLAIN, "", ("", ""), "\n")
_short_chatml = _template(_S.MPT, f"{_IM_SYSTEM}Answer the questions.", _IM_LINE, "<|im_end|>", version="mpt")
_qwen = _template(_S.CHATML, f"{_IM_SYSTEM}You are a helpful assistant.", _IM, "<|im_end|>", version="qwen")

conv_templates: dict[str, Conversation] = {
    "default": _vicuna_v0,
    "v0": _vicuna_v0,
    "v1": _vicuna_v1,
    "vicuna_v1": _vicuna_v1,
    "llama_2": _template(_S.LLAMA_2, _LLAMA_2_SYSTEM, _USER, "<s>", **_LLAMA_V2),
    "mistral_instruct": _mistral_instruct,
    "mistral_orca": _template(
        _S.MPT,
        f"{_IM_SYSTEM}You are MistralOrca, a large language model trained by Alignment Lab AI. "
        "Write out your reasoning step-by-step to be sure you get the right answers!",
        _IM_LINE,
        "<|im_end|>",
        version="mpt",
    ),
    "mistral_zephyr": _template(
        _S.MPT,
        "<|system|>\nYou are a helpful AI assistant.",
        ("<|user|>\n", "<|assistant|>\n"),
        "</s>",
        version="mpt",
    ),
    "mistral_direct": _short_chatml,
    "plain": _plain,
    "v0_plain": _plain,
    "chatml_direct": _short_chatml,
    "llava_v0": _template(_S.SINGLE, _CHAT_HUMAN, _HUMAN, "###"),
    "llava_v0_mmtag": _template(_S.SINGLE, _CHAT_MMTAG, _HUMAN, "###", version="v0_mmtag"),
    "llava_v1": _template(_S.TWO, _CHAT_HUMAN, _USER, " ", **_V1),
    "llava_v1_mmtag": _template(_S.TWO, _CHAT_MMTAG, _USER, " ", sep2="</s>", version="v1_mmtag"),
    "llava_llama_2": _template(_S.LLAMA_2, _VISION, _USER, "<s>", **_LLAMA_V2),
    "llava_llama_3": _template(
        _S.LLAMA_3,
        _VISION,
        ("user", "assistant"),
        "<|eot_id|>",
        version="llama_v3",
        tokenizer_id="meta-llama/Meta-Llama-3-8B-Instruct",
        stop_token_ids=[128009],
    ),
    "llava_llama_2_simple": _template(_S.LLAMA_2, _ABOUT_VISUALS, _USER, "<s>", **_LLAMA_V2),
    "llava_llama_2_mmtag": _template(
        _S.LLAMA_2, _ABOUT_VISUALS + _MMTAG, _USER, "<s>", sep2="</s>", version="llama_v2_mmtag"
    ),
    "llava_mistral_instruct": _mistral_instruct,
    "mpt": _template(
        _S.MPT,
        f"{_IM_SYSTEM}A conversation between a user and an LLM-based AI assistant. "
        "The assistant gives helpful and honest answers.",
        _IM_LINE,
        "<|im_end|>",
        version="mpt",
    ),
    "qwen_1_5": _qwen,
    "qwen_2": _qwen,
    "qwen_2_5": _template(
        _S.CHATML,
        f"{_IM_SYSTEM}You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
        _IM,
        "<|im_end|>",
        version="qwen",
    ),
    "gemma_instruct": _template(
        _S.GEMMA, "", ("<start_of_turn>user\n", "<start_of_turn>model\n"), "<end_of_turn>\n", version="gemma"
    ),
}

default_conversation = _vicuna_v0

# LLaVA's module has a name of its own for each
_NAMED = {f"conv_{name}": template for name, template in conv_templates.items()}
_NAMED |= {"conv_vicuna_v0": _vicuna_v0, "conv_qwen": _qwen, "conv_llava_plain": _plain}


def __getattr__(name: str):
    if name in _NAMED:
        return _NAMED[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def get_template(name: str) -> Conversation:
    """A fresh copy of the template called `name`.

    Raises:
        LlavaError: there is no such template; names the nearest one.
    """
    if name in conv_templates:
        return conv_templates[name].copy()
    near = difflib.get_close_matches(str(name), conv_templates, n=1, cutoff=0.0)
    known = ", ".join(conv_templates)
    raise LlavaError(f"unknown conversation template {name!r}: did you mean {near[0]!r}? One of {known}")


def stop_strings(template: str | Conversation) -> list[str]:
    """The texts that end an answer under a template, given itself or by name (LlavaError: no such template)."""
    template = get_template(template) if isinstance(template, str) else template
    if template.stop_str:
        return [template.stop_str] if isinstance(template.stop_str, str) else list(template.stop_str)
    sep = template.sep if template.sep2 is None else template.sep2
    return [sep.strip() or sep]
