"""A comparison's YAML: what it says, and what is refused in one line before anything is trained."""

import json
from pathlib import Path

import pytest

from llava.compare import driver, facts
from llava.compare.comparison import Values, layered, read_comparison, words
from llava.config.files import read_yaml
from llava.errors import LlavaError

ROOT = Path(__file__).parents[2]


def read(small, tmp_path, towers=None, given=(), **more):
    towers = [small.tower("clip"), small.tower("siglip", "siglip")] if towers is None else towers
    return read_comparison(small.write(tmp_path / "compare.yaml", towers, **more), list(given))


def refused(call, *texts):
    with pytest.raises(LlavaError) as error:
        call()
    assert "\n" not in str(error.value)
    for text in texts:
        assert text in str(error.value)


def test_what_is_read(small, tmp_path):
    found = read(
        small,
        tmp_path,
        [
            small.tower("clip", set={"weight_decay": 0.1, "finetune.max_steps": 5}, learning_rates=[0.001, "2e-3"][:1]),
            small.tower("CLIP+", frozen=True, evaluate={"heldout.max_new_tokens": 3}),
        ],
        match="samples",
        groups={"General": ["heldout"]},
        set={"pretrain.warmup_steps": 0.1},
    )
    assert [entry.name for entry in found.entries] == ["clip", "CLIP+"]
    assert found.entries[0].learning_rates == (0.001,) and found.entries[1].frozen
    assert found.learning_rate_stage == "finetune" and found.groups == {"General": ("heldout",)}
    assert found.values_of(found.entries[0]) == {
        ("pretrain", "warmup_steps"): 0.1,
        (None, "weight_decay"): 0.1,
        ("finetune", "max_steps"): 5,
    }
    assert words(found.values_of(found.entries[1])) == [
        "--pretrain.warmup_steps",
        "0.1",
        "--heldout.max_new_tokens",
        "3",
    ]


def test_the_command_line_stands_above_an_entry_and_that_above_all(small, tmp_path):
    entry = small.tower("clip", set={"finetune.max_steps": 5, "weight_decay": 0.1})
    found = read(
        small,
        tmp_path,
        [entry],
        given=[
            "--max_steps",
            "3",
            "--finetune.weight_decay=0.3",
            "--no_group_by_modality_length",
            "--heldout.limit",
            "4",
        ],
        set={"pretrain.max_steps": 9, "weight_decay": 0.2, "heldout.limit": 2},
    )
    assert found.values_of(found.entries[0]) == {
        (None, "weight_decay"): 0.1,
        (None, "max_steps"): 3,
        ("finetune", "weight_decay"): 0.3,
        (None, "group_by_modality_length"): False,
        ("heldout", "limit"): "4",
    }
    lower: Values = {("pretrain", "seed"): 1, (None, "bf16"): True}
    assert layered(found.recipe, lower, {(None, "seed"): 2}) == {(None, "seed"): 2, (None, "bf16"): True}


@pytest.mark.parametrize(
    ("more", "texts"),
    [
        ({"seed": 1}, ("'seed'", "'seeds'")),
        ({"name": "../a"}, ("name is '../a'",)),
        ({"recipe": "no.yaml"}, ("recipe is 'no.yaml'",)),
        ({"seeds": [0, 0]}, ("0 is there twice",)),
        ({"seeds": [-1]}, ("seeds is [-1]",)),
        ({"seeds": [True]}, ("seeds is [True]",)),
        ({"seeds": []}, ("seeds is []",)),
        ({"match": "token"}, ("match is 'token'", "tokens")),
        ({"towers": []}, ("towers is []",)),
        ({"validation": {"share": 1.0}}, ("share is 1.0",)),
        ({"validation": {"shares": 0.1}}, ("'shares'", "'share'")),
        ({"groups": {"General": ["heldot"]}}, ("General", "'heldot'", "heldout")),
        ({"learning_rate_stage": "stage2"}, ("'stage2'", "finetune")),
        ({"set": {"learning_rat": 1}}, ("'learning_rat'", "'learning_rate'")),
        ({"set": {"seed": 3}}, ("seed", "comparison's seeds")),
        ({"set": {"tuning.max_steps": 3}}, ("'tuning'",)),
        ({"set": {"max_steps": "many"}}, ("max_steps is 'many'",)),
        ({"set": {"tower": "a.yaml"}}, ("tower",)),
    ],
)
def test_faults_of_the_comparison(small, tmp_path, more, texts):
    refused(lambda: read(small, tmp_path, **more), *texts)


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        ({"name": "siglip"}, ("two entries of one name", "siglip")),
        ({"name": "SigLIP"}, ("siglip and SigLIP", "case")),
        ({"name": ""}, ("towers[0]: name is ''",)),
        ({"name": ".."}, ("name is '..'",)),
        ({"name": "a/b"}, ("name is 'a/b'",)),
        ({"tower": "configs/towers/no_such.yaml"}, ("no_such.yaml", "does not exist")),
        ({"frozen": "yes"}, ("frozen is 'yes'",)),
        ({"learning_rates": [0.0]}, ("learning_rates is [0.0]",)),
        ({"learning_rates": [-1e-3]}, ("learning_rates is [-0.001]",)),
        ({"learning_rates": [1e-3, 1e-3]}, ("each one once",)),
        ({"learning_rates": [1e-3], "set": {"finetune.learning_rate": 1e-3}}, ("both given",)),
        ({"freeze": True}, ("'freeze'", "'frozen'")),
        ({"evaluate": {"limit": 3}}, ("'limit'", "heldout")),
        ({"evaluate": {"heldout.limits": 3}}, ("'limits'", "'limit'")),
        ({"evaluate": {"heldout.limit": 3}}, ("heldout.limit differs: first 3, siglip None",)),
    ],
)
def test_faults_of_an_entry(small, tmp_path, changes, texts):
    refused(lambda: read(small, tmp_path, [small.tower("first") | changes, small.tower("siglip")]), *texts)


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        (["--learning_rat", "1"], ("'learning_rat'",)),
        (["--seed", "1"], ("seed",)),
        (["--pretrian.max_steps", "1"], ("pretrian",)),
        (["--max_steps", "many"], ("max_steps",)),
        (["--tower", "x.yaml"], ("towers",)),
        (["5"], ("'5'",)),
    ],
)
def test_faults_of_the_command_line(small, tmp_path, given, texts):
    refused(lambda: read(small, tmp_path, given=given), "command line", *texts)


def test_a_recipe_without_evaluations_is_refused(small, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((small.folder / "recipe.yaml").read_text().partition("evaluations:")[0])
    refused(lambda: read(small, tmp_path, recipe=str(recipe)), "no evaluations")


# --- what the settings and the data show ------------------------------------------------------------------------------


def checked(small, tmp_path, towers, given=(), **more):
    return driver.check(driver.make_plan(read(small, tmp_path, towers, given, **more), tmp_path / "out"))


def test_what_is_fixed_and_what_differs(small, tmp_path):
    towers = [
        small.tower("clip"),
        small.tower("fine", "fine", set={"finetune.weight_decay": 0.1}),
        small.tower("frozen", frozen=True),
    ]
    found = checked(small, tmp_path, towers)
    rows = {row["what"]: list(row["values"].values()) for row in found.differences}
    assert rows["tokens per image"] == [4, 16, 4] and rows["pixels per image"] == [784, 3136, 784]
    assert rows["weight_decay (finetune)"] == [0, 0.1, 0]
    assert rows["trained parts"][2] == "mm_mlp_adapter,mm_language_model"
    assert found.fixed["pretrain: steps"] == "2" and found.fixed["language model"] == "llm"
    assert "learning rate" not in rows and "records.json (" in found.fixed["finetune: data"]
    assert not any("compression" in what or "pixels" in what for what in rows if what != "pixels per image")
    alike = checked(small, tmp_path, towers)
    assert alike.hash == found.hash
    assert checked(small, tmp_path, towers, ["--max_steps", "3"]).hash != found.hash


def test_tokens_that_differ_do_not_match(small, tmp_path):
    towers = [small.tower("clip"), small.tower("fine", "fine")]
    refused(lambda: checked(small, tmp_path, towers, match="tokens"), "match is tokens", "clip 4, fine 16")
    refused(lambda: checked(small, tmp_path, towers, match="pixels"), "clip 784, fine 3136")
    assert checked(small, tmp_path, towers, match="samples").fixed["training samples"] == "pretrain 8; finetune 8"
    towers[1]["set"] = {"finetune.max_steps": 3}
    refused(lambda: checked(small, tmp_path, towers, match="samples"), "clip pretrain 8; finetune 8, fine pretrain 8")
    same = [small.tower("clip"), small.tower("siglip", "siglip")]
    assert checked(small, tmp_path, same, match="tokens").fixed["tokens per image"] == "4"


def test_a_tower_that_the_projector_cannot_take_is_refused(small, tmp_path):
    odd = tmp_path / "odd.yaml"
    # 4 x 4 tokens in blocks of 2 x 2 are fine, 2 x 2 of a class token with them are none
    odd.write_text((small.folder / "clip.yaml").read_text().replace("feature: patch", "feature: cls_patch"))
    odd.write_text(odd.read_text().replace("mlp2x_gelu", "patch_merger"))
    towers = [small.tower("clip"), small.tower("odd") | {"tower": str(odd)}]
    refused(lambda: checked(small, tmp_path, towers), "towers: odd: pretrain:")


def test_settings_that_no_run_would_take_are_refused(small, tmp_path):
    towers = [small.tower("clip"), small.tower("b", set={"finetune.mm_vision_tower_trainable_blocks": 99})]
    refused(lambda: checked(small, tmp_path, towers), "towers: b: finetune:", "99")


def test_a_tower_alone_cannot_be_frozen(small, tmp_path):
    towers = [small.tower("a", frozen=True, set={"finetune.mm_tunable_parts": "mm_vision_tower"})]
    refused(lambda: checked(small, tmp_path, towers), "frozen", "finetune trains the vision tower alone")


@pytest.mark.parametrize("turns", [[], [{"from": "human", "value": "?"}], [{"from": "gpt", "value": " "}]])
def test_an_evaluation_without_answers_is_refused(tmp_path, turns):
    path = tmp_path / "records.json"
    good = {"id": "a", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "x"}]}
    path.write_text(json.dumps([good]))
    facts.check_answers("heldout", str(path))
    path.write_text(json.dumps([good, {"id": "b7", "conversations": turns}]))
    refused(lambda: facts.check_answers("heldout", str(path)), "heldout", "b7", "without an answer")
    path.write_text("[]")
    refused(lambda: facts.check_answers("heldout", str(path)), "no record")


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "compare").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_comparisons_are_read(path, tmp_path):
    comparison = read_comparison(path)
    assert comparison.name == path.stem == read_yaml(path)["name"]
    plan = driver.make_plan(comparison, tmp_path, written=True)
    assert len(plan.runs) >= len(comparison.entries) * len(comparison.seeds)
