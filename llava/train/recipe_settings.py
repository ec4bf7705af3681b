"""What a stage of a recipe is trained with: its command line, and what tells one set of settings from another."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.config.commandline import parse_command_line
from llava.config.files import find_file, read_yaml
from llava.errors import LlavaError
from llava.train.recipe_file import Overrides, Recipe, Stage, flags

# keys that change nothing about the model that comes out
INDIFFERENT = {
    *("output_dir", "overwrite_output_dir", "report_to", "run_name", "logging_dir", "logging_steps", "disable_tqdm"),
    *("save_strategy", "save_steps", "save_total_limit", "save_grace_seconds", "verify_checkpoints", "verbose_logging"),
    *("dataloader_num_workers", "peak_tflops", "loss_spike_factor", "log_level", "project", "trackio_space_id"),
}


@dataclass(frozen=True)
class StagePlan:
    """One stage in its folder.

    Attributes:
        argv: its command line, as `llava.config.resolve` takes it.
        check_argv: the same before an earlier stage has left its model: from what that starts from.
        settings: {key: value} of all that is given, with what the stages before were given under `from`.
    """

    stage: Stage
    folder: Path
    argv: list[str]
    check_argv: list[str]
    settings: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        return digest(self.settings)

    def changed(self, before: dict | None) -> str:
        """Which settings are others than those of an earlier start, in words; "" if none, or nothing is known."""
        if before is None:
            return ""
        found = []
        for key in sorted({*before, *self.settings}):
            was, now = before.get(key), self.settings.get(key)
            if was != now:
                found.append(f"a stage before: {key}" if key == "from" else f"{key}: {_said(was)}, now {_said(now)}")
        return "; ".join(found)


def _said(value) -> str:
    return "not given" if value is None else value if isinstance(value, str) else json.dumps(value)


def digest(content) -> str:
    """A hash of plain values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def plan_stages(recipe: Recipe, out: Path, overrides: Overrides) -> list[StagePlan]:
    """The stages of a recipe in its folder, in their order.

    Raises:
        LlavaError: a key that there is not, a value that is not the key's, or a tower YAML that is not there.
    """
    plans: dict[str, StagePlan] = {}
    for stage in recipe.stages:
        given = [*flags(stage.set), *overrides.stage(stage.name)]
        folder, before = out / stage.name, plans.get(stage.source)
        passed, instead = ([], []) if before is None else _passed(stage, before)
        argv = [stage.config, *given, *passed, "--output_dir", str(folder)]
        check = [stage.config, *given, *instead, "--output_dir", str(folder)]
        settings = _settings(stage.config, given)
        if before is not None:
            settings = {key: value for key, value in settings.items() if key not in _PASSED[stage.passes]}
            settings["from"] = {"passes": stage.passes, "settings": digest(before.settings)}
        plans[stage.name] = StagePlan(stage, folder, argv, check, settings)
    return list(plans.values())


_PASSED = {
    "model": ("model_name_or_path",),
    "projector": ("pretrain_mm_mlp_adapter",),
    "lora": ("model_name_or_path", "lora_weight_path"),
}


def _passed(stage: Stage, before: StagePlan) -> tuple[list[str], list[str]]:
    """Flags with which a stage takes up what another has left, and flags that stand for them before that is there."""
    base = ["--model_name_or_path", _value(before.check_argv, "model_name_or_path")]
    if stage.passes == "projector":
        projector = ["--pretrain_mm_mlp_adapter", str(before.folder)]
        return projector, projector
    if stage.passes == "lora":
        return [*base, "--lora_weight_path", str(before.folder)], base
    return ["--model_name_or_path", str(before.folder)], base


def _value(argv: list[str], key: str) -> str:
    """What a command line gives a key, itself or by its YAML."""
    line = parse_command_line(argv)
    value = line.values.get(key)
    value = read_yaml(line.config).get(key) if value is None else value
    if not isinstance(value, str):
        raise LlavaError(f"{line.config}: {key}: not given, expected the model that the stage starts from")
    return value


def _settings(config: str, given: list[str]) -> dict[str, Any]:
    """{key: value} of the tower's YAML, below the stage's YAML, below the command line; without indifferent keys."""
    line = parse_command_line([config, *given])
    content = read_yaml(config)
    tower = line.tower or content.pop("tower", None)
    content.pop("tower", None)
    values = {}
    if tower is not None:
        found = find_file(tower, config)
        if found is None:
            where = "command line" if line.tower else config
            raise LlavaError(f"{where}: tower config {tower} does not exist")
        values |= read_yaml(found)
    values |= content | line.values
    return {key: value for key, value in values.items() if key not in INDIFFERENT}
