"""From a command line to a resolved run: every key's value and where it came from.

Precedence: command line > train YAML > tower YAML > checkpoint config > default.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.config.asked_parts import check_asked_parts
from llava.config.checks import check_run, check_value
from llava.config.commandline import WHERE, CommandLine, parse_command_line
from llava.config.files import find_file, read_yaml
from llava.config.keys import PATCH_KEYS
from llava.config.old_names import OLD_NAMES, translate
from llava.config.own_tower import ClassPath, locate, same_class
from llava.config.schema import all_keys, convert, convert_type, find_key, own_keys
from llava.errors import LlavaError

CHECKPOINT = "checkpoint config"
DEFAULT = "default"


@dataclass(frozen=True)
class Setting:
    """A value and its source: "command line", a YAML file, "checkpoint config" or "default"."""

    value: Any
    source: str


@dataclass
class Run:
    """A resolved run. `settings` holds every own key and every transformers field that was given somewhere."""

    config: str | None = None
    tower: str | None = None
    settings: dict[str, Setting] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> Any:
        if name in self.settings:
            return self.settings[name].value
        return all_keys()[name].default

    def source(self, name: str) -> str:
        return self.settings[name].source if name in self.settings else DEFAULT

    @property
    def named_towers(self) -> list[str]:
        """What the run's own YAML or command line names as vision tower or its type, not its checkpoint."""
        names = ("vision_tower", "mm_vision_tower_type")
        return [self[name] for name in names if self[name] and self.source(name) not in (CHECKPOINT, DEFAULT)]

    def group(self, name: str) -> dict[str, Any]:
        """{key: value} of the group model, data, train or trainer."""
        return {key: setting.value for key, setting in self.settings.items() if all_keys()[key].group == name}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file kept with the run."""
        keys = {name: {"value": item.value, "source": item.source} for name, item in self.settings.items()}
        return {"config": self.config, "tower": self.tower, "keys": keys}


def resolve(argv: list[str]) -> Run:
    """The run that `argv` (optional CONFIG.yaml, then flags) describes. Raises `LlavaError` for any fault in it."""
    line = parse_command_line(argv)
    run = Run(config=line.config, notices=line.notices)
    locate_own_tower(line.values, WHERE, line.config)
    layers = [(WHERE, line.values)]
    train_tower = None
    if line.config is not None:
        values, train_tower = _read_train_yaml(line.config, run.notices)
        layers.append((line.config, values))
    tower = _find_tower(line, train_tower)
    if tower is not None:
        run.tower = str(tower)
        layers.append((run.tower, _read_layer(tower, read_yaml(tower), run.notices, tower=True)))
        _tell_shadowed(line, layers, run.notices)
    layers.append((CHECKPOINT, _read_checkpoint(layers, run.notices)))
    for name, key in own_keys().items():
        run.settings[name] = Setting(key.default, DEFAULT)
    for source, values in reversed(layers):
        for name, value in values.items():
            check_value(all_keys()[name], value, source)
            run.settings[name] = Setting(value, source)
    _merge_patch_keys(run, layers)
    check_run(run)
    return run


def _merge_patch_keys(run: Run, layers: list[tuple[str, dict]]) -> None:
    """Put the published keys of adaptive patches into `adaptive_patches`, by precedence.

    A mapping in one layer and single keys in a higher one make one mapping. Where there is no mapping, the keys keep
    their values too, since what they leave out is for the model's own image processor to say.
    """
    members, whole = {}, False
    for source, values in reversed(layers):
        given = {name: values[name] for name in PATCH_KEYS if name in values}
        if "adaptive_patches" in values:
            if any(value is not None for value in given.values()):
                raise LlavaError(f"{source}: adaptive_patches and {', '.join(given)} are both given, expected one form")
            members, whole = dict(values["adaptive_patches"] or {"method": "all"}), True
            run.settings["adaptive_patches"] = Setting(values["adaptive_patches"], source)
        elif given:
            members |= {PATCH_KEYS[name]: value for name, value in given.items()}
            members = {member: value for member, value in members.items() if value is not None}
            run.settings["adaptive_patches"] = Setting(members or None, source if members else DEFAULT)
    if whole:
        run.settings |= {name: Setting(None, DEFAULT) for name in PATCH_KEYS}


def _read_train_yaml(config: str, notices: list[str]) -> tuple[dict[str, Any], str | None]:
    content = read_yaml(config)
    tower = content.pop("tower", None)
    if tower is not None and not isinstance(tower, str):
        raise LlavaError(f"{config}: tower is {tower!r}, expected a tower YAML file")
    values = _read_layer(config, content, notices, tower=False)
    deepspeed = values.get("deepspeed")
    if isinstance(deepspeed, str) and not deepspeed.startswith("{"):
        values["deepspeed"] = str(find_file(deepspeed, config) or deepspeed)
    return values, tower


def _read_layer(path, content: dict[str, Any], notices: list[str], tower: bool) -> dict[str, Any]:
    """The values of one YAML file by key name, in their types."""
    where, values, old = str(path), {}, {}
    for name, value in content.items():
        if name in OLD_NAMES and name not in all_keys():
            key = OLD_NAMES[name].key(name)
        else:
            key = find_key(name, where, others=("tower", *OLD_NAMES))
        if tower and not key.tower:
            allowed = ", ".join(item.name for item in own_keys().values() if item.tower)
            raise LlavaError(f"{where}: {name} does not belong in a tower config, expected one of: {allowed}")
        layer = old if key.group == "old" else values
        if key.name in layer:
            raise LlavaError(f"{where}: {name} and another name of it are both given, expected one")
        layer[key.name] = convert(key, value, where)
    translate(values, old, where, notices)
    locate_own_tower(values, where, where)
    return values


def locate_own_tower(values: dict[str, Any], where: str, config: str | None) -> None:
    """Put the paths of a user's own encoder, where they are relative to a YAML, into terms of the working directory."""
    for name in ("vision_tower", "mm_vision_tower_type", "vision_tower_weights"):
        value = values.get(name)
        if value is not None and (name == "vision_tower_weights" or ClassPath.parse(value) is not None):
            values[name] = locate(value, name, where, config)


def _find_tower(line: CommandLine, train_tower: str | None) -> Path | None:
    """The tower YAML: the command line's, else the train config's."""
    name, where = (line.tower, WHERE) if line.tower is not None else (train_tower, line.config)
    if name is None:
        return None
    found = find_file(name, line.config)
    if found is None:
        raise LlavaError(f"{where}: tower config {name} does not exist")
    return found


def _tell_shadowed(line: CommandLine, layers: list[tuple[str, dict]], notices: list[str]) -> None:
    """A train YAML's own tower keys stand above a tower YAML, also above one that the command line swapped in."""
    if line.tower is None or line.config is None:
        return
    (train_source, train), (tower_source, tower) = layers[1], layers[2]
    for name in sorted(train.keys() & tower.keys() - line.values.keys()):
        if train[name] != tower[name]:
            notices.append(f"{train_source} sets {name} itself, which stands above {tower_source}")


def _read_checkpoint(layers: list[tuple[str, dict]], notices: list[str]) -> dict[str, Any]:
    """The keys in config.json of a local checkpoint in model_name_or_path; {} for a plain language model.

    A number that its key does not take can have had no effect in the run that wrote it: it is told and left out.
    """
    given = {name: value for _, values in reversed(layers) for name, value in values.items()}
    folder = Path(given.get("model_name_or_path", ""))
    path = folder / "config.json"
    if "model_name_or_path" not in given or not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LlavaError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict) or not content.get("mm_vision_tower"):
        return {}
    check_asked_parts(content, CHECKPOINT)
    values = {}
    for name, key in own_keys().items():
        stored = key.checkpoint if isinstance(key.checkpoint, str) else name
        if key.checkpoint and not key.only_default and content.get(stored) is not None:
            value = convert_type(key, content[stored], str(path))
            fault = key.within and key.within.fault(value)
            if not fault:
                values[name] = value
            elif name not in given:
                notices.append(f"{path}: {stored} is {value}, expected {fault}; it is not used")
    return _keep_matching_tower(values, given, folder)


def _keep_matching_tower(values: dict[str, Any], given: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A tower path inside the checkpoint made usable; without what describes its tower if another one is given."""
    own = values["vision_tower"]
    inside = folder / own
    other = given.get("vision_tower")
    known = (os.path.normpath(own), os.path.normpath(inside))
    if other is not None and os.path.normpath(other) not in known and not same_class(other, own):
        return {name: value for name, value in values.items() if not own_keys()[name].tower_part}
    if not Path(own).is_absolute() and inside.is_dir():
        values["vision_tower"] = str(inside)
    return values
