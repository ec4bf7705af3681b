"""How a recipe's model is evaluated, in programs of their own, and what is kept and shown of it."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from llava.errors import LlavaError
from llava.train.recipe_file import Evaluation, Recipe
from llava.train.recipe_settings import StagePlan

ROOT = Path(__file__).parents[2]


def command(one: Evaluation, args: dict, last: StagePlan, file: Path) -> tuple[list[str], dict[str, str]]:
    """(program with its arguments, what its environment has beside this one's) of an evaluation.

    Args:
        args: those of the command line, which stand above the recipe's.
        last: the stage whose model is evaluated.
        file: where an exact match is written; lmms-eval's own files come into a folder beside it.
    """
    from llava.config.own_tower import own_classes
    from llava.config.resolve import resolve

    run = resolve(last.argv)
    own = own_classes(*run.named_towers)[:1]  # a checkpoint's word alone runs no code
    base = run["model_name_or_path"] if _needs_base(last.folder, run) else None
    args = one.args | args
    if one.kind == "lmms_eval":
        parts = [str(last.folder), *([f"model_base={base}"] if base else []), *(f"vision_tower={name}" for name in own)]
        model = ",".join(parts)
        words = ["bash", str(ROOT / "scripts/eval.sh"), model, ",".join(one.tasks), *_options(args, "_")]
        logged = ["--log_samples"] if args.get("log_samples", True) is True else []
        shutil.rmtree(_lmms_folder(file), ignore_errors=True)
        return [*words, *logged, "--output_path", str(_lmms_folder(file))], {"PYTHON": os.environ.get("PYTHON", "")}
    given = {"data_path": one.data_path, "image_folder": one.image_folder, "blank_images": one.blank_images} | args
    given |= {"limit": os.environ["EVAL_LIMIT"]} if os.environ.get("EVAL_LIMIT") and "limit" not in given else {}
    given = ({"vision_tower": own[0]} if own else {}) | ({"model_base": base} if base else {}) | given
    words = [sys.executable, "-m", "llava.eval.exact_match", "--model-path", str(last.folder)]
    return [*words, *_options(given, "-"), "--output", str(file)], {}


def _options(args: dict, dash: str) -> list[str]:
    """{name: value} as options: true alone, false, null and what lmms-eval gets anyway not at all, a list as several
    words."""
    words = []
    for key, value in args.items():
        if value is None or value is False or str(value).lower() == "false" or key == "log_samples":
            continue
        words.append(f"--{key.replace('_', dash)}")
        if isinstance(value, (list, tuple)):
            words += [str(item) for item in value]
        elif value is not True and str(value).lower() != "true":
            words.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return words


def _needs_base(folder: Path, run) -> bool:
    """Whether a stage has left an adapter, or a projector alone, that is read over the model it started from."""
    return bool(run["lora_enable"]) or not any(folder.glob("model*.safetensors"))


def _lmms_folder(file: Path) -> Path:
    return file.with_name(f"lmms_{file.stem}")


def keep(one: Evaluation, last: StagePlan, file: Path) -> str | None:
    """Put what an evaluation has written where others look for it; what it found, in a line."""
    if one.kind == "lmms_eval":
        content = read_lmms(_lmms_folder(file))
        file.write_text(json.dumps(content, indent=1), encoding="utf-8")
        return ", ".join(f"{task}: {row['metric']} {row['score']:.4g}" for task, row in content["tasks"].items())
    if _is_ours(last.folder):
        shutil.copyfile(file, last.folder / "eval.json")
    return None


def _is_ours(folder: Path) -> bool:
    """Whether a stage's folder is this recipe's own, and not a link to another's."""
    return not folder.is_symlink()


def read_lmms(folder: Path) -> dict:
    """What lmms-eval has written: {"kind", "tasks": {TASK: {"metric", "score", "n"}},
    "samples": {TASK: [{"id", "image", "score"}]}}, samples of those tasks whose questions have a score each.

    Raises:
        LlavaError: there are no results.
    """
    found = sorted(folder.rglob("*results.json"))
    if not found:
        raise LlavaError(f"{folder}: found no results.json, expected what lmms-eval writes")
    content = json.loads(found[-1].read_text(encoding="utf-8"))
    counts = content.get("n-samples", {})
    tasks = {}
    for task, values in content["results"].items():
        metric = next((key for key, value in values.items() if _is_score(key, value)), None)
        if metric is not None:
            n = counts.get(task, {}).get("effective")
            tasks[task] = {"metric": metric.partition(",")[0], "score": float(values[metric]), "n": n}
    samples = {}
    for path in sorted(folder.rglob("*samples_*.jsonl")):
        task = path.stem.partition("samples_")[2]
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        scores = [row.get(tasks[task]["metric"]) for row in rows] if task in tasks else []
        if scores and all(isinstance(score, (bool, int, float)) for score in scores):
            samples[task] = [
                {"id": str(row.get("doc_id")), "image": _image_of(row.get("doc")), "score": float(score)}
                for row, score in zip(rows, scores, strict=True)
            ]
    return {"kind": "lmms_eval", "tasks": tasks} | ({"samples": samples} if samples else {})


def _image_of(document) -> str | None:
    """The name of a question's image, where its task has one: questions on one image are not independent."""
    named = document if isinstance(document, dict) else {}
    found = (named.get(key) for key in ("image_id", "imageId", "image_path", "img_id", "image_name", "image"))
    return next((str(name) for name in found if isinstance(name, (str, int)) and name != ""), None)


def _is_score(key: str, value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and "stderr" not in key and key != "alias"


def draws_report(recipe: Recipe) -> bool:
    return recipe.report and any(one.kind == "exact_match" for one in recipe.evaluations)


def draw_report(recipe: Recipe, plans: list[StagePlan], out: Path) -> None:
    """Draw `report.png` of the first evaluation that has questions, and the loss curves; also beside the model."""
    from llava.eval.report import main

    asked = [out / f"eval_{one.name}.json" for one in recipe.evaluations if one.kind == "exact_match"]
    states = [plan.folder / "trainer_state.json" for plan in plans]
    stages = [word for path in states if path.is_file() for word in ("--stage", str(path))]
    main(["--eval-json", str(asked[0]), "--output", str(out / "report.png"), *stages])
    if _is_ours(plans[-1].folder):
        shutil.copyfile(out / "report.png", plans[-1].folder / "report.png")


def summary(recipe: Recipe, out: Path) -> Iterator[str]:
    """The lines that say it all."""
    several = sum(one.kind == "exact_match" for one in recipe.evaluations) > 1
    for one in sorted(recipe.evaluations, key=lambda one: one.kind == "exact_match"):
        content = json.loads((out / f"eval_{one.name}.json").read_text(encoding="utf-8"))
        if one.kind == "exact_match":
            title = f"{one.name}: exact match" if several else "held-out exact match"
            yield f"{title}: {content['exact_match']:.3f} (n={content['n']})"
        else:
            for task, row in content["tasks"].items():
                yield f"{task}: {row['metric']} {row['score']:.4g}"
