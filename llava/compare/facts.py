"""What is the same in all runs of a comparison, what differs, and what must match, told before anything is trained."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from llava.compare.comparison import Comparison
from llava.compare.plan import Run, data_hash, file_hash
from llava.errors import LlavaError, OutOfReach
from llava.train.recipe_settings import INDIFFERENT, digest

_PICTURES = 32  # of the training data, for tokens and pixels per image
# {what it is called: keys} of what is told where it is the same everywhere
_FIXED = {
    "projector": ("mm_projector_type",),
    "steps": ("max_steps", "num_train_epochs"),
    "samples per device and step": ("per_device_train_batch_size", "gradient_accumulation_steps"),
    "images": ("image_aspect_ratio", "mm_patch_merge_type", "image_grid_pinpoints", "min_pixels", "max_pixels"),
    "longest sequence": ("model_max_length",),
    "trained parts": ("mm_tunable_parts",),
    "learning rate": ("learning_rate", "mm_vision_tower_lr", "lr_scheduler_type", "warmup_steps"),
    "precision": ("bf16", "fp16", "tf32"),
    "order of data": ("data_seed", "train_sampling_strategy", "group_by_modality_length"),
}
_ALWAYS = ("mm_projector_type", "image_aspect_ratio", "learning_rate")  # told where they are left at their default, too
_SAID = {  # keys in the words of the table of differences
    "vision_tower": "encoder",
    "mm_vision_tower_type": "encoder type",
    "mm_projector_type": "projector",
    "mm_tunable_parts": "trained parts",
    "learning_rate": "learning rate",
}
# what follows from the runs' places, or is told in other rows
_LEFT_OUT = {*INDIFFERENT, "seed", "model_name_or_path", "pretrain_mm_mlp_adapter", "lora_weight_path", "data_path"}


@dataclass
class Facts:
    """Attributes:
    fixed: {what: value} that is the same in all runs, with hashes of the files; `hash` is of all of it.
    differences: [{"what", "values": {tower: value}}].
    notices: what could not be looked at here.
    """

    fixed: dict[str, str] = field(default_factory=dict)
    differences: list[dict] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    @property
    def hash(self) -> str:
        return digest(self.fixed)


def check(comparison: Comparison, runs: list[Run]) -> Facts:
    """Refuse what a run would be refused for, an evaluation without answers, and entries that do not match.

    What is not on this machine yet is left out, and told in `notices`.

    Raises:
        LlavaError: names the entry and the stage.
    """
    for one in comparison.recipe.evaluations:
        if one.kind == "exact_match":
            check_answers(one.name, data_of(comparison, one))
    facts, firsts = Facts(), {run.entry.name: run for run in reversed(runs)}
    firsts = {entry.name: firsts[entry.name] for entry in comparison.entries}
    resolved = {name: _resolved(comparison, run, facts) for name, run in firsts.items()}
    pictures = {name: picture_facts(list(stages.values())[-1]) for name, stages in resolved.items()}
    _tell(comparison, resolved, pictures, facts)
    check_match(comparison, resolved, pictures, facts)
    return facts


def data_of(comparison: Comparison, evaluation) -> str:
    """The evaluation's data file, or the one that the command line names."""
    given = comparison.given.get((evaluation.name, "data_path"))
    return str(given or comparison.values.get((evaluation.name, "data_path"), evaluation.data_path))


def check_answers(name: str, path: str) -> None:
    """Refuse an evaluation whose file has a record without an answer.

    Raises:
        LlavaError: names the file and the record.
    """
    from llava.data.records import load_records

    records = load_records(path)
    if not records:
        raise LlavaError(f"evaluation {name}: {path}: found no record, expected questions with answers")
    for row, record in enumerate(records):
        turns = record.get("conversations") or record.get("messages") or ()
        turns = [turn for turn in turns if isinstance(turn, dict)]
        texts = [turn.get("value", turn.get("content")) for turn in turns if turn.get("from") == "gpt"]
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise LlavaError(
                f"evaluation {name}: {records.describe(row)}: found a question without an answer, expected a gpt turn "
                "with the right one"
            )


def _resolved(comparison: Comparison, run: Run, facts: Facts) -> dict:
    """{stage: resolved run} of an entry, each checked as a run of it would be."""
    from llava.config import resolve
    from llava.train.settings import check_settings

    found = {}
    for plan in run.stages:
        where = f"{comparison.path}: towers: {run.entry.name}: {plan.stage.name}"
        try:
            found[plan.stage.name] = resolved = resolve(plan.check_argv)
            check_settings(resolved)
        except LlavaError as error:
            raise LlavaError(f"{where}: {error}") from None
        told = [notice for notice in resolved.notices if "not on this machine" in notice and run.name not in notice]
        said = [f"{plan.stage.name}: {notice}" for notice in told]  # what a stage before will leave is no news
        facts.notices += [line for line in said if line not in facts.notices]
    return found


def picture_facts(run) -> dict[str, float | int] | None:
    """What becomes of the training data's pictures in a resolved run, found without weights.

    Returns:
        {"tokens per image" (of the language model), "pixels per image" (that the encoder sees), "pictures", "tower
        parameters" (where the model has a tower of its own)}; means over the first pictures. None: not known here.
    """
    from llava.families import family_of
    from llava.images.reading import load_image
    from llava.model.visual_merge import VisualTokenCounter

    try:
        family = family_of(run["model_name_or_path"], download=False)
        geometry = family.geometry(run["model_name_or_path"], run)
        count = VisualTokenCounter(geometry.rules, geometry.token_grid, geometry.patch)
        tokens, pixels = [], []
        for path in _pictures(run):
            photo = load_image(path)
            view = geometry.view(photo)
            tokens.append(count(view.pixels.shape, photo.size) if view.tokens is None else view.tokens)
            pixels.append(view.pixels.shape[0] * view.pixels.shape[-1] * view.pixels.shape[-2])
        parameters = _parameters(run)
    except (OutOfReach, LlavaError):  # what is wrong with the settings has been told by then
        return None
    if not tokens:
        return None
    facts = {"tokens per image": sum(tokens) / len(tokens), "pixels per image": sum(pixels) / len(pixels)}
    return facts | {"pictures": len(tokens)} | ({} if parameters is None else {"tower parameters": parameters})


def _pictures(run) -> list[str]:
    """Paths of the first pictures of a run's training data."""
    from llava.data.paths import media_of, resolve_path
    from llava.data.records import data_files, load_records

    files = data_files(run["data_path"]) if run["data_path"] else []
    if not files or not all(map(os.path.isfile, files)):
        return []
    found, records = [], load_records(run["data_path"])
    for number, record in enumerate(records):
        kind, names = media_of(record)
        if kind == "image":
            folder = records.part(number).image_folder or run["image_folder"]
            found += [resolve_path(folder, name, run["allow_absolute_paths"]) for name in names]
        if len(found) >= _PICTURES:
            break
    return list(filter(os.path.isfile, found[:_PICTURES]))


def _parameters(run) -> int | None:
    from llava.families.llava_geometry import run_config
    from llava.families.llava_layout import empty_tower

    if not run["vision_tower"]:
        return None
    return sum(parameter.numel() for parameter in empty_tower(run_config(run)).parameters())


# --- what is told -----------------------------------------------------------------------------------------------------


def _tell(comparison: Comparison, resolved: dict, pictures: dict, facts: Facts) -> None:
    names = list(resolved)
    stages = [stage.name for stage in comparison.recipe.stages]
    facts.fixed |= {"seeds": ", ".join(map(str, comparison.seeds)), "recipe": comparison.recipe.name}
    for stage in stages:
        runs = [resolved[name][stage] for name in names]
        _tell_same(f"{stage}: data", [_data(run) for run in runs], names, facts)
        if comparison.recipe.stage(stage).source is None:
            models = [Path(str(run["model_name_or_path"])).name for run in runs]
            _tell_same("language model", models, names, facts)
        for what, keys in _FIXED.items():
            texts = [_text({key: _value(run, key) for key in keys if _given(run, key)}) for run in runs]
            if len(set(texts)) == 1 and texts[0]:
                facts.fixed[f"{stage}: {what}"] = texts[0]
    for one in comparison.recipe.evaluations:
        path = data_of(comparison, one) if one.kind == "exact_match" else None
        facts.fixed[f"evaluation {one.name}"] = f"{path} ({file_hash(path)})" if path else ", ".join(one.tasks)
    facts.differences += _differing_keys(resolved, stages)
    for what in ("tokens per image", "pixels per image", "tower parameters"):
        values = {name: (pictures[name] or {}).get(what) for name in names}
        if len(set(values.values())) > 1:
            facts.differences.append({"what": what, "values": values})
    facts.differences += _differing_evaluations(comparison)


def _tell_same(what: str, values: list[str], names: list[str], facts: Facts) -> None:
    if len(set(values)) == 1:
        facts.fixed[what] = values[0]
    else:
        facts.differences.append({"what": what, "values": dict(zip(names, values, strict=True))})


def _data(run) -> str:
    path = str(run["data_path"])
    return f"{path} ({data_hash(path) or 'not here'})"


def _given(run, key: str) -> bool:
    from llava.config.resolve import DEFAULT

    if key == "num_train_epochs" and (run["max_steps"] or 0) > 0:
        return False
    return _value(run, key) is not None and (key in _ALWAYS or run.source(key) != DEFAULT)


def _text(values: dict) -> str:
    """Settings in a line: with one of them its value, else `key value, key value`."""
    if len(values) == 1:
        return str(next(iter(values.values())))
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _differing_keys(resolved: dict, stages: list[str]) -> list[dict]:
    """The keys whose values are not the same for all towers, once where they differ alike in all stages."""
    rows: dict[tuple, list[str]] = {}
    keys = dict.fromkeys(key for by_stage in resolved.values() for run in by_stage.values() for key in run.settings)
    for key in [*_SAID, *(key for key in keys if key not in _SAID)]:
        for stage in stages:
            values = {name: _value(by_stage[stage], key) for name, by_stage in resolved.items()}
            if key not in _LEFT_OUT and len(set(map(str, values.values()))) > 1:
                rows.setdefault((key, tuple(values.items())), []).append(stage)
    found = []
    for (key, values), where in rows.items():
        what = _SAID.get(key, key)
        what = what if len(where) == len(stages) else f"{what} ({', '.join(where)})"
        found.append({"what": what, "values": dict(values)})
    return found


def _value(run, key: str):
    """A key's value in a run; None where the run has no use for it."""
    unused = (
        (key.startswith("compression_") and not run["use_token_compression"])
        or (key == "image_grid_pinpoints" and "anyres" not in str(run["image_aspect_ratio"]))
        or (key in ("min_pixels", "max_pixels") and run["vision_tower"] and run["image_aspect_ratio"] != "native")
    )
    return None if unused else _plain(run[key])


def _plain(value):
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _differing_evaluations(comparison: Comparison) -> list[dict]:
    """Arguments of evaluations that are not the same for all entries."""
    kinds = {one.name for one in comparison.recipe.evaluations}
    all_values = {entry.name: comparison.values_of(entry) for entry in comparison.entries}
    asked = dict.fromkeys(key for values in all_values.values() for key in values if key[0] in kinds)
    found = []
    for part, key in asked:
        values = {name: _plain(values.get((part, key))) for name, values in all_values.items()}
        if len(set(map(str, values.values()))) > 1:
            found.append({"what": f"{part}: {key}", "values": values})
    return found


# --- what must match --------------------------------------------------------------------------------------------------


def check_match(comparison: Comparison, resolved: dict, pictures: dict, facts: Facts) -> None:
    """Refuse entries that are not equal in what `match` names.

    Raises:
        LlavaError: with the value of each entry.
    """
    if comparison.match == "none":
        return
    if comparison.match == "samples":
        what = "training samples"
        values = {name: _samples(stages) for name, stages in resolved.items()}
    else:
        what = f"{comparison.match} per image"
        values = {name: (found or {}).get(what) for name, found in pictures.items()}
    if None in values.values():
        lacking = ", ".join(name for name, value in values.items() if value is None)
        facts.notices.append(f"match {comparison.match}: {what} of {lacking} cannot be told here, so it is not checked")
    known = {name: value for name, value in values.items() if value is not None}
    if len({_rounded(value) for value in known.values()}) > 1:
        listed = ", ".join(f"{name} {_rounded(value)}" for name, value in known.items())
        raise LlavaError(
            f"{comparison.path}: match is {comparison.match}, but {what} differ: {listed}; expected the same number "
            "for all towers, or match: none"
        )
    if known:
        facts.fixed[what] = str(_rounded(next(iter(known.values()))))


def _rounded(value):
    return value if isinstance(value, str) else int(value) if float(value).is_integer() else round(float(value), 1)


def _samples(stages: dict) -> str:
    """Of each stage, on one device: steps x samples of a step, or epochs x the data."""
    found = []
    for stage, run in stages.items():
        steps, batch = run["max_steps"], run["per_device_train_batch_size"] * run["gradient_accumulation_steps"]
        if steps is not None and steps > 0:
            found.append(f"{stage} {steps * batch}")
        else:
            found.append(f"{stage} {run['num_train_epochs']} x {_data(run)}")
    return "; ".join(found)
