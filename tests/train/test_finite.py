"""Numbers that are not finite: the step is left out on every rank alike, told of, and nothing else changes."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.support.bad_numbers import install
from tests.support.runs import WITH_FLOAT16
from tests.train.test_distributed import DEEPSPEED

ROOT = Path(__file__).parents[2]
KINDS = "iittimti" + "miittiti" + "ttiittim"  # as in test_distributed: 2 micro-batches of 4, or of 2 on two ranks
STEPS = dict(gradient_accumulation_steps=2, max_steps=4, learning_rate=1e-2, weight_decay=0.1, warmup_steps=2)
SAVING = dict(save_strategy="steps", save_steps=1)
BAD = 3  # the step that has a fault; its records, and those of its second micro-batch
RECORDS = [f"r{number}" for number in range(16, 24)]


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "bad_batches.jsonl").read_text().splitlines()]


def log(out: Path) -> list[dict]:
    return json.loads((out / "trainer_state.json").read_text(), parse_constant=pytest.fail)["log_history"]


def weights(out: Path) -> dict:
    return load_file(out / "model.safetensors")


def finite(folder: Path) -> bool:
    return all(
        bool(value.isfinite().all()) for path in folder.rglob("*.safetensors") for value in load_file(path).values()
    )


@pytest.fixture(scope="module")
def without(kit, tmp_path_factory):
    """The folder of a run in which the optimizer's step is missing, by another way than this project's."""
    from accelerate.optimizer import AcceleratedOptimizer

    step, taken = AcceleratedOptimizer.step, []

    def most(self, *args):
        taken.append(len(taken) + 1)
        if taken[-1] != BAD:
            step(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AcceleratedOptimizer, "step", most)
        return kit.run(tmp_path_factory.mktemp("without") / "out", KINDS, **STEPS)


def same_but_for_the_step(out: Path, expected: Path, atol: float = 0.0) -> None:
    ours, theirs = log(out), log(expected)
    assert [entry["step"] for entry in ours] == [entry["step"] for entry in theirs] == [1, 2, 3, 4, 4]
    for got, want in zip(ours[:4], theirs[:4], strict=True):
        assert got["learning_rate"] == want["learning_rate"], (got, want)
        if got["step"] == BAD:
            assert not {"loss", "grad_norm"} & got.keys() and got["skipped_steps"] == 1
        else:
            assert got["loss"] == pytest.approx(want["loss"], abs=atol) and "skipped_steps" not in got
    good = [entry["loss"] for entry in theirs[:4] if entry["step"] != BAD]
    assert ours[4]["train_loss"] == pytest.approx(sum(good) / 3, abs=1e-4) and ours[4]["skipped_steps"] == 1
    whole, other = weights(expected), weights(out)
    assert whole.keys() == other.keys()
    assert all(torch.allclose(value, other[name], rtol=0, atol=atol) for name, value in whole.items())


# kind -> (what makes it, the value told, the records)
FAULTS = {
    "loss": (dict(kind="loss", steps=[BAD], micro=1), "nan", RECORDS[4:]),
    "constant": (dict(kind="constant", steps=[BAD], micro=0), "nan", RECORDS[:4]),
    "gradient": (dict(kind="gradient", steps=[BAD]), "nan", RECORDS),
    "input": (dict(kind="input", records=["r22"]), "nan", RECORDS[4:]),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_step_is_left_out(kit, without, tmp_path, capsys, kind):
    fault, value, ids = FAULTS[kind]
    with install(**fault):
        out = kit.run(tmp_path / "out", KINDS, **STEPS, max_grad_norm=0.0 if kind == "input" else 1.0)
    told = "loss" if kind == "constant" else kind
    (row,) = rows(out)
    assert row == {"step": BAD, "epoch": 1.0, "rank": 0, "kind": told, "value": row["value"], "ids": ids}
    assert row["value"] in (value, "inf")
    said = capsys.readouterr().out
    assert (
        f"step {BAD}: skipped, its {told}{'s are' if told == 'input' else ' is'} not finite ({row['value']}; " in said
    )
    assert f"records {', '.join(ids)})" in said and "steps skipped, not finite: 1" in said
    if kind == "input":  # without clipping other steps are others
        assert finite(out) and [entry["step"] for entry in log(out) if "loss" in entry] == [1, 2, 4]
    else:
        same_but_for_the_step(out, without)


def test_too_many_in_a_row_end_the_run_and_it_goes_on(kit, tmp_path, capsys):
    flags = STEPS | SAVING | {"max_steps": 6, "max_bad_steps": 2, "logging_steps": 2}
    out = tmp_path / "out"
    with install("loss", steps=[2, 4, 5]), pytest.raises(SystemExit, match=r"^2$"):
        kit.run(out, KINDS, **flags)
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: step 5: found 2 steps in a row whose numbers are not finite, expected fewer than ")
    assert "its loss is not finite (nan; records r8," in line and str(out / "bad_batches.jsonl") in line
    assert sorted(path.name for path in out.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (1, 2, 3, 4)]
    assert finite(out) and [row["step"] for row in rows(out)] == [2, 4, 5]

    whole = kit.run(tmp_path / "whole", KINDS, **flags)
    kit.run(out, KINDS, **flags)  # what is right now is not bad any more
    assert [row["step"] for row in rows(out)] == [2, 4]
    ours, theirs = log(out), log(whole)
    assert [entry.get("skipped_steps") for entry in ours] == [1, 1, None, None]
    assert [entry["learning_rate"] for entry in ours[:3]] == [entry["learning_rate"] for entry in theirs[:3]]
    assert ours[0]["loss"] != theirs[0]["loss"] and abs(ours[0]["loss"] - theirs[0]["loss"]) < 0.5  # of step 1 alone


def test_a_run_resumes_after_a_skipped_step(kit, without, tmp_path):
    out = tmp_path / "out"
    with install("loss", steps=[BAD]):
        kit.run(out, KINDS, **STEPS, **SAVING)
        whole = weights(out)
        (out / "trainer_state.json").unlink()
        shutil.rmtree(out / "checkpoint-4")
        kit.run(out, KINDS, **STEPS, **SAVING)
    assert [row["step"] for row in rows(out)] == [BAD]
    ours, theirs = log(out), log(without)
    assert [(x.get("loss"), x["learning_rate"]) for x in ours[3:4]] == [
        (x["loss"], x["learning_rate"]) for x in theirs[3:4]
    ]
    assert all(value.equal(whole[name]) for name, value in weights(out).items())


# --- weights ---


@pytest.mark.parametrize("saving", [SAVING, {}, {"max_steps": BAD}], ids=["saved", "trained on", "last"])
def test_a_weight_ends_the_run(kit, tmp_path, capsys, saving):
    """That of an optimizer whose state is broken: before it is saved, or at the next step."""
    out = tmp_path / "out"
    with install("moments", steps=[BAD], micro=1), pytest.raises(SystemExit, match=r"^2$"):
        kit.run(out, KINDS, **STEPS | saving)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    (row,) = rows(out)
    assert row["kind"] == "weight" and row["step"] == BAD and row["value"] in line
    assert line.startswith(f"error: after step {BAD}: found weights that are not finite: model.")
    assert finite(out) and not (out / "model.safetensors").exists() and not (out / "checkpoint-3").exists()


@pytest.mark.parametrize("frozen", [False, True])
def test_a_weight_that_is_read(kit, tmp_path, capsys, frozen):
    broken = shutil.copytree(kit.llm, tmp_path / "llm")
    state = load_file(broken / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = math.inf
    save_file(state, broken / "model.safetensors", {"format": "pt"})
    flags = {"mm_tunable_parts": "mm_mlp_adapter"} if frozen else {}
    with pytest.raises(SystemExit, match=r"^2$"):
        kit.run(tmp_path / "out", KINDS, model_name_or_path=broken, **STEPS, **flags)
    said = capsys.readouterr().err
    assert "before the first step: found weights that are not finite: model.layers.1.mlp.up_proj.weight;" in said
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_what_counts_as_a_weight():
    from llava.train.finite import nonfinite_weights

    model = torch.nn.Sequential(
        torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 2, dtype=torch.bfloat16)
    )
    model.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    model.register_buffer("scratch", torch.tensor([math.nan]), persistent=False)
    model.register_parameter("codes", torch.nn.Parameter(torch.ones(3, dtype=torch.uint8), requires_grad=False))
    model.register_parameter("none", torch.nn.Parameter(torch.empty(0)))
    assert nonfinite_weights(model) == []
    model[2].weight.data[1, 1] = -math.inf
    model[0].bias.data[1] = math.nan
    model[0].bias.requires_grad = False
    model[1].running_mean[0] = math.nan
    assert nonfinite_weights(model) == ["0.bias", "1.running_mean", "2.weight"]


# --- spikes ---


@pytest.mark.parametrize("factor", [5, 0])
def test_a_spike_is_told_and_trained_on(kit, tmp_path, capsys, factor):
    with install("spike", steps=[5]):
        out = kit.run(tmp_path / "out", KINDS, **STEPS | {"max_steps": 6, "loss_spike_factor": factor})
    said = capsys.readouterr().out
    assert "skipped" not in said and [entry["step"] for entry in tiny.history(out)] == [1, 2, 3, 4, 5, 6]
    if not factor:
        assert "loss spike" not in said and not (out / "bad_batches.jsonl").exists()
        return
    (row,) = rows(out)
    assert row["kind"] == "spike" and row["step"] == 5 and row["ids"] == [f"r{number}" for number in range(8, 16)]
    assert row["value"] == pytest.approx(tiny.history(out)[4]["loss"], rel=1e-5)
    assert "step 5: loss spike, " in said and "(records r8, r9," in said


# --- two processes ---

# (set-up, fault of rank 1) -> the rows' (rank, kind, ids); rank 1 has the second half of each micro-batch
TWO = {
    ("ddp", "constant"): [(1, "loss", [*RECORDS[2:4], *RECORDS[6:]])],
    ("ddp", "input"): [(1, "input", RECORDS[6:])],
    ("ddp", "row"): [],
    ("zero2", "constant"): [(1, "loss", [*RECORDS[2:4], *RECORDS[6:]])],
    ("zero2", "gradient"): [
        (0, "gradient", [*RECORDS[:2], *RECORDS[4:6]]),
        (1, "gradient", [*RECORDS[2:4], *RECORDS[6:]]),
    ],
    ("zero3", "constant"): [(1, "loss", [*RECORDS[2:4], *RECORDS[6:]])],
    ("zero3", "gradient"): [
        (0, "gradient", [*RECORDS[:2], *RECORDS[4:6]]),
        (1, "gradient", [*RECORDS[2:4], *RECORDS[6:]]),
    ],
    ("zero3", "moments"): [],
    ("zero3", "row"): [],
}
LONG = bool(os.environ.get("LLAVA_LONG_TESTS"))
if not LONG:
    SHORT = (("ddp", "constant"), ("ddp", "row"), ("zero3", "gradient"), ("zero3", "row"))
    TWO = {case: TWO[case] for case in SHORT}
needs_time = pytest.mark.skipif(not LONG, reason="half a minute more: scripts/test_long.sh runs it (LLAVA_LONG_TESTS)")


@pytest.fixture(scope="module")
def two(kit, forks, tmp_path_factory):
    """The folder of the runs of `TWO` on two processes, and what both said."""
    folder, runs = tmp_path_factory.mktemp("two"), []
    for setup, kind in TWO:
        fault = {"kind": kind, "steps": [BAD], "rank": 1}
        changes = STEPS | {"per_device_train_batch_size": 2, "use_cpu": True}
        if kind == "input":
            fault = {"kind": kind, "records": ["r22"]}
        if kind == "row":
            fault, changes = {"kind": "loss", "steps": [2, 3], "rank": 1}, changes | {"max_bad_steps": 2}
        if kind == "moments":
            fault["micro"], changes = 1, changes | SAVING
        changes["deepspeed"] = None if setup == "ddp" else ROOT / f"scripts/{setup}.json"
        runs.append({"flags": kit.flags(folder / f"{setup}-{kind}", KINDS, **changes), "fault": fault})
    return folder, forks.runs(2, runs, folder)[1]


@DEEPSPEED
@pytest.mark.parametrize("case", [case for case in TWO if TWO[case]], ids="-".join)
def test_one_rank_of_two(without, two, case):
    out = two[0] / "-".join(case)
    assert out.exists(), two[1][-4000:]
    assert [(row["rank"], row["kind"], row["ids"]) for row in rows(out)] == TWO[case], two[1][-4000:]
    assert {row["step"] for row in rows(out)} == {BAD} and {row["value"] for row in rows(out)} <= {"nan", "inf"}
    same_but_for_the_step(out, without, atol=1e-5)


@DEEPSPEED
def test_runs_that_end_end_on_both_ranks(two):
    folder, said = two
    for setup in ("ddp", "zero3"):
        out = folder / f"{setup}-row"
        assert [row["step"] for row in rows(out)] == [2, 3] and not (out / "model.safetensors").exists()
    assert said.count("LlavaError: step 3: found 2 steps in a row whose numbers are not finite") == 4


@DEEPSPEED
@needs_time
def test_moments_that_overflow_end_both_ranks(two):
    folder, said = two
    out = folder / "zero3-moments"
    (row,) = rows(out)
    assert row["kind"] == "weight" and row["step"] == BAD
    assert said.count(f"LlavaError: after step {BAD}: found weights that are not finite: {row['value']}") == 2
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


# --- DeepSpeed's other ways ---

# name -> changes of zero2.json, keys, fault
WAYS = {
    "scale falls": (
        {"fp16": {"initial_scale_power": 32}},
        {"max_steps": 24, "fp16": True},
        {"kind": "loss", "steps": [22]},
    ),
    "least scale": (
        {"fp16": {"initial_scale_power": 0}},
        {"max_steps": 4, "fp16": True, "max_bad_steps": 2},
        {"kind": "gradient", "steps": [2, 3]},
    ),
    "unchecked": ({"bf16": {"check_grad_overflow": False}}, {"bf16": True}, {"kind": "gradient", "steps": [BAD]}),
    "stage 0": ({"zero_optimization": {"stage": 0}}, {}, {"kind": "gradient", "steps": [BAD]}),
}


@pytest.fixture(scope="module")
def ways(kit, forks, tmp_path_factory):
    """The folder of the runs of `WAYS`, and what they said, in one process that believes in float16."""
    folder, runs = tmp_path_factory.mktemp("ways"), []
    for name, (changes, keys, fault) in WAYS.items():
        settings = json.loads((ROOT / "scripts/zero2.json").read_text())
        for part, values in changes.items():
            settings[part] |= values
        (folder / f"{name}.json").write_text(json.dumps(settings))
        flags = STEPS | {"use_cpu": True, "deepspeed": folder / f"{name}.json"} | keys
        runs.append({"flags": kit.flags(folder / name, KINDS, **flags), "fault": fault})
    return folder, forks.runs(1, runs, folder, change=WITH_FLOAT16)[1]


@DEEPSPEED
@needs_time
def test_fp16_overflows_are_no_faults_while_the_scale_falls(ways):
    folder, said = ways
    out = folder / "scale falls"
    assert out.joinpath("trainer_state.json").exists(), said[-4000:]
    assert [(row["step"], row["kind"]) for row in rows(out)] == [(22, "loss")]
    steps = log(out)[:24]
    assert sum("grad_norm" not in entry for entry in steps) > 11  # more than max_bad_steps in a row, and the fault
    assert ["loss" in entry for entry in steps] == [entry["step"] != 22 for entry in steps]
    assert "grad_norm" in steps[-1] and finite(out)


@DEEPSPEED
@needs_time
def test_overflows_of_the_least_scale_are(ways):
    folder, said = ways
    assert [(row["step"], row["kind"]) for row in rows(folder / "least scale")] == [(2, "gradient"), (3, "gradient")]
    assert "LlavaError: step 3: found 2 steps in a row whose numbers are not finite" in said, said[-4000:]
    assert "already at minimum" not in said


@DEEPSPEED
@needs_time
def test_gradients_that_deepspeed_does_not_look_at(without, ways):
    folder, said = ways
    for name in ("unchecked", "stage 0"):
        assert [(row["step"], row["kind"]) for row in rows(folder / name)] == [(BAD, "gradient")], said[-4000:]
        assert finite(folder / name)
    same_but_for_the_step(folder / "stage 0", without, atol=1e-5)
