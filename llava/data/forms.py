"""The forms in which published data writes a record, all read as LLaVA's: `conversations`, and `image` or `video`."""

import re
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from urllib.parse import unquote

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.data.paths import brief, media_of, refuse_codec_data
from llava.errors import LlavaError

_OTHER_KEYS = frozenset(("images", "videos", "messages", "texts"))
_SPEAKERS = {"user": "human", "assistant": "gpt"}
_PART_KEYS = ("text", "image", "image_url", "video", "video_url")
_VIDEO_TOKEN = "<video>"  # where ShareGPT files write it for `videos`
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://|data:[\w/+.-]*[;,]", re.IGNORECASE)
# names that are one of ours in other letters or words, without case and separators
_MEANT = {
    "image": re.compile(r"(image|img|picture|pic|photo)s?(file)?(path|file|url|uri)?s?"),
    "video": re.compile(r"videos?(file)?(path|file|url|uri)?s?"),
    "conversations": re.compile(r"(conversation|conv|message|msg|dialog|dialogue|chat)s?"),
}


def canonical(record: dict) -> dict:
    """A record in LLaVA's form, without the keys that it was read from; one that has it already is returned itself.

    Read are, besides it: `images` and `videos`, a path or a list of them; `messages` or `conversations` of
    `{"role", "content"}`, the content a text or a list of typed parts, where an `<image>` stands for an image or a
    video; FineVision's `texts`, `[{"user", "assistant"}]`, whose pictures come first. An address `file://` is a path.

    Raises:
        LlavaError: two forms at once, an image and a video, an address that would have to be fetched, a part or a path
            that is none, or a key that looks like one of these under another name. What else a conversation may get
            wrong is left to `llava.data.validate.check_record`.
    """
    kind, _ = media_of(record)
    turns = record.get("conversations")
    for turn in turns if isinstance(turns, list) else ():
        if isinstance(turn, dict) and len(turn) > 2:
            refuse_codec_data(turn, "conversations: ")
    if _is_llavas(record) and (kind is None or _are_paths(record[kind])):
        if kind is None:
            _check_names(record, ("image", "video"))
        return record
    media = _read_media(record)
    key, turns = _read_conversation(record, media)
    names = media.names()
    _check_names(record, () if names else ("image", "video"))
    if key is None:
        _check_names(record, () if isinstance(record.get("text"), str) else ("conversations",))
    read = {name for name in _OTHER_KEYS if name in (key, media.key) or not record.get(name)} | {"image", "video"}
    found = {name: value for name, value in record.items() if name not in read}
    if names:
        found[media.kind] = names[0] if len(names) == 1 else names
    if key is not None:
        found["conversations"] = turns
    return found


def _is_llavas(record: dict) -> bool:
    source = record.get("conversations")
    if not isinstance(source, list) or not _OTHER_KEYS.isdisjoint(record):
        return False
    return all(type(turn) is dict and type(turn.get("value")) is str for turn in source)


def _are_paths(value: str | list) -> bool:
    names = value if isinstance(value, list) else (value,)
    return not any(":" in name and _ADDRESS.match(name) for name in names)


@dataclass
class _Media:
    """What a record shows, as it is read.

    Attributes:
        kind: "image", "video" or None.
        key: the key that names them, None if only parts do.
        named: paths under that key.
        shown: paths of the parts that stand for them, in order.
        bare: how many parts took theirs from `named`.
    """

    kind: str | None = None
    key: str | None = None
    named: list[str] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)
    bare: int = 0

    def add(self, kind: str, source, where: str) -> None:
        """A part that stands for an image or a video: of the path `source`, or of the next of the record's."""
        if self.kind not in (None, kind):
            raise LlavaError(f"{where}: found {kind} beside {self.kind}, expected one of the two in a record")
        self.kind = kind
        if source is not None:
            self.shown.append(_path(source, where))
            return
        if self.bare == len(self.named):
            found = f"found no path, and none is left of the {len(self.named)} that the record names"
            raise LlavaError(f"{where}: {found}; expected one for each {kind}")
        self.shown.append(self.named[self.bare])
        self.bare += 1

    def names(self) -> list[str]:
        """All paths; LlavaError where the key names others than the parts do, or for several videos."""
        if self.shown and self.named and self.shown != self.named:
            raise LlavaError(
                f"{self.key}: found {brief(self.named)}, but {brief(self.shown)} in the parts of the conversation; "
                "expected the same"
            )
        names = self.shown or self.named
        if self.kind == "video" and len(names) != 1:
            raise LlavaError(f"{self.key or 'video'}: found {brief(names)}, expected one path")
        return names


def _read_media(record: dict) -> _Media:
    """What the keys of a record name, whatever its conversation."""
    found: list[_Media] = []
    for key in ("image", "video", "images", "videos"):
        kind, value = key.removesuffix("s"), record.get(key)
        if not value or (key != kind and record.get(kind) and not _is_names(value)):  # a column of another meaning
            continue
        names = value if isinstance(value, list) else [value]
        found.append(_Media(kind, key, [_path(name, key) for name in names]))
    for first, second in pairwise(found):
        if (first.kind, first.named) != (second.kind, second.named):
            raise LlavaError(
                f"{first.key} and {second.key}: found {brief(first.named)} and {brief(second.named)}, "
                "expected one of them"
            )
    return found[-1] if found else _Media()


def _is_names(value) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _path(source, where: str) -> str:
    """A path as data writes it: itself, a `file://` address, or an object with one of them as its url."""
    if isinstance(source, dict):
        refuse_codec_data(source, f"{where}: ")
        source = next((source[key] for key in ("url", "path") if source.get(key)), source)
    if not isinstance(source, str) or not source:
        raise LlavaError(f"{where}: found {brief(source)}, expected a path")
    if source[:7].lower() == "file://":
        path = unquote(source[7:])
        return path.removeprefix("localhost") if path.startswith("localhost/") else path
    if _ADDRESS.match(source):
        raise LlavaError(f"{where}: found the address {brief(source)}, expected the path of a file: nothing is fetched")
    return source


def _read_conversation(record: dict, media: _Media) -> tuple[str | None, list | None]:
    """The key of a record's conversation and its turns as LLaVA writes them; what its parts show goes into `media`."""
    keys = [key for key in ("conversations", "messages", "texts") if record.get(key)]
    keys = [key for key in keys if key == keys[0] or _is_conversation(record[key])]
    if len(keys) > 1:
        raise LlavaError(f"{' and '.join(keys)}: found both, expected one of them")
    if not keys:
        return None, None
    key, source = keys[0], record[keys[0]]
    if not isinstance(source, list):
        raise LlavaError(f"{key}: found {brief(source)}, expected a list of turns")
    turns = _pairs(source, media) if key == "texts" else [_turn(turn, media, at) for at, turn in enumerate(source)]
    if media.kind == "video" and (key, media.key) != ("conversations", "video"):
        turns = _with_image_token(turns)
    return key, turns


def _is_conversation(value) -> bool:
    """Whether a second key with a value is a conversation too, and no column of another meaning."""
    turns = ({"role", "content"}, {"from", "value"}, {"user", "assistant"})
    return isinstance(value, list) and isinstance(value[0], dict) and any(keys <= value[0].keys() for keys in turns)


def _turn(turn, media: _Media, number: int):
    """A turn as `{"from", "value"}`; one that is none stays, for the check to tell."""
    if not isinstance(turn, dict):
        return turn
    speaker, content = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if isinstance(content, list):
        content = _join(content, media, f"turn {number}")
    elif type(turn.get("value")) is str and "from" in turn:
        return turn
    return {"from": _SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker, "value": content}


def _join(parts: list, media: _Media, where: str) -> str:
    """The text of typed parts. Pictures in front of it have a line each, as in LLaVA's data; others stay in theirs."""
    text, in_front = "", True
    for number, part in enumerate(parts):
        place = f"{where}, part {number}"
        kind, content = _read_part(part, place)
        if kind != "text":
            media.add(kind, content, place)
            content = DEFAULT_IMAGE_TOKEN
        text += "\n" if in_front and text and content and not content.startswith("\n") else ""
        text += content
        in_front = in_front and (kind != "text" or not content)
    return text


def _read_part(part, where: str) -> tuple[str, object]:
    """("text", text), ("image" | "video", path, or None for the next that the record names)."""
    if isinstance(part, str):
        return "text", part
    if not isinstance(part, dict):
        raise LlavaError(f"{where}: found {brief(part)}, expected an object with a type")
    refuse_codec_data(part, f"{where}: ")
    kind = part.get("type") or next((key for key in _PART_KEYS if part.get(key)), None)
    name = re.sub(r"^(input|output)_|_url$", "", kind) if isinstance(kind, str) else kind
    if name == "text":
        if not isinstance(part.get("text"), str):
            raise LlavaError(f"{where}: found {brief(part.get('text'))} as its text, expected text")
        return "text", part["text"]
    if name not in ("image", "video"):
        raise LlavaError(f"{where}: found type {brief(kind)}, expected text, image or video")
    return name, next((part[key] for key in (name, f"{name}_url", "url", "path") if part.get(key)), None)


def _pairs(texts: list, media: _Media) -> list[dict]:
    """FineVision's question-and-answer pairs; the pictures stand in front, unless the texts say where."""
    turns = []
    for number, pair in enumerate(texts):
        if not isinstance(pair, dict) or not {"user", "assistant"} <= pair.keys():
            raise LlavaError(f'texts, entry {number}: found {brief(pair)}, expected {{"user": ..., "assistant": ...}}')
        turns += [{"from": "human", "value": pair["user"]}, {"from": "gpt", "value": pair["assistant"]}]
    said = any(DEFAULT_IMAGE_TOKEN in turn["value"] for turn in turns if isinstance(turn["value"], str))
    if not said and isinstance(turns[0]["value"], str):
        turns[0]["value"] = f"{DEFAULT_IMAGE_TOKEN}\n" * len(media.named) + turns[0]["value"]
    return turns


def _with_image_token(turns: list) -> list:
    """`<image>` where a ShareGPT file writes `<video>`."""
    texts = [turn.get("value") if isinstance(turn, dict) else None for turn in turns]
    if any(isinstance(text, str) and DEFAULT_IMAGE_TOKEN in text for text in texts):
        return turns
    return [
        {**turn, "value": text.replace(_VIDEO_TOKEN, DEFAULT_IMAGE_TOKEN)} if isinstance(text, str) else turn
        for turn, text in zip(turns, texts, strict=True)
    ]


def _check_names(record: dict, wanted: tuple[str, ...]) -> None:
    """Refuse a key that means one of `wanted`, none of which the record has, and has a value."""
    for key, value in record.items():
        meant = _meant(key)
        if meant in wanted and isinstance(value, str | list) and value:
            raise LlavaError(f"unknown key {key!r}: did you mean {meant!r}?")


@lru_cache(maxsize=4096)
def _meant(key: str) -> str | None:
    """Which of our names another one stands for."""
    plain = re.sub(r"[\W_]+", "", str(key)).lower()
    return next((name for name, pattern in _MEANT.items() if pattern.fullmatch(plain)), None)
