"""Hours and memory of planned runs, against `benchmarks/scaling.py`'s own figures, and what is said to be cut."""

import importlib
import json
from pathlib import Path

import pytest

from llava.compare import estimate as estimates
from llava.compare.estimate import Planned, estimate
from llava.errors import LlavaError

ROOT = Path(__file__).resolve().parents[2]
PRETRAIN, FINETUNE = "configs/train/pretrain_blip558k.yaml", "configs/train/finetune_next.yaml"
HEVC = "configs/towers/hevc_vit_packing.yaml"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """An estimate of runs from shipped configs, of which some are not known."""
    folder = tmp_path_factory.mktemp("runs")
    data = folder / "subset.json"
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    data.write_text(json.dumps([{"id": str(i), "conversations": turns} for i in range(640)]))
    plain = [FINETUNE, "--tower", HEVC]
    runs = [
        Planned("pretrain", "clip", 0, [PRETRAIN]),
        Planned("finetune", "clip", 0, [FINETUNE]),
        Planned("subset", "clip", 0, [FINETUNE, "--data_path", str(data)]),
        Planned("few steps", "hevc", 0, [*plain, "--max_steps", "100", "--output_dir", f"{folder}/one"]),
        Planned("goes on", "hevc", 0, [*plain, "--model_name_or_path", f"{folder}/one", "--max_steps", "100"]),
        Planned("no tower", "mine", 0, [FINETUNE, "--vision_tower", "nobody/knows-this-encoder"]),
        Planned("no model", "mine", 0, [FINETUNE, "--model_name_or_path", "nobody/knows-this-model"]),
        Planned("no key", "mine", 0, [FINETUNE, "--no_such_key", "1"]),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        result = estimate(runs, "a100-80", 1000, devices=8)
    return result, {row["name"]: row for row in result.runs}


@pytest.mark.parametrize(("name", "config"), [("pretrain", PRETRAIN), ("finetune", FINETUNE)])
def test_a_shipped_config_is_as_the_program_has_it(found, monkeypatch, name, config):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    facts, model, recipes = (importlib.import_module(f"costs.{name}") for name in ("facts", "model", "recipes"))
    recipe = recipes.read_recipe(config, facts.GPUS["a100-80"], 8)
    expected = recipes.fit(recipe, 1000, model.USABLE)
    row = found[1][name]
    assert row["hours"] == pytest.approx(expected["hours"]) and row["tower"] == "clip" and row["seed"] == 0
    assert row["memory_gib"] == pytest.approx(expected["memory"]["total"] / 2**30) and row["breaks"] == []


def test_hours_follow_samples_and_steps(found):
    result, rows = found
    # as many samples as the file has, of texts as long as are assumed of the published data
    assert rows["subset"]["hours"] / rows["finetune"]["hours"] == pytest.approx(640 / 779_289)
    assert rows["goes on"] == rows["few steps"] | {"name": "goes on"}
    known = [row["hours"] for row in result.runs if "hours" in row]
    assert len(known) == 5 and result.hours == pytest.approx(sum(known))


def test_what_is_not_known_is_a_line(found):
    result, rows = found
    for name, word in (("no tower", "knows-this-encoder"), ("no model", "knows-this-model"), ("no key", "no_such_key")):
        assert rows[name].keys() == {"name", "tower", "seed", "error"} and word in rows[name]["error"]
        (line,) = [line for line in result.said if line.startswith(f"{name}: not known: ")]
        assert word in line and "\n" not in line and not rows[name]["error"].startswith(name)
    assert result.said[-2:] == [
        "without 3 of which nothing is known:",
        f"it fits: {result.hours:,.1f} hours of 1,000.0 hours",
    ]


def test_seeds_that_take_the_same_are_one_line():
    names = ("a/seed_0/one", "a/seed_0/two", "a/seed_1/one", "a/seed_1/two", "b/seed_0/one")
    rows = [{"name": name, "tower": name[0], "hours": 1.0, "memory_gib": 2.0, "breaks": []} for name in names]
    assert estimates._lines(rows) == [
        "a/seed_0/one: 1.0 hours, 2 GiB (and 1 more such)",
        "a/seed_0/two: 1.0 hours, 2 GiB (and 1 more such)",
        "b/seed_0/one: 1.0 hours, 2 GiB",
    ]


def plan(hours: dict[str, float], seeds=(0, 1, 2), breaks=()) -> list[dict]:
    return [
        {"tower": tower, "seed": seed, "hours": took, "breaks": ["memory"] if tower in breaks else []}
        for seed in seeds
        for tower, took in hours.items()
    ]


@pytest.mark.parametrize(
    ("hours", "said"),
    [
        (60, "it fits: 60.0 hours of 60.0 hours"),
        (59, "it does not fit in 59.0 hours: drop seed 2 (leaves 40.0 hours), or a (leaves 42.0 hours)"),
        (41, "it does not fit in 41.0 hours: drop seed 2 (leaves 40.0 hours), or a, c (leaves 27.0 hours)"),
        (21, "it does not fit in 21.0 hours: drop seeds 1, 2 (leaves 20.0 hours)"),
        (19, "it does not fit in 19.0 hours: keep seed 0 alone, and drop a (leaves 14.0 hours)"),
        (8, "it does not fit in 8.0 hours: with seed 0 alone there is time for d (4.0 hours) and no second tower"),
    ],
)
def test_what_to_cut(hours, said):
    """Towers of 6, 5, 5 and 4 hours, three seeds each."""
    assert estimates._verdict(plan({"a": 6, "b": 5, "c": 5, "d": 4}), hours) == [said]


def test_nothing_fits():
    (said,) = estimates._verdict(plan({"a": 6, "d": 4}), 3)
    assert said.startswith("nothing fits in 3.0 hours: one tower with one seed takes 4.0 hours")
    memory, time = estimates._verdict(plan({"a": 6, "d": 4}, breaks="d"), 100)
    assert memory.startswith("memory: d do") and time.startswith("it fits")


def test_refusals(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    run = Planned("pretrain", "clip", 0, [PRETRAIN])
    with pytest.raises(LlavaError, match=r"scaling\.py: .*--gpu.*abacus"):
        estimate([run], "abacus", 10)
    for hours, devices in ((0, 8), (float("nan"), 8), (1, 0)):
        with pytest.raises(LlavaError, match="expected numbers above 0"):
            estimate([run], "a100-80", hours, devices)
    monkeypatch.setattr(estimates, "PROGRAM", tmp_path / "scaling.py")
    found = estimate([run], "a100-80", 10)
    assert found.hours is None and not found.runs and "is not there" in found.said[0] and len(found.said) == 1
