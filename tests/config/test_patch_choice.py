"""`PatchChoice`: its forms, what it refuses, how alpha is drawn, and that it needs no torch."""

import dataclasses
import importlib
import pickle
import subprocess
import sys

import pytest

from llava.config.patch_choice import IMPORTANCES, METHODS, THRESHOLDS
from llava.errors import LlavaError
from llava.model import adaptive_patches
from llava.model.adaptive_patches import PatchChoice

BUDGET = PatchChoice("budget", 0.5)
CHOICES = [
    BUDGET,
    PatchChoice("budget", (0.2, 1.0), "laplacian"),
    PatchChoice("v2", 0.8, "reconstruction", num_scales=2),
    PatchChoice("v1"),
    PatchChoice("v1", importance="laplacian", thresholds=(0.3, 0.2)),
]
DRAWN = [0.37680666303137933, 0.7027549685120411, 0.40779534776246673]
STANDARD = ["budget:0.5", "budget:0.123456789", "budget:1", "v2:1", "v2:0.8", "v1"]


def test_a_choice_is_a_value():
    assert PatchChoice("v1").thresholds == (3.0, 2.0) == THRESHOLDS
    assert PatchChoice("v1", num_scales=2).thresholds == (3.0,)
    assert PatchChoice("v2", 1).alpha == 1.0 and PatchChoice("budget", [0.2, 1]).alpha == (0.2, 1.0)
    assert PatchChoice("v2", 1, "upsample_mse") == PatchChoice("v2", 1.0, "reconstruction")
    assert len({*CHOICES, *CHOICES}) == len(CHOICES)
    with pytest.raises(dataclasses.FrozenInstanceError):
        BUDGET.alpha = 0.3


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_forms_are_read_back(choice):
    assert pickle.loads(pickle.dumps(choice)) == choice
    mapping = choice.to_mapping()
    assert PatchChoice.from_mapping(mapping) == choice and PatchChoice.from_mapping(choice) is choice
    assert all(not isinstance(value, tuple) for value in mapping.values())  # as JSON and YAML have it
    read = PatchChoice.parse(str(choice))
    assert (read.method, read.alpha) == (choice.method, choice.middle)
    if choice.num_scales == 3:
        middle = dataclasses.replace(choice, alpha=choice.middle)
        assert PatchChoice.from_published(**choice.to_published()) == middle


def test_mappings_are_short():
    assert BUDGET.to_mapping() == {"method": "budget", "alpha": 0.5}
    assert PatchChoice("v2", (1, 2), "laplacian", num_scales=4).to_mapping() == {
        "method": "v2",
        "alpha": [1.0, 2.0],
        "importance": "laplacian",
        "num_scales": 4,
    }


@pytest.mark.parametrize("text", STANDARD)
def test_names_are_read_back(text):
    assert str(PatchChoice.parse(text)) == text


@pytest.mark.parametrize("nothing", [None, {"method": "all"}, {"method": "none"}])
def test_all_patches_are_no_choice(nothing):
    assert PatchChoice.from_mapping(nothing) is None


def test_no_choice_by_the_other_names():
    assert all(PatchChoice.parse(text) is None for text in ("none", "all"))
    assert all(PatchChoice.from_published(method) is None for method in ("none", "all", None))
    assert PatchChoice.parse("v2") == PatchChoice("v2", 1.0)


@pytest.mark.parametrize(
    "text", ["budget", "v1:0.5", "none:1", "all:1", "budget:x", "budget:-1", "budget:nan", "budget:inf", "v3", ""]
)
def test_names_that_cannot_be(text):
    with pytest.raises(LlavaError, match=f"^here: found '{text}', expected none, v1, v2, v2:ALPHA or budget:ALPHA$"):
        PatchChoice.parse(text, "here")


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ("budget", "found 'budget', expected a mapping"),
        ({"method": "v1", "labels": 1}, "found 'labels', expected some of method, alpha"),
        ({"alpha": 0.3}, "method: found None, expected one of v1, v2, budget, or all"),
        ({"method": None}, "method: found None"),
        ({"method": ["v1"]}, r"method: found \['v1'\]"),
        ({"method": "entropy", "alpha": 1}, "method: found 'entropy', expected one of v1, v2, budget"),
        ({"method": "budget"}, "alpha: missing, which budget needs"),
        ({"method": "v1", "alpha": 0.3}, "alpha: has no part in method v1, it is used by budget and v2; found 0.3"),
        ({"method": "v2", "alpha": 1, "thresholds": [3, 2]}, "thresholds: has no part in method v2, it is used by v1"),
        ({"method": "all", "alpha": 0.3}, "alpha: found 0.3 with method all, expected v1, v2, budget"),
        ({"method": "v1", "importance": "laplacian"}, "thresholds: missing, which v1 needs"),
        ({"method": "v1", "num_scales": 4}, "thresholds: missing"),
        ({"method": "v1", "thresholds": 3}, "thresholds: found 3, expected a list"),
        ({"method": "v1", "thresholds": [3, "x"]}, "thresholds: found"),
        ({"method": "budget", "alpha": 1, "importance": None}, "importance: found None, expected entropy, laplacian"),
        ({"method": "budget", "alpha": 1, "importance": "upsample_mse"}, "importance: found 'reconstruction' with"),
        ({"method": "budget", "alpha": 1, "num_scales": 2.0}, "num_scales: found 2.0"),
        ({"method": "budget", "alpha": True}, "alpha: found True"),
        ({"method": "budget", "alpha": float("inf")}, "alpha: found inf"),
        ({"method": "budget", "alpha": [0.2, float("nan")]}, r"alpha: found \[0.2, nan\]"),
        (
            {"method": "budget", "alpha": [0.5, 0.2]},
            r"alpha: found \[0.5, 0.2\], expected a number, or two from the lower",
        ),
        ({"method": "budget", "alpha": []}, r"alpha: found \[\]"),
        ({"method": "budget", "alpha": [[0.1, 0.2], 0.3]}, "alpha: found"),
    ],
)
def test_mappings_that_cannot_be(mapping, words):
    with pytest.raises(LlavaError, match=f"^tower.yaml: {words}") as error:
        PatchChoice.from_mapping(mapping, "tower.yaml")
    assert "\n" not in str(error.value)


def test_published_arguments_have_defaults_that_a_method_may_not_use():
    common = {"alpha": 0.3, "patch_thresholds": [2.0, 1.0], "patch_importance": "laplacian"}
    assert PatchChoice.from_published("v1", **common) == PatchChoice("v1", None, "laplacian", (2.0, 1.0))
    assert PatchChoice.from_published("budget", **common) == PatchChoice("budget", 0.3, "laplacian")
    assert PatchChoice.from_published("v1") == PatchChoice("v1")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"patch_selection_method": "best"}, "patch_selection_method: found 'best'"),
        ({"patch_selection_method": "budget", "alpha": -1}, "alpha: found -1"),
        ({"patch_selection_method": "v1", "alpha": -1}, "alpha: found -1"),
        ({"patch_selection_method": "budget", "patch_thresholds": [3]}, r"patch_thresholds: found \[3.0\], expected 2"),
        ({"patch_selection_method": "v2", "patch_importance": "x"}, "patch_importance: found 'x'"),
        ({"patch_selection_method": "budget", "patch_importance": "reconstruction"}, "patch_importance: found 'recons"),
    ],
)
def test_published_arguments_that_cannot_be(arguments, words):
    with pytest.raises(LlavaError, match=f"^{words}"):
        PatchChoice.from_published(**arguments)


OWN = {"method": "budget", "alpha": 0.6, "thresholds": [2.0, 1.0], "importance": "laplacian"}
NAMES = {
    "method": "x.yaml: patch_selection_method",
    "alpha": "x.yaml: patch_alpha",
    "thresholds": "y",
    "importance": "z",
}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, PatchChoice("budget", 0.6, "laplacian")),
        ({"alpha": [0.1, 0.2]}, PatchChoice("budget", (0.1, 0.2), "laplacian")),
        ({"method": "v1"}, PatchChoice("v1", None, "laplacian", (2.0, 1.0))),
        ({"method": "v2", "importance": "entropy"}, PatchChoice("v2", 0.6)),
        ({"method": "all"}, None),
    ],
)
def test_what_is_not_given_is_the_models_own(given, expected):
    assert PatchChoice.completed(given, OWN, NAMES) == expected


@pytest.mark.parametrize(
    ("given", "own", "words"),
    [
        (
            {"alpha": 0.3},
            {"method": None},
            "x.yaml: patch_alpha: found 0.3 with patch_selection_method None, expected v1",
        ),
        ({"alpha": 0.3, "method": "all"}, {}, "x.yaml: patch_alpha: found 0.3 with patch_selection_method all"),
        ({"alpha": 0.3}, {"method": "v1"}, "x.yaml: patch_alpha: has no part in method v1"),
        ({"importance": "reconstruction"}, {}, "z: found 'reconstruction' with method budget"),
    ],
)
def test_completions_that_cannot_be(given, own, words):
    with pytest.raises(LlavaError, match=f"^{words}"):
        PatchChoice.completed(given, OWN | own, NAMES)


def test_alpha_is_drawn_from_four_numbers_alone():
    """The values are fixed: a run that is resumed or repeated elsewhere must draw the same."""
    choice = PatchChoice("budget", (0.2, 0.9))
    assert choice.draws and choice.middle == 0.55
    assert choice.draw(3, 0, 0, 0) == DRAWN[0] and choice.draw(3, 1, 0, 0) == DRAWN[1]
    assert choice.draw(seed=0, epoch=2, record=17, image=1) == DRAWN[2]
    found = [choice.draw(3, epoch, record, image) for epoch in range(3) for record in range(50) for image in range(2)]
    assert len(set(found)) == 300 and 0.2 <= min(found) < 0.22 and 0.88 < max(found) <= 0.9
    assert PatchChoice("v2", (0.2, 0.9), "laplacian").draw(3, 0, 0, 0) == DRAWN[0]


def test_a_fixed_alpha_is_not_drawn():
    assert not BUDGET.draws and BUDGET.draw(0, 1, 2, 3) == BUDGET.middle == 0.5
    assert not PatchChoice("v1").draws and PatchChoice("v1").draw(0, 0, 0, 0) is PatchChoice("v1").middle is None


def test_descriptions():
    assert [choice.description for choice in (BUDGET, CHOICES[1], CHOICES[3])] == [
        "budget, alpha 0.5",
        "budget, alpha 0.2 to 1.0",
        "v1, thresholds (3.0, 2.0)",
    ]


def test_names_stand_for_what_there_is():
    tokenizer = importlib.import_module("llava.model.adaptive_patches.tokenizer")
    assert tuple(tokenizer.IMPORTANCES) == IMPORTANCES
    for method in METHODS:
        options = {"thresholds": THRESHOLDS} if method == "v1" else {"alpha": 1.0}
        one = tokenizer.PatchTokenizer.from_choice(PatchChoice(method, **options), 14, [0.0], [1.0])
        assert (one.method, one.importance, one.num_scales) == (method, "entropy", 3)


@pytest.mark.parametrize("name", adaptive_patches.__all__)
def test_every_exported_name_resolves(name):
    assert getattr(adaptive_patches, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'NoSuchName'"):
        adaptive_patches.NoSuchName  # noqa: B018


def test_a_choice_needs_no_torch():
    code = (
        "import sys\n"
        "from llava.model.adaptive_patches import PatchChoice\n"
        "from llava.config import resolve\n"
        "print(PatchChoice.from_mapping({'method': 'budget', 'alpha': [0.3, 1.0]}))\n"
        "print(resolve(['--adaptive_patches', '{method: v1}', '--image_aspect_ratio', 'pad'])['adaptive_patches'])\n"
        "heavy = {'torch', 'transformers', 'numpy', 'llava.model.multimodal_encoder'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines() == ["budget:0.65", "{'method': 'v1'}", "[]"]
