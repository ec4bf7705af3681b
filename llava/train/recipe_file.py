"""A recipe's YAML: what is prepared, the stages of training, and how the trained model is evaluated."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.config.commandline import parse_command_line
from llava.config.files import find_file, read_yaml
from llava.config.schema import find_key, unknown_key
from llava.errors import LlavaError

PASSES = ("model", "projector", "lora")
KINDS = ("exact_match", "lmms_eval")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_RECIPE = ("name", "output_dir", "prepare", "stages", "evaluations", "report")
_STAGE = ("name", "config", "from", "passes", "set")
_EVALUATION = {
    "exact_match": ("name", "kind", "data_path", "image_folder", "blank_images", "args"),
    "lmms_eval": ("name", "kind", "tasks", "args"),
}
_ARGUMENTS = {  # of llava.eval.exact_match, that a recipe may give
    *("selections", "batch_size", "max_new_tokens", "limit", "conv_mode", "allow_absolute_paths", "device", "dtype"),
    *("vision_tower", "trust_remote_code", "data_path", "image_folder", "blank_images", "overwrite_config"),
}


@dataclass(frozen=True)
class Stage:
    """One training run: `config` with the keys of `set`, from what the stage `source` has left (None: from the
    config's own `model_name_or_path`), which `passes` its whole model, its projector or its adapter."""

    name: str
    config: str
    set: dict[str, Any] = field(default_factory=dict)
    source: str | None = None
    passes: str = "model"


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the last stage's model. `args`: further arguments of its program, by name."""

    name: str
    kind: str
    data_path: str | None = None
    image_folder: str | None = None
    blank_images: bool = False
    tasks: tuple[str, ...] = ()
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """`prepare` are commands as lists of words, in which {seed} stands for the run's seed."""

    name: str
    output_dir: str
    stages: tuple[Stage, ...]
    evaluations: tuple[Evaluation, ...] = ()
    prepare: tuple[tuple[str, ...], ...] = ()
    report: bool = True
    path: str = ""

    def stage(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    @property
    def names(self) -> list[str]:
        """Of stages and evaluations, which have values of their own as `--NAME.key value`."""
        return [part.name for part in (*self.stages, *self.evaluations)]


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe.

    Raises:
        LlavaError: there is no such file, or something in it is not what a recipe says; names it.
    """
    where, content = str(path), read_yaml(path)
    _check_keys(content, _RECIPE, where)
    name = _word(content, "name", where)
    stages, evaluations = _items(content, "stages", where), _items(content, "evaluations", where)
    if not stages:
        raise LlavaError(f"{where}: stages: none given, expected at least one")
    found = []
    for number, item in enumerate(stages):
        found.append(_read_stage(item, f"{where}: stages[{number}]", where, found))
    asked = [_read_evaluation(item, f"{where}: evaluations[{n}]", where) for n, item in enumerate(evaluations)]
    names = [part.name for part in (*found, *asked)]
    for one in names:
        if names.count(one) > 1:
            raise LlavaError(f"{where}: {one} is the name of two parts, expected a name of its own for each")
    output, report = content.get("output_dir"), content.get("report", True)
    if not isinstance(output, str) or not output:
        raise LlavaError(f"{where}: output_dir is {output!r}, expected a folder")
    if not isinstance(report, bool):
        raise LlavaError(f"{where}: report is {report!r}, expected true or false")
    return Recipe(name, output, tuple(found), tuple(asked), _read_commands(content, where), report, where)


def _check_keys(content: dict, known: tuple[str, ...], where: str) -> None:
    for key in content:
        if key not in known:
            raise unknown_key(str(key), where, list(known))


def _items(content: dict, key: str, where: str) -> list[dict]:
    items = content.get(key) or []
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise LlavaError(f"{where}: {key} is {items!r}, expected a list of mappings")
    return items


def _word(item: dict, key: str, where: str) -> str:
    value = item.get(key)
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise LlavaError(f"{where}: {key} is {value!r}, expected letters, digits, _ and - (it names a folder or file)")
    return value


def _read_stage(item: dict, where: str, recipe: str, before: list[Stage]) -> Stage:
    _check_keys(item, _STAGE, where)
    name, source, passes = _word(item, "name", where), item.get("from"), item.get("passes", "model")
    config = item.get("config")
    found = find_file(config, recipe) if isinstance(config, str) else None
    if found is None or not found.is_file():
        raise LlavaError(f"{where}: config is {config!r}, expected the YAML of a training run that is there")
    if source is not None and source not in [stage.name for stage in before]:
        raise LlavaError(f"{where}: from is {source!r}, expected a stage before {name}")
    if passes not in PASSES or (source is None and "passes" in item):
        expected = f"one of {', '.join(PASSES)}" if source else "none, as there is no `from`"
        raise LlavaError(f"{where}: passes is {passes!r}, expected {expected}")
    values = item.get("set") or {}
    if not isinstance(values, dict):
        raise LlavaError(f"{where}: set is {values!r}, expected a mapping of keys of a training run")
    for key in values:
        if key != "tower":
            find_key(str(key), f"{where}: set", others=("tower",))
    return Stage(name, str(found), values, source, passes)


def _read_evaluation(item: dict, where: str, recipe: str) -> Evaluation:
    name, kind, args = _word(item, "name", where), item.get("kind"), item.get("args") or {}
    if kind not in KINDS:
        raise LlavaError(f"{where}: kind is {kind!r}, expected one of {', '.join(KINDS)}")
    _check_keys(item, _EVALUATION[kind], where)
    if not isinstance(args, dict):
        raise LlavaError(f"{where}: args is {args!r}, expected a mapping")
    for key in args:
        check_argument(kind, str(key), f"{where}: args")
    tasks, data = item.get("tasks") or [], item.get("data_path")
    if kind == "lmms_eval" and not (isinstance(tasks, list) and tasks and all(isinstance(t, str) for t in tasks)):
        raise LlavaError(f"{where}: tasks is {tasks!r}, expected a list of lmms-eval's tasks")
    if kind == "exact_match" and not isinstance(data, str):
        raise LlavaError(f"{where}: data_path is {data!r}, expected a file of questions")
    blank, folder = item.get("blank_images", False), item.get("image_folder")
    if not isinstance(blank, bool):
        raise LlavaError(f"{where}: blank_images is {blank!r}, expected true or false")
    return Evaluation(name, kind, data, folder, blank, tuple(tasks), args)


def check_argument(kind: str, key: str, where: str) -> None:
    """Refuse what is no argument of `llava.eval.exact_match`; of lmms-eval's, only itself knows them."""
    if kind == "exact_match" and key.replace("-", "_") not in _ARGUMENTS:
        raise unknown_key(key, where, sorted(_ARGUMENTS))


def _read_commands(content: dict, where: str) -> tuple[tuple[str, ...], ...]:
    commands = content.get("prepare") or []
    if not isinstance(commands, list) or not all(isinstance(one, list) and one for one in commands):
        raise LlavaError(f"{where}: prepare is {commands!r}, expected a list of commands, each a list of words")
    return tuple(tuple(str(word) for word in one) for one in commands)


class Overrides:
    """The command line's values above a recipe: `--key value` for all stages, `--NAME.key value` for one part.

    Args:
        words: as typed.

    Raises:
        LlavaError: a word that is no key's, or a key or part that there is not.
    """

    def __init__(self, recipe: Recipe, words: list[str]):
        self.all: list[str] = []
        self._of: dict[str, list[str]] = {name: [] for name in recipe.names}
        kinds = {evaluation.name: evaluation.kind for evaluation in recipe.evaluations}
        for key, values in _groups(words):
            part, dot, rest = key.partition(".")
            if not dot:
                self.all += [f"--{key}", *values]
            elif part not in self._of:
                names = ", ".join(recipe.names)
                raise LlavaError(f"command line: --{key}: {recipe.path} has no part {part!r}, expected one of {names}")
            else:
                if part in kinds:
                    check_argument(kinds[part], rest.partition("=")[0], "command line")
                self._of[part] += [f"--{rest}", *values]
        for stage in recipe.stages:
            parse_command_line(self.stage(stage.name))

    def stage(self, name: str) -> list[str]:
        return [*self.all, *self._of[name]]

    def evaluation(self, name: str) -> dict[str, Any]:
        """{argument: value}; several words are a list, no word is true."""
        found = {}
        for key, values in _groups(self._of[name]):
            key, equals, text = key.partition("=")
            values = [text] if equals else values
            found[key.replace("-", "_")] = values[0] if len(values) == 1 else (values or True)
        return found

    @property
    def seed(self) -> int:
        """Stands for {seed} in what is prepared; 0 where the command line says none."""
        return parse_command_line(self.all).values.get("seed", 0)


def _groups(words: list[str]) -> list[tuple[str, list[str]]]:
    """(key without dashes, words up to the next key)."""
    groups: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--") and len(word) > 2:
            groups.append((word[2:], []))
        elif not groups:
            raise LlavaError(f"command line: {word!r} is no --key of a training run")
        else:
            groups[-1][1].append(word)
    return groups


def flags(values: dict[str, Any]) -> list[str]:
    """A mapping of keys as a command line has them."""
    words = []
    for key, value in values.items():
        words.append(f"--{key}")
        if isinstance(value, (list, tuple)) and all(isinstance(item, (str, int, float)) for item in value):
            words += [_text(item) for item in value]
        else:
            words.append(_text(value))
    return words


def _text(value) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value)  # numbers, true, false, null, mappings and lists of lists, as YAML reads them
