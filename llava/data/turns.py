"""What a record's conversation says: its turns, checked against a template; imports nothing heavy."""

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation, SeparatorStyle, get_template
from llava.errors import LlavaError

NOISE = "QA_GT_caption_based_noisy"  # left over in the video instruction data that LLaVA-NeXT trains on

BY_TURN = (SeparatorStyle.CHATML, SeparatorStyle.LLAMA_3)  # styles whose turns are written and tokenised one by one

_ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}


def read_turns(source: list) -> list[tuple[str, str]]:
    """A record's turns as ("human" | "gpt" | "system", text), without a leading turn that is not the human's.

    Turns may be spelled `from`/`value` or `role`/`content`.

    Raises:
        LlavaError: a turn without speaker or text, an unknown speaker, or nothing left.
    """
    turns = []
    for index, turn in enumerate(source):
        if not isinstance(turn, dict):
            raise LlavaError(f'turn {index}: found {type(turn).__name__}, expected {{"from": ..., "value": ...}}')
        speaker, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if not isinstance(text, str):
            raise LlavaError(f"turn {index}: found {text!r} as its value, expected text")
        if not isinstance(speaker, str) or speaker not in _ROLES:
            raise LlavaError(f"turn {index}: found {speaker!r} as its speaker, expected human, gpt or system")
        turns.append((_ROLES[speaker], text))
    if turns and turns[0][0] != "human":
        turns = turns[1:]
    if not turns:
        raise LlavaError("conversation: found no turn, expected a human's")
    return turns


def leading_system(source: list) -> str | None:
    """The text of a conversation's first turn if it is the system's; `read_turns` leaves such a turn out."""
    first = source[0] if source and isinstance(source[0], dict) else {}
    is_system = first.get("from", first.get("role")) == "system"
    return first.get("value", first.get("content")) if is_system else None


def check_turns(turns: list[tuple[str, str]], template: Conversation) -> None:
    """Whether the turns fit the template.

    Raises:
        LlavaError: they do not; names the turn, and what was found and expected.
    """
    style = template.sep_style
    if style is SeparatorStyle.PLAIN:
        if len(turns) != 2:
            raise LlavaError(f"conversation: found {len(turns)} turns, expected 2 (template plain: image and caption)")
        if DEFAULT_IMAGE_TOKEN not in turns[0][1]:
            raise LlavaError("turn 0: found no <image>, expected one (template plain: image and caption)")
        return
    if style in BY_TURN:
        return
    for index, (speaker, _) in enumerate(turns):
        expected = ("human", "gpt")[index % 2]
        if speaker != expected:
            raise LlavaError(f"turn {index}: found {speaker}, expected {expected} (the template's turns alternate)")
    if style is SeparatorStyle.LLAMA_2 and not turns[0][1]:
        raise LlavaError("turn 0: found no text, expected some (the template cannot open without)")


def check_system_turn(version: str, system_turn: str) -> None:
    """Whether a template can have "template" or "record" as what becomes of a record's own system turn.

    Raises:
        LlavaError: "record" for one without a place for a system text (plain, gemma_instruct), or another value.
    """
    if system_turn not in ("template", "record"):
        raise LlavaError(f"system_turn: found {system_turn!r}, expected template or record")
    if system_turn == "record" and not get_template(version).takes_system:
        reason = f"template {version!r} has no place for a system text"
        raise LlavaError(f"system_turn: found record, but {reason}; expected template")


def place_image(text: str, mmtag: bool = False, mm_use_im_start_end: bool = False) -> str:
    """A turn's text as LLaVA-NeXT feeds it: a single `<image>` moves to the front, followed by a newline.

    Several images stay where they are, and so does one that is in front already.
    """
    if text.count(DEFAULT_IMAGE_TOKEN) == 1 and not text.startswith(DEFAULT_IMAGE_TOKEN):
        text = f"{DEFAULT_IMAGE_TOKEN}\n{text.replace(DEFAULT_IMAGE_TOKEN, '').strip()}".strip()
        if mmtag:
            text = text.replace(DEFAULT_IMAGE_TOKEN, f"<Image>{DEFAULT_IMAGE_TOKEN}</Image>")
    if mm_use_im_start_end:
        wrapped = f"{DEFAULT_IM_START_TOKEN}{DEFAULT_IMAGE_TOKEN}{DEFAULT_IM_END_TOKEN}"
        text = text.replace(DEFAULT_IMAGE_TOKEN, wrapped)
    return text.replace(NOISE, "")
