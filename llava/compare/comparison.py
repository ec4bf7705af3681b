"""A comparison's YAML: which towers are trained by which recipe, with which seeds, and what must be equal.

name: demo
recipe: configs/recipes/demo.yaml
seeds: [0, 1]
match: none                       # none | tokens | pixels | samples
set: {pretrain.max_steps: 200}    # keys of all runs, for all stages or one
towers:
  - {name: clip, tower: configs/towers/demo_clip.yaml, learning_rates: [1e-3, 2e-3]}
  - {name: frozen, tower: configs/towers/demo_clip.yaml, frozen: true, set: {finetune.weight_decay: 0}}
  - {name: half, tower: configs/towers/demo_clip.yaml, evaluate: {heldout.limit: 100}}
learning_rate_stage: finetune     # the stage that learning_rates are of (default: the last one)
validation: {share: 0.1, seed: 0} # of the training images, where learning_rates are given
groups: {General: [mmbench, gqa]}
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.config.commandline import parse_command_line
from llava.config.files import find_file, read_yaml
from llava.config.schema import convert, find_key, unknown_key
from llava.errors import LlavaError
from llava.train.recipe_file import Recipe, check_argument, flags, read_recipe

MATCHES = ("none", "tokens", "pixels", "samples")
_TOP = ("name", "recipe", "seeds", "match", "towers", "validation", "groups", "set", "learning_rate_stage")
_ENTRY = ("name", "tower", "set", "frozen", "learning_rates", "evaluate")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_OWN = {  # keys that the comparison gives itself
    "seed": "the comparison's seeds say it",
    "output_dir": "each run has a folder of its own",
    "overwrite_output_dir": "a run that has begun goes on",
}

# {(stage, evaluation, or None for all stages; key): value}
Values = dict[tuple[str | None, str], Any]


@dataclass(frozen=True)
class Entry:
    """One row of the comparison. `tower` None: the one that the recipe's stages name."""

    name: str
    tower: str | None = None
    values: Values = field(default_factory=dict, hash=False)
    frozen: bool = False
    learning_rates: tuple[float, ...] = ()


@dataclass(frozen=True)
class Validation:
    """Which of the training images learning rates are chosen on."""

    share: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class Comparison:
    """Attributes:
    values: of the comparison's `set`, below those of an entry; `given`: of the command line, above them.
    groups: {group: names of evaluations, or of lmms-eval's tasks}.
    """

    name: str
    recipe: Recipe
    seeds: tuple[int, ...]
    entries: tuple[Entry, ...]
    match: str = "none"
    values: Values = field(default_factory=dict, hash=False)
    given: Values = field(default_factory=dict, hash=False)
    validation: Validation = Validation()
    learning_rate_stage: str = ""
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    path: str = ""

    @property
    def chooses_rates(self) -> bool:
        """Whether a learning rate is chosen for any entry, so that all train without the validation images."""
        return any(entry.learning_rates for entry in self.entries)

    @property
    def measured(self) -> list[str]:
        """The names under which scores are told: of evaluations by exact match, and of lmms-eval's tasks."""
        return measured(self.recipe)

    def values_of(self, entry: Entry) -> Values:
        """The keys that differ from the recipe in the runs of an entry, by precedence."""
        return layered(self.recipe, self.values, entry.values, self.given)


def measured(recipe: Recipe) -> list[str]:
    found = []
    for one in recipe.evaluations:
        found += one.tasks if one.kind == "lmms_eval" else [one.name]
    return found


def layered(recipe: Recipe, *layers: Values) -> Values:
    """The values of several layers, the last one on top: a key for all stages stands above one stage's below it."""
    found: Values = {}
    for layer in layers:
        for (part, key), value in sorted(layer.items(), key=lambda item: item[0][0] is not None):
            if part is None:
                for stage in recipe.stages:
                    found.pop((stage.name, key), None)
            found[part, key] = value
    return found


def words(values: Values) -> list[str]:
    """Values as the recipe's command takes them."""
    return flags({key if part is None else f"{part}.{key}": value for (part, key), value in values.items()})


def read_comparison(path: str | Path, given: list[str] = ()) -> Comparison:
    """Read a comparison.

    Args:
        given: `--key value` and `--STAGE.key value` words of the command line, for all runs.

    Raises:
        LlavaError: there is no such file, or something in it is not what a comparison says; names it.
    """
    where, content = str(path), read_yaml(path)
    _check_keys(content, _TOP, where)
    name, recipe = _name(content.get("name"), f"{where}: name"), _recipe(content.get("recipe"), where)
    if not recipe.evaluations:
        raise LlavaError(f"{where}: recipe {recipe.path} has no evaluations, expected at least one to compare by")
    match = content.get("match", "none")
    if match not in MATCHES:
        raise LlavaError(f"{where}: match is {match!r}, expected one of {', '.join(MATCHES)}")
    stages = [stage.name for stage in recipe.stages]
    stage = content.get("learning_rate_stage", stages[-1])
    if stage not in stages:
        raise LlavaError(f"{where}: learning_rate_stage is {stage!r}, expected one of {', '.join(stages)}")
    comparison = Comparison(
        name,
        recipe,
        _seeds(content.get("seeds", [0]), where),
        _entries(content.get("towers"), recipe, where),
        match,
        _values(content.get("set"), recipe, f"{where}: set"),
        given_values(recipe, list(given)),
        _validation(content.get("validation"), where),
        stage,
        _groups(content.get("groups"), recipe, where),
        where,
    )
    _check_rates(comparison)
    _check_questions(comparison)
    return comparison


def _check_keys(content: dict, known: tuple[str, ...], where: str) -> None:
    for key in content:
        if key not in known:
            raise unknown_key(str(key), where, list(known))


def _name(value, where: str) -> str:
    """A name that makes a folder of its own, and of no other name."""
    if not isinstance(value, str) or not _NAME.fullmatch(value) or value.endswith("."):
        raise LlavaError(f"{where} is {value!r}, expected letters, digits, ., _, + and - (it names a folder)")
    return value


def _recipe(value, where: str) -> Recipe:
    found = find_file(value, where) if isinstance(value, str) and value else None
    if found is None or not found.is_file():
        raise LlavaError(f"{where}: recipe is {value!r}, expected the YAML of a recipe that is there")
    return read_recipe(found)


def _seeds(value, where: str) -> tuple[int, ...]:
    expected = "expected a list of whole numbers of at least 0, each one once"
    if not isinstance(value, list) or not value or not all(type(seed) is int and seed >= 0 for seed in value):
        raise LlavaError(f"{where}: seeds is {value!r}, {expected}")
    twice = next((seed for seed in value if value.count(seed) > 1), None)
    if twice is not None:
        raise LlavaError(f"{where}: seeds: {twice} is there twice, {expected}")
    return tuple(value)


def _entries(items, recipe: Recipe, where: str) -> tuple[Entry, ...]:
    if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
        raise LlavaError(f"{where}: towers is {items!r}, expected a list of mappings with name and tower")
    entries = [_entry(item, recipe, where, number) for number, item in enumerate(items)]
    folders: dict[str, str] = {}
    for name in (entry.name for entry in entries):
        if before := folders.get(name.casefold()):
            same = "" if before == name else f" and {before}, which differ in case alone"
            raise LlavaError(
                f"{where}: towers: two entries of one name, {name}{same}; expected a name of its own for each"
            )
        folders[name.casefold()] = name
    return tuple(entries)


def _entry(item: dict, recipe: Recipe, where: str, number: int) -> Entry:
    name = _name(item.get("name"), f"{where}: towers[{number}]: name")
    here = f"{where}: towers: {name}"
    _check_keys(item, _ENTRY, here)
    tower, frozen = item.get("tower"), item.get("frozen", False)
    if tower is not None:
        found = find_file(tower, where) if isinstance(tower, str) and tower else None
        if found is None or not found.is_file():
            raise LlavaError(f"{here}: tower {tower!r} does not exist, expected the YAML of a tower")
        tower = str(found)
    if not isinstance(frozen, bool):
        raise LlavaError(f"{here}: frozen is {frozen!r}, expected true or false")
    rates = item.get("learning_rates") or []
    if not isinstance(rates, list) or not all(_positive(rate) for rate in rates):
        raise LlavaError(f"{here}: learning_rates is {rates!r}, expected a list of numbers above 0")
    rates = [float(rate) for rate in rates]
    if len({f"{rate:g}" for rate in rates}) != len(rates):
        raise LlavaError(f"{here}: learning_rates: found {rates}, expected each one once")
    values = _values(item.get("set"), recipe, f"{here}: set")
    values |= _evaluation_values(item.get("evaluate"), recipe, f"{here}: evaluate")
    return Entry(name, tower, values, frozen, tuple(rates))


def _positive(rate) -> bool:
    return isinstance(rate, (int, float)) and not isinstance(rate, bool) and 0 < rate < float("inf")


def _values(content, recipe: Recipe, where: str) -> Values:
    """Keys of training runs, and of evaluations as EVALUATION.key, in their types."""
    found: Values = {}
    stages = [stage.name for stage in recipe.stages]
    for word, value in _mapping(content, where).items():
        part, dot, key = str(word).rpartition(".")
        if dot and part not in recipe.names:
            raise LlavaError(f"{where}: {word}: {recipe.path} has no part {part!r}, expected {_or(recipe.names)}")
        if dot and part not in stages:
            found |= _evaluation_values({word: value}, recipe, where)
            continue
        name = _own(key, where).name
        found[part if dot else None, name] = convert(find_key(name, where), value, where)
    return found


def _own(key: str, where: str):
    """The key of a training run, unless the comparison gives it itself."""
    if key == "tower":
        raise LlavaError(f"{where}: tower: each entry of towers names its own, expected none here")
    found = find_key(key, where)
    if found.name in _OWN:
        raise LlavaError(f"{where}: {key}: {_OWN[found.name]}, expected none here")
    return found


def _evaluation_values(content, recipe: Recipe, where: str) -> Values:
    kinds, found = {one.name: one.kind for one in recipe.evaluations}, {}
    for word, value in _mapping(content, where).items():
        part, _, key = str(word).partition(".")
        if part not in kinds or not key:
            raise LlavaError(f"{where}: found {word!r}, expected EVALUATION.key with an evaluation of {_or(kinds)}")
        check_argument(kinds[part], key, where)
        found[part, key.replace("-", "_")] = value
    return found


def _or(names) -> str:
    return " or ".join(names)


def _mapping(content, where: str) -> dict:
    if content is not None and not isinstance(content, dict):
        raise LlavaError(f"{where} is {content!r}, expected a mapping of keys")
    return content or {}


def given_values(recipe: Recipe, given: list[str]) -> Values:
    """The values of the command line's `--key value` and `--PART.key value` words.

    Raises:
        LlavaError: a word that is no key's, or a key or part that there is not.
    """
    parts: dict[str | None, list[str]] = {}
    part = None
    for number, word in enumerate(given):
        if word.startswith("--") and len(word) > 2:
            name, equals, text = word[2:].partition("=")
            part, dot, key = name.rpartition(".")
            part = part if dot else None
            word = f"--{key}{equals}{text}"
        elif number == 0:
            raise LlavaError(f"command line: {word!r} is neither a --key nor a tower after --only")
        parts.setdefault(part, []).append(word)
    found: Values = {}
    kinds = {one.name: one.kind for one in recipe.evaluations}
    for part, rest in parts.items():
        if part is not None and part not in recipe.names:
            raise LlavaError(f"command line: --{part}.: {recipe.path} has no such part, expected {_or(recipe.names)}")
        if part in kinds:
            found |= _given_to_evaluation(part, kinds[part], rest)
            continue
        line = parse_command_line(rest)
        if line.config or line.tower:
            raise LlavaError("command line: the comparison's towers and recipe name the files, expected keys alone")
        for key, value in line.values.items():
            _own(key, "command line")
            found[part, key] = value
    return found


def _given_to_evaluation(part: str, kind: str, given: list[str]) -> Values:
    found: Values = {}
    for word in given:
        if word.startswith("--"):
            key, equals, text = word[2:].partition("=")
            check_argument(kind, key, "command line")
            key = key.replace("-", "_")
            found[part, key] = text if equals else True
        else:
            before = found[part, key]
            found[part, key] = word if before is True else [*(before if isinstance(before, list) else [before]), word]
    return found


def _validation(content, where: str) -> Validation:
    content = _mapping(content, f"{where}: validation")
    _check_keys(content, ("share", "seed"), f"{where}: validation")
    share, seed = content.get("share", 0.1), content.get("seed", 0)
    if not _positive(share) or share >= 1:
        raise LlavaError(f"{where}: validation: share is {share!r}, expected a number between 0 and 1")
    if type(seed) is not int:
        raise LlavaError(f"{where}: validation: seed is {seed!r}, expected a whole number")
    return Validation(float(share), seed)


def _groups(content, recipe: Recipe, where: str) -> dict[str, tuple[str, ...]]:
    known, found = measured(recipe), {}
    for group, members in _mapping(content, f"{where}: groups").items():
        if not isinstance(members, list) or not members:
            raise LlavaError(f"{where}: groups: {group} is {members!r}, expected a list of evaluations or tasks")
        for member in members:
            if member not in known:
                raise LlavaError(f"{where}: groups: {group}: unknown {member!r}, expected some of {', '.join(known)}")
        found[str(group)] = tuple(members)
    return found


def _check_rates(comparison: Comparison) -> None:
    """A learning rate is either chosen or set."""
    stage = comparison.learning_rate_stage
    for entry in comparison.entries:
        values = comparison.values_of(entry)
        if entry.learning_rates and ((stage, "learning_rate") in values or (None, "learning_rate") in values):
            raise LlavaError(
                f"{comparison.path}: towers: {entry.name}: learning_rates and learning_rate of {stage} are both given, "
                "expected one of them"
            )


def _check_questions(comparison: Comparison) -> None:
    """All entries are asked the same questions."""
    for one in comparison.recipe.evaluations:
        for key in ("data_path", "image_folder", "limit"):
            values = {e.name: comparison.values_of(e).get((one.name, key)) for e in comparison.entries}
            if len(set(map(str, values.values()))) > 1:
                listed = ", ".join(f"{name} {value}" for name, value in values.items())
                raise LlavaError(
                    f"{comparison.path}: towers: {one.name}.{key} differs: {listed}; expected the same questions for all"
                )
