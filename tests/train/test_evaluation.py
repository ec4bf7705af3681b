"""Evaluation while a run trains: its numbers against the checkpoint of the same step, and a training that it leaves as
it is. Two processes: test_distributed.py."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava.eval import exact_match
from llava.families import FAMILIES
from tests import tiny
from tests.support.families import FamilyKit
from tests.train.test_distributed import evaluations

ANSWERS = ("Red.", "Blue.")


def questions(folder: Path, kinds: str) -> Path:
    """Records of `tiny.records` with short answers, each of a kind of its own: by its picture, or by its text."""
    path = Path(tiny.records(folder, kinds))
    records = json.loads(path.read_text())
    for number, record in enumerate(records):
        turns = record["conversations"]
        turns[0]["value"] += f" {number % 2}"
        turns[1]["value"] = ANSWERS[number % 2]
        record["kind"] = "seen" if "image" in record else "read"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    return questions(tmp_path_factory.mktemp("held_out"), "iitmt")


def evaluated(held_out: Path, **changes) -> dict:
    keys = {"eval_strategy": "steps", "eval_steps": 1, "eval_data_path": held_out, "eval_exact_match": True}
    keys |= {"eval_image_folder": held_out.parent / "images", "per_device_eval_batch_size": 2}
    return keys | changes


def mean_loss(folder: Path, family_name: str, held_out: Path) -> float:
    """Over the supervised tokens, of one record after the other, by the logits of the saved model."""
    from llava.data import load_records
    from llava.data.dataset import LazySupervisedDataset, SampleArgs
    from llava.families import get_family

    family = get_family(family_name)
    loaded = family.load(str(folder), device="cpu", dtype="float32")
    options = (
        getattr(loaded.model.config, "image_aspect_ratio", None),
        getattr(loaded.model.config, "image_grid_pinpoints", 0),
    )
    args = SampleArgs(str(held_out.parent / "images"), image_aspect_ratio=options[0], image_grid_pinpoints=options[1])
    data = LazySupervisedDataset(load_records(str(held_out)), family, loaded, args)
    total, count = 0.0, 0
    for number in range(len(data)):
        batch = family.collate([data[number]], loaded, args)
        labels = int((batch["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            whole, alone = loaded.model(**batch), loaded.model(**batch, num_items_in_batch=torch.tensor(2.0))
        assert alone.logits is None and float(alone.loss) * 2 == pytest.approx(float(whole.loss) * labels, rel=1e-5)
        total, count = total + float(whole.loss) * labels, count + labels
    return total / count


@pytest.mark.parametrize("name", FAMILIES)
def test_the_numbers_are_those_of_the_checkpoint(name, held_out, tmp_path):
    """The loss by a direct sum, exact match by the command, both of what was saved at that step; the steps are those of
    a run without evaluation."""
    kit = FamilyKit(name, tmp_path / "kit")
    changes = dict(max_steps=2, save_strategy="steps", save_steps=2, learning_rate=2e-2)
    run = kit.run(tmp_path / "out", **evaluated(held_out, eval_blank_images=True, **changes))
    assert run.losses == kit.run(tmp_path / "plain", **changes).losses
    out, (_, found) = run.out, evaluations(run.out)
    checkpoint = out / "checkpoint-2"
    assert found["eval_loss"] == pytest.approx(mean_loss(checkpoint, name, held_out), abs=2e-5)
    words = ["--model-path", checkpoint, "--data-path", held_out, "--image-folder", held_out.parent / "images"]
    exact_match.main([*map(str, words), "--batch-size", "2", "--blank-images"])
    saved = json.loads((checkpoint / "eval.json").read_text())
    assert found["eval_exact_match"] == saved["exact_match"] and found["eval_n"] == saved["n"] == 5
    for kind, values in saved["by_kind"].items():
        assert found[f"eval_exact_match_{kind}"] == values["exact_match"]
    assert found["eval_blank_images_exact_match"] == saved["blank_images"]["exact_match"]


def test_right_answers_are_counted(kit, tmp_path):
    """A text model that has learned its two answers: the same number as the command's, and not 0."""
    data = questions(tmp_path / "data", "tttt")
    changes = dict(data_path=data, vision_tower=None, mm_tunable_parts="mm_language_model", image_aspect_ratio="square")
    changes |= dict(max_steps=30, learning_rate=2e-2, supervise="answers_only")
    out = kit.run(tmp_path / "out", None, **changes, **evaluated(data, eval_steps=15))
    first, last = evaluations(out)
    exact_match.main(["--model-path", str(out), "--data-path", str(data), "--image-folder", str(data.parent)])
    saved = json.loads((out / "eval.json").read_text())
    assert last["eval_exact_match"] == last["eval_exact_match_read"] == saved["exact_match"] > 0
    assert last["eval_loss"] < first["eval_loss"]


def test_batches_do_not_change_the_numbers(kit, tmp_path, held_out):
    flags = dict(max_steps=1, learning_rate=1e-2)
    (two,) = evaluations(kit.run(tmp_path / "two", "iitt", **flags, **evaluated(held_out)))
    for size, workers in ((1, 1), (5, 0)):
        changed = evaluated(held_out, per_device_eval_batch_size=size, dataloader_num_workers=workers)
        (other,) = evaluations(kit.run(tmp_path / f"by_{size}", "iitt", **flags, **changed))
        assert other == pytest.approx(two, abs=1e-6)
    limited = evaluated(held_out, eval_limit=2, eval_exact_match=False)
    (few,) = evaluations(kit.run(tmp_path / "few", "iitt", **flags, **limited))
    assert few["eval_loss"] != pytest.approx(two["eval_loss"], abs=1e-4) and "eval_exact_match" not in few
    assert (two["eval_n"], few["eval_n"]) == (5, 2)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_is_the_same_with_and_without(kit, tmp_path, held_out, workers):
    """Bit for bit, with dropout and a random order."""
    llm = tiny.llm(tmp_path / "llm", attention_dropout=0.3)
    lora = dict(lora_enable=True, lora_r=4, lora_dropout=0.3, gradient_checkpointing=True)
    flags = dict(model_name_or_path=llm, train_sampling_strategy="random", dataloader_num_workers=workers, **lora)
    flags |= dict(max_steps=4, mm_tunable_parts="mm_mlp_adapter,mm_language_model")  # more than one epoch
    plain = kit.run(tmp_path / "plain", **flags)
    keys = evaluated(held_out, eval_on_start=True, eval_exact_match=not workers, eval_max_new_tokens=3)
    seen = kit.run(tmp_path / "seen", **flags, **keys)
    assert len(evaluations(seen)) == 5
    assert tiny.history(plain) == tiny.history(seen)
    for name in ("adapter_model.safetensors", "non_lora_trainables.safetensors"):
        ours, theirs = load_file(plain / name), load_file(seen / name)
        assert all(value.equal(theirs[key]) for key, value in ours.items())
    wild = tiny.history(kit.run(tmp_path / "wild", **flags | dict(seed=1, max_steps=1)))
    assert wild[0]["loss"] != tiny.history(plain)[0]["loss"]  # it does draw


KEPT = {
    "whole": ({}, ["model"]),
    "projector": ({"mm_tunable_parts": "mm_mlp_adapter"}, ["mm_projector"]),
    "lora": (
        {"lora_enable": True, "lora_r": 4, "mm_tunable_parts": "mm_mlp_adapter,mm_language_model"},
        ["adapter_model", "non_lora_trainables"],
    ),
}


@pytest.mark.parametrize("kind", KEPT)
def test_the_best_checkpoint_is_kept(kit, tmp_path, held_out, kind, monkeypatch):
    """Of four, the second one by what was measured; the saved model is that one."""
    measured = iter([3.0, 1.0, 2.0, 4.0])
    monkeypatch.setattr("llava.train.evaluation.run_evaluation", lambda *args: {"eval_loss": next(measured)})
    changes, files = KEPT[kind]
    best = dict(load_best_model_at_end=True, metric_for_best_model="eval_loss", save_total_limit=2)
    saving = dict(save_strategy="steps", save_steps=1, max_steps=4, learning_rate=1e-2)
    out = kit.run(tmp_path / "out", **changes, **best, **saving, **evaluated(held_out, eval_exact_match=False))
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["best_metric"] == 1.0 and Path(state["best_model_checkpoint"]).name == "checkpoint-2"
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    for name in files:
        saved, kept, last = (
            load_file(folder / f"{name}.safetensors") for folder in (out, out / "checkpoint-2", out / "checkpoint-4")
        )
        assert all(value.equal(kept[key]) for key, value in saved.items())
        assert any(not value.equal(last[key]) for key, value in saved.items())


def test_exact_match_is_better_when_it_is_greater(kit, tmp_path, held_out):
    from llava.train.arguments import parse_args

    flags = kit.flags(tmp_path / "out", "iitt", **evaluated(held_out), metric_for_best_model="eval_exact_match")
    assert parse_args(flags)[2].greater_is_better
    flags = kit.flags(tmp_path / "out", "iitt", **evaluated(held_out), metric_for_best_model="loss")
    assert not parse_args(flags)[2].greater_is_better


def test_pictures_that_cannot_be_read_are_left_out(kit, tmp_path, capsys):
    data = questions(tmp_path / "data", "iitm")
    whole = kit.run(tmp_path / "whole", "iitt", max_steps=1, **evaluated(data))
    (all_of_them,) = evaluations(whole)
    (data.parent / "images/1_0.png").write_bytes(b"no picture")
    capsys.readouterr()
    (found,) = evaluations(kit.run(tmp_path / "out", "iitt", max_steps=1, **evaluated(data)))
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out of the evaluation: ")]
    assert len(told) == 1 and "r1: image" in told[0]
    assert (all_of_them["eval_n"], found["eval_n"]) == (4, 3)
    records = json.loads(data.read_text())
    data.write_text(json.dumps([record for record in records if record["id"] != "r1"]))
    (without,) = evaluations(kit.run(tmp_path / "without", "iitt", max_steps=1, **evaluated(data)))
    assert found == pytest.approx(without, abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(eval_strategy="steps"), ("eval_strategy", "eval_data_path")),
        (dict(do_eval=True), ("do_eval", "eval_strategy")),
        (dict(eval_data_path="x.json"), ("eval_data_path", "eval_strategy")),
        (dict(eval_exact_match=True), ("eval_exact_match", "eval_strategy")),
        (dict(metric_for_best_model="eval_loss"), ("metric_for_best_model", "eval_strategy")),
        (dict(eval_strategy="steps", eval_data_path="x.json", eval_steps=0), ("eval_steps", "positive")),
        (dict(eval_strategy="steps", eval_data_path="x.json", eval_limit=0), ("eval_limit", "positive")),
        (
            dict(eval_strategy="epoch", eval_data_path="x.json", eval_blank_images=True),
            ("eval_blank_images", "eval_ex"),
        ),
        (
            dict(eval_strategy="epoch", eval_data_path="x.json", metric_for_best_model="eval_exact_match"),
            ("metric_for_best_model", "eval_exact_match"),
        ),
        (dict(eval_strategy="epoch", eval_data_path="x.json", metric_for_best_model="bleu"), ("bleu", "eval_loss")),
        (
            dict(eval_strategy="epoch", eval_data_path="x.json", load_best_model_at_end=True, save_strategy="steps"),
            ("save", "epoch", "steps"),
        ),
    ],
)
def test_settings_that_do_not_go_together(kit, tmp_path, capsys, changes, words):
    from llava.config.__main__ import main as config_command

    for end in (lambda flags: config_command(["show", *flags]), lambda flags: kit.run(tmp_path / "out", **changes)):
        with pytest.raises(SystemExit) as stop:
            end(kit.flags(tmp_path / "out", **changes))
        assert stop.value.code == 2
        (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert all(word in error.lower() for word in words), error


def test_data_are_checked_before_weights(kit, tmp_path, capsys, held_out, monkeypatch):
    from transformers import PreTrainedModel

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *args, **kwargs: pytest.fail("weights were read"))
    records = json.loads(held_out.read_text())
    records[1]["image"] = "gone.png"
    (tmp_path / "wrong.json").write_text(json.dumps(records))
    for path, words in ((tmp_path / "wrong.json", "record 2 (id 'r1')"), (tmp_path / "none.json", "no such file")):
        with pytest.raises(SystemExit):
            kit.run(tmp_path / "out", **evaluated(held_out, eval_data_path=path))
        assert words in capsys.readouterr().err
