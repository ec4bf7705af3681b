"""What is known about each key, and the conversion of a found value to the key's type."""

import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, Union

from pydantic import TypeAdapter, ValidationError

from llava.config.keys import GROUPS, REFUSED, REFUSED_IN_CHECKPOINTS, KeyGroup
from llava.config.rules import TRAINER_RULES, Rule
from llava.config.trainer_fields import trainer_fields
from llava.errors import LlavaError

TRUE_WORDS = {"true", "yes", "on", "1", "t", "y"}
FALSE_WORDS = {"false", "no", "off", "0", "f", "n"}


@dataclass(frozen=True)
class Key:
    """One key. `type` is the annotation; `group` is model, data, train or trainer (a field of transformers only);
    `only_default` is the part that the key is of where that does not exist here. The rest is as in `keys.key`."""

    name: str
    group: str
    type: Any
    default: Any
    description: str = ""
    within: Rule | None = None
    tower: bool = False
    tower_part: bool = False
    checkpoint: str | bool = False
    aliases: tuple[str, ...] = ()
    only_default: str = ""
    refuse: dict = field(default_factory=dict, hash=False)

    @property
    def kinds(self) -> tuple:
        """The members of the annotation: (str, NoneType) for `str | None`."""
        if typing.get_origin(self.type) in (Union, types.UnionType):
            return typing.get_args(self.type)
        return (self.type,)

    @property
    def is_bool(self) -> bool:
        return bool in self.kinds and str not in self.kinds

    @property
    def is_list(self) -> bool:
        """True if several words may follow the key on a command line."""
        return any(kind in (list[str], list[float]) for kind in self.kinds)

    @property
    def expected(self) -> str:
        """What values are right in words, for messages and the key table: the type, or the rule in its place."""
        return self._said(self.within)

    @property
    def expected_type(self) -> str:
        return self._said(None)

    def _said(self, rule: Rule | None) -> str:
        kinds = [kind for kind in self.kinds if kind is not type(None)]
        if rule and str in kinds:  # a list of them, too
            return rule.text
        words = [rule.text if rule and kind in (int, float) else _words(kind) for kind in kinds]
        if rule and list[float] in kinds:
            words[-1] = "a list of such" if len(kinds) > 1 else f"list, each item a {rule.text}"
        return " or ".join(dict.fromkeys(words))


def _words(kind) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(str(choice) for choice in typing.get_args(kind))
    names = {int: "whole number", float: "number", bool: "true or false", str: "text", list[str]: "list of words"}
    names |= {list[float]: "list of numbers", list[list[int]]: "list of pairs"}
    if kind in names:
        return names[kind]
    return "mapping" if (typing.get_origin(kind) or kind) is dict else str(kind)


def keys_of(group: str, model: type[KeyGroup]) -> dict[str, Key]:
    """The keys that a group defines."""
    keys = {}
    for name, info in model.model_fields.items():
        extra = info.json_schema_extra["llava"]
        keys[name] = Key(name, group, info.annotation, info.default, info.description, **extra)
    return keys


@cache
def own_keys() -> dict[str, Key]:
    """The keys this project defines for a training run, in the order of the key table."""
    keys = {}
    for group, model in GROUPS.items():
        for name, key in keys_of(group, model).items():
            keys[name] = key
            for part, entries in REFUSED.get(name, {}).items():
                for refused, entry in entries.items():
                    kind, default = entry if isinstance(entry, tuple) else (type(entry), entry)
                    stored = refused in REFUSED_IN_CHECKPOINTS
                    keys[refused] = Key(refused, group, kind, default, part, checkpoint=stored, only_default=part)
    return keys


@cache
def all_keys() -> dict[str, Key]:
    """Own keys and the fields of the installed `transformers.TrainingArguments` that are not among them."""
    keys = dict(own_keys())
    for name, (kind, default) in trainer_fields().items():
        keys.setdefault(name, Key(name, "trainer", kind, default, within=TRAINER_RULES.get(name)))
    return keys


# of LLaVA-NeXT's train_dpo.py alone
PREFERENCES = (
    *("dpo_alpha", "beta", "gamma", "generate_during_eval", "precompute_ref_log_probs", "input_prompt"),
    *("refine_prompt", "num_sample"),
)


def find_key(name: str, where: str, keys: dict[str, Key] | None = None, others: tuple[str, ...] = ()) -> Key:
    """The key called `name` or an alias of it; `LlavaError` with the nearest valid name otherwise.

    keys: those that there are (default: those of a training run). others: names that are no keys, but valid as well.
    """
    keys = all_keys() if keys is None else keys
    aliases = {alias: key.name for key in keys.values() for alias in key.aliases}
    found = keys.get(aliases.get(name, name))
    if found is None and name in PREFERENCES:
        raise LlavaError(
            f"{where}: {name} is a key of preference training (DPO), which is not available in this version"
        )
    if found is None:
        raise unknown_key(name, where, [*keys, *aliases, *others])
    return found


def unknown_key(name: str, where: str, candidates: list[str]) -> LlavaError:
    near = difflib.get_close_matches(name, candidates, n=1, cutoff=0.0)
    return LlavaError(f"{where}: unknown key {name!r}; the nearest valid key is {near[0]!r}")


def convert(key: Key, value: Any, where: str) -> Any:
    """`value` as found in YAML, JSON or a command line (then text), in the key's type and within its rule.

    Raises `LlavaError` naming `where`, the key, what was found and what was expected.
    """
    value = convert_type(key, value, where)
    fault = key.within and key.within.fault(value)
    if fault:
        raise LlavaError(f"{where}: {key.name} is {repr(value) if isinstance(value, str) else value}, expected {fault}")
    return value


def convert_type(key: Key, value: Any, where: str) -> Any:
    """As `convert`, whatever the key's rule says."""
    try:
        return _adapter(key.type).validate_python(_prepare(key, value), strict=True)
    except ValidationError:
        found = repr(value) if isinstance(value, str) else f"{value} ({_type_name(value)})"
        raise LlavaError(f"{where}: {key.name} is {found}, expected {key.expected_type}") from None


@cache
def _adapter(kind: Any) -> TypeAdapter:
    return TypeAdapter(kind)


def _type_name(value: Any) -> str:
    if value is None:
        return "nothing"
    names = {bool: "true or false", int: "whole number", float: "number", list: "list", dict: "mapping"}
    return names.get(type(value), type(value).__name__)


def _prepare(key: Key, value: Any) -> Any:
    """The conversions that lose nothing: number words, boolean words, whole numbers for numbers, tuples for lists."""
    kinds = key.kinds
    if isinstance(value, str):
        if bool in kinds and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if key.is_bool:
            return True if value.lower() in TRUE_WORDS else False if value.lower() in FALSE_WORDS else value
        if float in kinds and str not in kinds:
            return _number(value)
    if isinstance(value, int) and float in kinds and int not in kinds:
        return _number(value)
    if isinstance(value, (list, tuple)):
        if list[float] in kinds:
            return [_number(item) for item in value]
        return [list(item) if isinstance(item, tuple) else item for item in value]
    return value


def _number(item: Any) -> Any:
    """A whole number or a word as a float, if it is one; one that is too large for that as infinity."""
    if isinstance(item, bool) or not isinstance(item, (int, str)):
        return item
    try:
        return float(item)
    except ValueError:
        return item
    except OverflowError:
        return math.inf if item > 0 else -math.inf


def convert_word(key: Key, words: list[str], where: str) -> Any:
    """The words that followed `--key` on a command line, in the key's type. No word: True for a boolean."""
    if not words:
        if key.is_bool:
            return True
        raise LlavaError(f"{where}: --{key.name} needs a value ({key.expected})")
    if len(words) > 1:
        return convert(key, words, where)
    word: Any = words[0]
    optional = type(None) in key.kinds
    if optional and word.lower() in ("none", "null"):
        return None
    if int in key.kinds and str not in key.kinds:
        try:
            word = int(word)
        except ValueError:
            word = words[0]
    if list[float] in key.kinds and word.startswith("["):
        return convert(key, word.strip("[]").replace(",", " ").split(), where)
    if str not in key.kinds and float not in key.kinds and key.is_list:
        word = [word]
    if str not in key.kinds and isinstance(word, str) and word.startswith("{"):
        word = _mapping(key, word, where)
    return convert(key, word, where)


def _mapping(key: Key, text: str, where: str) -> Any:
    """A mapping as JSON or as YAML writes it in one line: {method: budget, alpha: 0.3}."""
    import json

    import yaml

    from llava.config.files import read_text

    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        try:
            return read_text(text)
        except yaml.YAMLError:
            raise LlavaError(f"{where}: {key.name} is {text!r}, neither JSON ({error}) nor YAML") from None
