"""Runs that are evaluated: interrupted, with the best checkpoint kept, and with settings or data that do not fit."""

import json
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from llava.train.llava_trainer import LLaVATrainer
from tests import tiny
from tests.support.families import FamilyKit
from tests.train.test_distributed import evaluations
from tests.train.test_evaluation import evaluated, questions


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    return questions(tmp_path_factory.mktemp("held_out"), "iitmt")


def test_a_size_that_no_processor_takes(tmp_path, capsys):
    """A record that can be read, and gives no sample, is left out of exact match as well."""
    data = questions(tmp_path / "data", "itm")
    Image.new("RGB", (3, 900)).save(data.parent / "images/0_0.png")
    kit = FamilyKit("qwen2_vl", tmp_path / "kit")
    (found,) = evaluations(kit.run(tmp_path / "out", **evaluated(data, max_steps=1)).out)
    assert found["eval_n"] == 2
    assert "left out of the evaluation: r0: image" in capsys.readouterr().out


@pytest.fixture
def measured(monkeypatch):
    """A function: the losses that evaluations find, in place of the real ones."""

    def set_losses(*losses):
        left = iter(losses)
        monkeypatch.setattr("llava.train.evaluation.run_evaluation", lambda *args: {"eval_loss": next(left)})

    return set_losses


def state(out: Path) -> tuple:
    found = json.loads((out / "trainer_state.json").read_text())
    return found["best_metric"], Path(found["best_model_checkpoint"]).name


BEST = dict(load_best_model_at_end=True, save_total_limit=1, save_strategy="steps", save_steps=1, learning_rate=1e-2)


def test_a_run_that_goes_on_knows_the_best_so_far(kit, tmp_path, held_out, measured, monkeypatch):
    flags = BEST | evaluated(held_out, eval_exact_match=False) | dict(max_steps=3)
    step = LLaVATrainer.training_step

    def stop_in_third(self, *args, **kwargs):
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    measured(1.0, 2.0)
    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, SystemExit)):
        patch.setattr(LLaVATrainer, "training_step", stop_in_third)
        kit.run(tmp_path / "out", **flags)
    measured(1.5)
    out = kit.run(tmp_path / "out", **flags)
    assert state(out) == (1.0, "checkpoint-1")
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-1"]
    saved, best = (load_file(folder / "model.safetensors") for folder in (out, out / "checkpoint-1"))
    assert all(value.equal(best[key]) for key, value in saved.items())


def test_only_what_is_better_is_saved(kit, tmp_path, held_out, measured):
    measured(3.0, 1.0, 2.0)
    keys = evaluated(held_out, metric_for_best_model="loss", save_strategy="best", max_steps=3)
    out = kit.run(tmp_path / "out", **keys)
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert state(out) == (1.0, "checkpoint-2")


def test_the_best_by_exact_match(kit, tmp_path, held_out, monkeypatch):
    """Of a kind whose name ends as the loss's; more is better of it."""
    shares = iter([0.2, 0.6, 0.4])
    find = "llava.train.evaluation.run_evaluation"
    monkeypatch.setattr(find, lambda *args: {"eval_loss": 0.0, "eval_exact_match_floss": next(shares)})
    records = json.loads(held_out.read_text())
    for record in records:
        record["kind"] = "floss"
    data = held_out.parent / "floss.json"
    data.write_text(json.dumps(records))
    keys = evaluated(data, metric_for_best_model="exact_match_floss", max_steps=3)
    assert state(kit.run(tmp_path / "out", **keys | BEST)) == (0.6, "checkpoint-2")


def test_at_the_start_alone(kit, tmp_path, held_out, capsys):
    keys = evaluated(held_out, eval_on_start=True, max_steps=1)
    del keys["eval_strategy"], keys["eval_steps"]
    out = kit.run(tmp_path / "out", **keys)
    assert len(evaluations(out)) == 1


def test_a_best_checkpoint_that_never_was_is_told(kit, tmp_path, held_out, capsys):
    keys = evaluated(held_out, eval_exact_match=False) | BEST | dict(max_steps=1, eval_delay=5)
    kit.run(tmp_path / "out", **keys)
    assert "load_best_model_at_end: there is no best checkpoint" in capsys.readouterr().out


def refusal(kit, capsys, out: Path, **changes) -> str:
    """What a run is refused with."""
    with pytest.raises(SystemExit) as stop:
        kit.run(out, **changes)
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2
    return error


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(load_best_model_at_end=True, save_strategy="no"), ("load_best_model_at_end", "eval_strategy")),
        (dict(save_strategy="best"), ("save_strategy", "metric_for_best_model")),
        (dict(save_strategy="best", metric_for_best_model="loss"), ("metric_for_best_model", "eval_strategy")),
        (dict(eval_on_start=True), ("eval_on_start", "eval_data_path")),
        (dict(eval_blank_images=True), ("eval_blank_images", "eval_strategy")),
        (
            dict(eval_strategy="steps", eval_data_path="x.json", lr_scheduler_type="reduce_lr_on_plateau")
            | dict(eval_exact_match=True, metric_for_best_model="exact_match"),
            ("reduce_lr_on_plateau", "mode max"),
        ),
    ],
)
def test_settings(kit, tmp_path, capsys, changes, words):
    error = refusal(kit, capsys, tmp_path / "out", **changes)
    assert all(word in error for word in words), error


@pytest.mark.parametrize(
    ("kinds", "changes", "words"),
    [
        ("iitmt", dict(metric_for_best_model="exact_match_heard"), ("exact_match_heard", "eval_exact_match_read")),
        ("tt", dict(eval_blank_images=True), ("no images", "eval_blank_images")),
        ("", {}, ("eval_data_path", "no records")),
    ],
)
def test_data_that_do_not_fit_are_told_before_weights(kit, tmp_path, capsys, monkeypatch, kinds, changes, words):
    from transformers import PreTrainedModel

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *args, **kwargs: pytest.fail("weights were read"))
    data = questions(tmp_path / "data", kinds)
    error = refusal(kit, capsys, tmp_path / "out", **evaluated(data, **changes))
    assert all(word in error for word in words), error


def test_nothing_that_can_be_read(kit, tmp_path, capsys):
    data = questions(tmp_path / "data", "ii")
    for path in (data.parent / "images").iterdir():
        path.write_bytes(b"no picture")
    error = refusal(kit, capsys, tmp_path / "out", max_steps=1, **evaluated(data))
    assert str(data) in error and "no record with a label" in error and "r0" in error


def test_folders_of_a_mixture(kit, tmp_path):
    """Each file's questions are asked with the pictures of its own folder."""
    parts = [questions(tmp_path / name, kinds) for name, kinds in (("one", "it"), ("two", "mi"))]
    entries = [f"- {{json_path: {path}, image_folder: {path.parent / 'images'}}}" for path in parts]
    (tmp_path / "mixture.yaml").write_text("\n".join(["datasets:", *entries]))
    keys = evaluated(tmp_path / "mixture.yaml", max_steps=1)
    (found,) = evaluations(kit.run(tmp_path / "out", **keys))
    assert found["eval_n"] == 4 and tiny.history(tmp_path / "out")
