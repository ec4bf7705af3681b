"""The command line: `[CONFIG.yaml] --key value --key=value --flag --no_flag`, as HfArgumentParser understands it."""

from dataclasses import dataclass, field
from typing import Any

from llava.config.old_names import OLD_NAMES, translate
from llava.config.schema import Key, all_keys, convert_word, find_key
from llava.errors import LlavaError

WHERE = "command line"
LABELS = ("version", "run_name")  # published scripts leave their variables empty


@dataclass
class CommandLine:
    """What a command line says: the config file, the tower file, and values by key name."""

    config: str | None = None
    tower: str | None = None
    values: dict[str, Any] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


def parse_command_line(argv: list[str], keys: dict[str, Key] | None = None, files=("tower",)) -> CommandLine:
    """Read `argv` (without the program's name).

    keys: those that there are (default: those of a training run, and their old names). files: of `config` and `tower`,
    those that may be given as `--config FILE`.

    A boolean key alone means True, `--no_key` False; a list key takes several words; a dash in a key is an underscore;
    the last of two equal keys wins; an empty choice is its default.

    Raises:
        LlavaError: an unknown key, or a word that is not the key's type.
    """
    line, old, rest = CommandLine(), {}, list(argv)
    old_names = OLD_NAMES if keys is None else {}
    keys = all_keys() if keys is None else keys
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            _take_config(line, word)
            continue
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        if name in files:
            setattr(line, name, text if equals else _next_word(rest, name))
            continue
        key, negated = _key_of(name, keys, old_names)
        words = [text] if equals else _take_words(key, rest)
        if old_names and _is_empty(key, words):  # of a training run
            line.notices.append(
                f"{WHERE}: --{name} is empty, as if it were not given (default: {key.default or 'none'})"
            )
            line.values.pop(key.name, None)
            continue
        value = convert_word(key, words, WHERE)
        (old if key.group == "old" else line.values)[key.name] = (not value) if negated else value
    translate(line.values, old, WHERE, line.notices)
    return line


def _is_empty(key: Key, words: list[str]) -> bool:
    """Whether a script's variable was empty that a choice stood for; one without quotes leaves no word at all."""
    if key.name in LABELS:
        return not "".join(words)
    named = key.name == "model_name_or_path" or key.only_default
    return words == [""] and isinstance(key.default, str) and key.default != "" and not named


def _key_of(name: str, keys: dict[str, Key], old_names: dict) -> tuple[Key, bool]:
    """The key and whether the name negates it (`no_bf16`)."""
    if name in old_names and name not in keys:
        return old_names[name].key(name), False
    positive = keys.get(name.removeprefix("no_"))
    if name.startswith("no_") and positive is not None and positive.is_bool:
        return positive, True
    return find_key(name, WHERE, keys, tuple(old_names)), False


def _take_words(key: Key, rest: list[str]) -> list[str]:
    """The words that belong to `key`: up to the next --flag; more than one only for a list."""
    words = []
    while rest and not rest[0].startswith("--") and (not words or key.is_list):
        if (key.is_bool or words) and _is_config(rest[0]):
            break
        words.append(rest.pop(0))
    return words


def _next_word(rest: list[str], name: str) -> str:
    if not rest or rest[0].startswith("--"):
        raise LlavaError(f"{WHERE}: --{name} needs a value (a file)")
    return rest.pop(0)


def _is_config(word: str) -> bool:
    return word.endswith((".yaml", ".yml"))


def _take_config(line: CommandLine, word: str) -> None:
    if not _is_config(word):
        raise LlavaError(f"{WHERE}: {word!r} is neither a --key nor a config file (.yaml)")
    if line.config is not None:
        raise LlavaError(f"{WHERE}: two config files, {line.config} and {word}; expected one")
    line.config = word
