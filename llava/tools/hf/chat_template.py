"""A conversation template as a Jinja chat template, derived from what the template itself writes; and back."""

import difflib
import json

from llava.conversation import SeparatorStyle, conv_templates, get_template
from llava.errors import LlavaError

# Written around texts, so that a rendered piece shows where they were.
_SYSTEM, _TEXT = "\x01", "\x02"

_JINJA = """\
{%- macro body(content) -%}
{%- if content is string -%}
{{- content -}}
{%- else -%}
{%- set images = content | selectattr('type', 'equalto', 'image') | list -%}
{%- if images | length == 1 -%}{{- '<image>\\n' -}}{%- endif -%}
{%- for part in content -%}
{%- if part['type'] == 'image' -%}{%- if images | length > 1 -%}{{- '<image>\\n' -}}{%- endif -%}
{%- elif part['type'] == 'video' -%}{{- '<video>\\n' -}}
{%- elif part['type'] == 'text' -%}{{- part['text'] -}}
{%- else -%}{{- raise_exception('unknown content type ' + part['type']) -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- if messages and messages[0]['role'] == 'system' -%}
{%- set given, turns = true, messages[1:] -%}
{%- set system = body(messages[0]['content']) -%}
{%- else -%}
{%- set given, turns, system = false, messages, '' -%}
{%- endif -%}
@HEAD@
{%- for message in turns -%}
{%- if message['role'] not in ('user', 'assistant') or (loop.index0 % 2 == 1) != (message['role'] == 'assistant') -%}
{{- raise_exception('turns must alternate: user, assistant, user, ...') -}}
{%- endif -%}
{%- if message['role'] == 'assistant' -%}
{{- @OPEN_ANSWER@ + @ANSWER@ + @CLOSE_ANSWER@ -}}
{%- elif loop.first -%}
@FIRST@
{{- @QUESTION@ + @CLOSE_QUESTION@ -}}
{%- else -%}
{{- @OPEN_QUESTION@ + @QUESTION@ + @CLOSE_QUESTION@ -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- @PENDING@ -}}{%- endif -%}
"""


def has_chat_template(name: str) -> bool:
    """Whether turns alone make the prompt: not so for captions, nor where an image gets a round of its own."""
    template = get_template(name)
    return template.sep_style is not SeparatorStyle.PLAIN and "mmtag" not in template.version


def chat_template(name: str) -> str:
    """Jinja text that renders what the conversation template `name` writes, multi-turn, with images and system text.

    A message's content is text, or parts of type text, image and video: a single image goes to the front of its
    message, several stay where they are, each followed by a newline, as in LLaVA's data. Without a system message the
    template's own system text is used.

    Raises:
        LlavaError: no such template, or one that is no chat.
    """
    if not has_chat_template(name):
        raise LlavaError(f"conversation template {name}: cannot be written as a chat template")
    role, default = _system_header(name), _pieces(name, None)
    with_system, bare = _pieces(name, role + _SYSTEM), _pieces(name, "")
    fills = {
        "HEAD": _branches(default.head, with_system.head, bare.head),
        "FIRST": _branches(default.first, with_system.first, bare.first),
        "OPEN_QUESTION": _quote(default.open[0]),
        "OPEN_ANSWER": _quote(default.open[1]),
        "CLOSE_QUESTION": _quote(default.close[0]),
        "CLOSE_ANSWER": _quote(default.close[1]),
        "PENDING": _quote(default.pending),
        "QUESTION": "(body(message['content']) | trim)" if default.trims else "body(message['content'])",
    }
    fills["ANSWER"] = fills["QUESTION"]
    if not any(_SYSTEM in text for text in (with_system.head, with_system.first)):
        fills["HEAD"] = (
            "{%- if system -%}{{- raise_exception('no place for system text') -}}{%- endif -%}" + fills["HEAD"]
        )
    text = _JINJA
    for key, value in fills.items():
        text = text.replace(f"@{key}@", value)
    return text


class _Pieces:
    """The fixed texts of a template: before the first turn, around turns, and of a turn to be generated."""

    def __init__(self, conversation):
        user, assistant = conversation.roles
        shown = len(conversation.messages)
        for role, text in ((user, _TEXT), (assistant, _TEXT), (user, _TEXT), (assistant, None)):
            conversation.append_message(role, text)
        turns = [turn.text for turn in conversation.turns()]
        self.head = "".join(turns[: 1 + shown])
        first, answer, question, pending = turns[1 + shown :]
        self.first, close_question = first.split(_TEXT)
        open_answer, close_answer = answer.split(_TEXT)
        self.open = question.split(_TEXT)[0], open_answer
        self.close = close_question, close_answer
        tail = conversation.get_prompt()[sum(map(len, turns)) :]
        self.pending = pending + tail
        conversation.messages[-1][1] = f" {_TEXT} "
        self.trims = conversation.turns()[-1].text == open_answer + _TEXT + close_answer


def _pieces(name: str, system: str | None) -> _Pieces:
    """With `system` in place of the template's own system text; None leaves it."""
    conversation = get_template(name)
    if system is not None:
        conversation.system = system
    return _Pieces(conversation)


def _system_header(name: str) -> str:
    """What stands before the words of a template's system text: the first line, where that is a role's header."""
    first, newline, _ = get_template(name).system.partition("\n")
    return first + newline if first.startswith("<|") else ""


def _branches(default: str, with_system: str, bare: str) -> str:
    """Jinja that writes one of three texts: no system message, one with text, an empty one."""
    if _SYSTEM in with_system:
        before, after = with_system.split(_SYSTEM)
        given = f"{_quote(before)} + system + {_quote(after)}"
    else:
        given = _quote(with_system)
    if default == with_system == bare:
        return "{{- " + _quote(default) + " -}}"
    return (
        "{%- if not given -%}{{- " + _quote(default) + " -}}"
        "{%- elif system -%}{{- " + given + " -}}"
        "{%- else -%}{{- " + _quote(bare) + " -}}{%- endif -%}"
    )


def _quote(text: str) -> str:
    """A Jinja string literal; JSON's escapes are among Jinja's."""
    return json.dumps(text, ensure_ascii=False)


# --- the way back -----------------------------------------------------------------------------------------------------

PREFERRED = ("qwen_1_5", "v1", "mistral_instruct", "v0")  # where one template has several names
PROBE = ("What is shown?", "A temple.", "Where is it?")


def probe_messages() -> list[dict]:
    """A conversation of three turns, with an image, as chat templates take it."""
    first = [{"type": "image"}, {"type": "text", "text": PROBE[0]}]
    rest = [[{"type": "text", "text": text}] for text in PROBE[1:]]
    return [
        {"role": "user", "content": first},
        {"role": "assistant", "content": rest[0]},
        {"role": "user", "content": rest[1]},
    ]


def probe_prompt(name: str) -> str:
    """The same conversation as the conversation template `name` writes it."""
    conversation = get_template(name)
    for role, text in zip(conversation.roles * 2, (f"<image>\n{PROBE[0]}", *PROBE[1:], None), strict=True):
        conversation.append_message(role, text)
    return conversation.get_prompt()


def recognise(rendered: str, bos_token: str | None = None) -> str:
    """The conversation template that writes `rendered` for the probe.

    Args:
        rendered: what a chat template made of `probe_messages`, with the generation prompt.
        bos_token: may stand in front of it.

    Raises:
        LlavaError: none does; names the nearest.
    """
    names = [*PREFERRED, *(name for name in conv_templates if has_chat_template(name) and name not in PREFERRED)]
    prompts = {name: probe_prompt(name) for name in names}
    for name, prompt in prompts.items():
        if prompt in (rendered, rendered.removeprefix(bos_token or "")):
            return name
    nearest = max(prompts, key=lambda name: difflib.SequenceMatcher(None, rendered, prompts[name]).ratio())
    raise LlavaError(
        f"chat template: it writes {rendered[:200]!r}, as no conversation template here does; name the one to use with "
        f"--version (the nearest is {nearest})"
    )
