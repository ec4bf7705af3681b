"""The figures of a run's log: by hand for known times and sizes, and in runs against what the model was given."""

import ast
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llava.families.batch_sizes import BatchSizes
from llava.model import llava_arch
from llava.train import step_log
from llava.train.flops import step_flops
from tests import tiny

FIGURES = {
    *("perf/tokens_per_s", "perf/samples_per_s", "perf/pack_efficiency", "perf/visual_token_share"),
    *("perf/data_wait_share", "perf/step_s_min", "perf/step_s_max", "perf/peak_memory_gb"),
    *("data/truncated", "data/bad_records"),
}
SIZES = [BatchSizes([30, 10], 60, 15), BatchSizes([20], 20, 5), BatchSizes([40], 40, 0)]


@pytest.fixture
def clock(monkeypatch):
    """Seconds that stand still until a test moves them."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(step_log.time, "perf_counter", lambda: now.seconds)
    return now


def log_of(gather=None, world=1, peak=None):
    """A log of a trainer that is not there; `host` of a batch is what its family says of it."""
    args = SimpleNamespace(peak_tflops=peak, device=torch.device("cpu"), world_size=world, lora_enable=False)
    args.mm_vision_tower_trainable_blocks = None
    trainer = SimpleNamespace(
        args=args,
        model=SimpleNamespace(config="config"),
        parts={"mm_mlp_adapter"},
        accelerator=SimpleNamespace(gather=gather, unwrap_model=lambda model: model),
        family=SimpleNamespace(batch_sizes=lambda batch, model: batch["host"]),
        train_dataset=SimpleNamespace(stats={"truncated": 3}),
        left_out=SimpleNamespace(bad={"r1: gone", "r2: gone"}),
    )
    return step_log.StepLog(trainer)


def take(log, clock, batches, wait, rest):
    log.begin()
    clock.seconds += wait
    log.read([{"host": sizes} for sizes in batches])
    clock.seconds += rest
    log.on_step_end(None, None, None)
    clock.seconds += 1000  # an evaluation


def test_figures_by_hand(clock):
    log = log_of()
    take(log, clock, SIZES[:2], 1, 3)
    take(log, clock, SIZES[2:], 0.5, 1.5)
    found = log.added_to({"loss": 1.0})
    memory = found.pop("perf/peak_memory_gb")
    assert 0.05 < memory < 64  # of this process
    assert found == {
        "loss": 1.0,
        "perf/tokens_per_s": pytest.approx(100 / 6, rel=1e-5),
        "perf/samples_per_s": pytest.approx(4 / 6, rel=1e-5),
        "perf/pack_efficiency": pytest.approx(100 / 120, rel=1e-5),
        "perf/visual_token_share": 0.2,
        "perf/data_wait_share": 0.25,
        "perf/step_s_min": 2.0,
        "perf/step_s_max": 4.0,
        "data/truncated": 3,
        "data/bad_records": 2,
    }


def test_a_line_is_of_the_steps_since_the_last(clock):
    log = log_of()
    take(log, clock, SIZES, 1, 9)
    log.added_to({"loss": 1.0})
    assert log.added_to({"loss": 1.0}) == {"loss": 1.0}  # no step since
    take(log, clock, SIZES[2:], 0, 2)
    assert log.added_to({"eval_loss": 1.0}) == {"eval_loss": 1.0}
    assert log.added_to({"train_loss": 1.0}) == {"train_loss": 1.0}
    found = log.added_to({"loss": 1.0})
    assert found["perf/tokens_per_s"] == 20 and found["perf/step_s_max"] == 2


def test_two_ranks_in_one_exchange(clock):
    """Sums of what is done, the longest of the times, the widest spread."""
    exchanged = []

    def gather(numbers):
        exchanged.append(numbers)
        other = numbers.clone()
        other[0, :4] = torch.tensor([300.0, 6.0, 300.0, 0.0])  # tokens, samples, slots, visual
        other[0, 5] = 4  # truncated
        other[0, 6:] = torch.tensor([8.0, 0.5, 5.0, -3.0, 70.0])  # seconds, waiting, slowest, quickest, memory
        return torch.cat([numbers, other])

    log = log_of(gather, world=2)
    take(log, clock, SIZES[:2], 1, 3)
    take(log, clock, SIZES[2:], 0.5, 1.5)
    found = log.added_to({"loss": 1.0})
    assert len(exchanged) == 1
    assert found["perf/tokens_per_s"] == 400 / 8 and found["perf/samples_per_s"] == 10 / 8
    assert found["perf/pack_efficiency"] == pytest.approx(400 / 420, rel=1e-5)
    assert found["perf/visual_token_share"] == 0.05 and found["perf/data_wait_share"] == 0.5
    assert (found["perf/step_s_min"], found["perf/step_s_max"], found["perf/peak_memory_gb"]) == (2, 5, 70)
    assert found["data/truncated"] == 7


def test_utilisation(clock, monkeypatch):
    """Operations over seconds and peak, of this rank's share of the devices."""
    seen = []

    def flops(config, tokens, patches, parts, **more):
        seen.append((config, tokens, patches, parts, more))
        return 3e12

    monkeypatch.setattr(step_log, "step_flops", flops)
    monkeypatch.setattr(step_log, "shape_of", lambda config: None)  # what it tells is enough
    log = log_of(lambda numbers: torch.cat([numbers, numbers]), world=2, peak=10.0)
    take(log, clock, [BatchSizes([5, 7], 14, 3, [16], 4, 6)], 0.5, 1.5)
    assert log.added_to({"loss": 1.0})["perf/mfu"] == 0.15  # 6e12 in 2 seconds by two that could 10e12
    more = {"supervised": 6, "projected": 4, "lora_rank": 0, "tower_blocks": None}
    assert seen == [("config", [5, 7], [16], {"mm_mlp_adapter"}, more)]


def test_truncated_goes_on_from_the_checkpoint(clock):
    log = log_of()
    state = SimpleNamespace(log_history=[{"loss": 2.0, "data/truncated": 5}, {"eval_loss": 1.0}])
    log.on_train_begin(None, state, None)
    take(log, clock, SIZES, 0, 1)
    assert log.added_to({"loss": 1.0})["data/truncated"] == 8


# --- in runs ---


@pytest.fixture
def plans(monkeypatch):
    """The merge plans of a run's forward passes: what the language model was really given."""
    made, plan_merge = [], llava_arch.plan_merge

    def plan(*args, **kwargs):
        made.append(plan_merge(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(llava_arch, "plan_merge", plan)
    return made


def test_a_run_with_accumulation(kit, tmp_path, plans, spy, capsys):
    """Two steps of three micro-batches, the second a line of its own; the log says what the merge did, and the terminal
    the most of it that fits into a line."""
    flags = dict(per_device_train_batch_size=2, gradient_accumulation_steps=3, max_steps=2, peak_tflops=0.001)
    out = kit.run(tmp_path / "out", "iitmttiiitmi", **flags)
    steps = tiny.history(out, measured=True)
    assert len(steps) == 2 and len(plans) == 6
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{'loss'")]
    shown = {"loss", "grad_norm", "learning_rate", "epoch", *step_log.SHOWN}
    assert [ast.literal_eval(line).keys() for line in printed] == [shown, shown]
    model = spy.trainer.model
    for step, made in zip(steps, (plans[:3], plans[3:]), strict=True):
        assert step.keys() >= FIGURES | {"perf/mfu"}
        tokens = [n for plan in made for n in plan.mask.sum(1).tolist()]
        text = sum(len(plan.text_ids) for plan in made)
        assert step["perf/pack_efficiency"] == pytest.approx(sum(tokens) / sum(p.mask.numel() for p in made), rel=1e-5)
        assert step["perf/visual_token_share"] == pytest.approx(1 - text / sum(tokens), rel=1e-4)
        assert step["perf/tokens_per_s"] / step["perf/samples_per_s"] == pytest.approx(sum(tokens) / 6, rel=1e-4)
        assert 0 <= step["perf/data_wait_share"] <= 1
        assert 0 < step["perf/step_s_min"] == step["perf/step_s_max"]
        assert step["data/truncated"] == step["data/bad_records"] == 0
        seconds = sum(tokens) / step["perf/tokens_per_s"]
        assert seconds == pytest.approx(step["perf/step_s_max"], rel=1e-4)
        supervised = sum(int((plan.labels[:, 1:] != -100).sum()) for plan in made)
        known = step_flops(model.config, tokens, [], spy.trainer.parts, supervised=supervised)
        crop = step_flops(model.config, [], [4], spy.trainer.parts)
        crops = (step["perf/mfu"] * seconds * 0.001e12 - known) / crop
        assert crops == pytest.approx(round(crops), abs=0.02) and round(crops) >= 6


def test_figures_over_several_steps_and_a_resumed_run(kit, tmp_path, plans):
    flags = dict(logging_steps=2, save_strategy="steps", save_steps=2, model_max_length=60)
    out = kit.run(tmp_path / "out", "iitiittiiitiiiti", max_steps=2, **flags)
    kit.run(out, "iitiittiiitiiiti", max_steps=4, **flags)
    first, second = tiny.history(out, measured=True)
    for step, made in ((first, plans[:2]), (second, plans[2:])):
        assert step.keys() >= FIGURES and "perf/mfu" not in step
        tokens = [n for plan in made for n in plan.mask.sum(1).tolist()]
        assert min(tokens) > 1 and max(tokens) <= 60  # some records have no label left, and give no sample
        mean = sum(tokens) / len(tokens)
        assert step["perf/tokens_per_s"] / step["perf/samples_per_s"] == pytest.approx(mean, rel=1e-4)
        assert step["perf/step_s_min"] <= step["perf/step_s_max"]
    assert 0 < first["data/truncated"] <= second["data/truncated"]
    assert "perf/tokens_per_s" in json.loads((out / "trainer_state.json").read_text())["log_history"][0]


def test_records_left_out(kit, tmp_path):
    path = tmp_path / "records.json"
    path.write_text(Path(kit.records("iitiittiiiti")).read_text())
    (tmp_path / "images").mkdir()
    for name in ("0_0.png", "1_0.png"):
        (tmp_path / "images" / name).write_bytes(b"no picture")
    source = kit.folder / "data_iitiittiiiti" / "images"
    for file in source.iterdir():
        if not (tmp_path / "images" / file.name).exists():
            (tmp_path / "images" / file.name).write_bytes(file.read_bytes())
    out = kit.run(tmp_path / "out", data_path=str(path), max_steps=2)
    steps = tiny.history(out, measured=True)
    assert [step["data/bad_records"] for step in steps] == [2, 2]
    assert steps[0]["perf/samples_per_s"] / steps[1]["perf/samples_per_s"] == pytest.approx(
        2 / 4 * steps[1]["perf/step_s_max"] / steps[0]["perf/step_s_max"], rel=1e-3
    )
