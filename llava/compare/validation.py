"""Learning rates are chosen on images that were kept out of training, never on the held-out questions.

A share of the training images, the same ones in every stage, is taken out of all data files; the records of the last
stage that show these images, and no others, are the validation questions.
"""

import hashlib
import json
from pathlib import Path

from llava.compare.comparison import Comparison
from llava.compare.plan import Run, plan_runs
from llava.compare.record import read_json
from llava.errors import LlavaError
from llava.train.checkpoints import write_json

FOLDER, FILE = "validation", "validation.json"


def is_held(name: str, share: float, seed: int) -> bool:
    """Whether an image of this name is one of the validation images: by a hash, so that no other image matters."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def split(comparison: Comparison, out: Path) -> dict[str, str]:
    """Write `validation/STAGE.json` without the validation images, and `validation/validation.json` of them alone.

    Returns:
        {stage: its data file}.

    Raises:
        LlavaError: a data file that cannot be read, or no record on either side.
    """
    from llava.config import resolve

    folder, found, held = out / FOLDER, {}, []
    folder.mkdir(parents=True, exist_ok=True)
    share, seed = comparison.validation.share, comparison.validation.seed
    runs = plan_runs(comparison, Path("plan"))
    firsts = {run.entry.name: run for run in reversed(runs)}
    for number, plan in enumerate(runs[0].stages):
        run = resolve(plan.check_argv)
        for name, other in firsts.items():
            _check_same(comparison, plan, other.stages[number], name)
        path, held, count = _split_stage(run, plan.stage.name, folder, share, seed)
        if not count:
            raise LlavaError(
                f"{comparison.path}: validation: no record of {run['data_path']} is left to train on, expected a "
                "smaller share"
            )
        found[plan.stage.name] = path
    if not held:
        raise LlavaError(
            f"{comparison.path}: validation: none of the images of {run['data_path']} is in a share of {share:g}, "
            "expected a larger share, or other images"
        )
    _write(folder / FILE, held)
    return found


def _check_same(comparison: Comparison, plan, other, name: str) -> None:
    mine, theirs = plan.settings.get("data_path"), other.settings.get("data_path")
    if mine != theirs:
        raise LlavaError(
            f"{comparison.path}: towers: {name}: {plan.stage.name} has its own data_path {theirs}, expected {mine} for "
            "all, as learning rates are chosen on images kept out of it"
        )


def _split_stage(run, stage: str, folder: Path, share: float, seed: int) -> tuple[str, list[dict], int]:
    """(data file, validation records, records that are left) of one stage; a mixture stays one, with its folders."""
    from llava.data.records import load_records

    records, held, entries, count = load_records(run["data_path"], run["data_seed"] or run["seed"] or 0), [], [], 0
    for number, (part, own) in enumerate(records.by_part()):
        kept = []
        for record in own:
            names = _names(record)
            chosen = [name for name in names if is_held(name, share, seed)]
            if not chosen:
                kept.append(record)
            elif len(chosen) == len(names) and record.get("image"):
                held.append(_with_folder(record, part.image_folder))
        own_folders = {key: getattr(part, key) for key in ("image_folder", "video_folder") if getattr(part, key)}
        entries.append((number, kept, own_folders))
        count += len(kept)
    if all(not folders for _, _, folders in entries):
        _write(folder / f"{stage}.json", [record for _, kept, _ in entries for record in kept])
        return str(folder / f"{stage}.json"), held, count
    lines = ["datasets:"]
    for number, kept, folders in entries:
        path = folder / f"{stage}_{number}.json"
        _write(path, kept)
        item = {"json_path": str(path.resolve()), "sampling_strategy": "all", **folders}
        lines.append(f"  - {json.dumps(item)}")  # JSON is YAML
    mixture = folder / f"{stage}.yaml"
    mixture.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(mixture), held, count


def _names(record: dict) -> list[str]:
    from llava.data.paths import media_of

    try:
        return media_of(record)[1]
    except LlavaError:  # its own fault, which training tells
        return []


def _with_folder(record: dict, folder: str | None) -> dict:
    """A record of a part of a mixture whose images have a folder of their own."""
    if not folder:
        return record
    image = record["image"]
    paths = [str(Path(folder).resolve() / name) for name in (image if isinstance(image, list) else [image])]
    return record | {"image": paths if isinstance(image, list) else paths[0]}


def _write(path: Path, records: list[dict]) -> None:
    """Write records, unless they are there already: the file's age is looked at to tell whether it is the same."""
    text = json.dumps(records, ensure_ascii=False)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        beside = path.with_name(f".{path.name}.tmp")
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)


# --- the choice -------------------------------------------------------------------------------------------------------


def command(run: Run, out: Path) -> list[str]:
    """The command that asks a trained run the validation questions."""
    import sys

    from llava.config import resolve
    from llava.config.own_tower import own_classes

    settings = resolve(run.stages[-1].check_argv)
    words = [sys.executable, "-m", "llava.eval.exact_match", "--model-path", str(run.model)]
    words += ["--data-path", str(out / FOLDER / FILE), "--output", str(run.folder / FILE)]
    words += ["--image-folder", settings["image_folder"]] if settings["image_folder"] else []
    words += ["--allow-absolute-paths"] if _is_mixture(settings) else []
    own = own_classes(*settings.named_towers)[:1]
    return [*words, *(f"--vision_tower={name}" for name in own)]


def _is_mixture(settings) -> bool:
    return str(settings["data_path"]).endswith((".yaml", ".yml"))


def score_of(run: Run) -> float | None:
    """The run's exact match on the validation questions; None: it has not been asked."""
    score = read_json(run.folder / FILE).get("exact_match")
    return float(score) if isinstance(score, (int, float)) else None


def choose(runs: list[Run]) -> dict:
    """The learning rate with the best mean over seeds, of one entry's runs; of equal ones the smaller.

    A rate counts where all its seeds have been asked.

    Returns:
        {"learning_rate": the chosen one or None, "means": {rate: mean or None}}.
    """
    rates = sorted({run.learning_rate for run in runs})
    means: dict[float, float | None] = {}
    for rate in rates:
        scores = [score_of(run) for run in runs if run.learning_rate == rate]
        means[rate] = None if None in scores else sum(scores) / len(scores)
    known = [rate for rate in rates if means[rate] is not None]
    best = max(known, key=lambda rate: (means[rate], -rate)) if known else None
    return {"learning_rate": best, "means": {f"{rate:g}": mean for rate, mean in means.items()}}


def write_choice(out: Path, name: str, choice: dict) -> None:
    folder = out / "runs" / name
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "learning_rate.json", choice)


def read_choice(out: Path, name: str) -> float | None:
    return read_json(out / "runs" / name / "learning_rate.json").get("learning_rate")
