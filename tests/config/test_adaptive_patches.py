"""`adaptive_patches` and its published keys: one setting, by precedence, whichever names a layer uses."""

import subprocess
import sys

import pytest

from llava.config import resolve
from llava.config.checks import patch_names
from llava.config.keys import PATCH_KEYS
from llava.config.patch_choice import PUBLISHED
from llava.errors import LlavaError


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function: (train YAML, flags) -> resolved run; the tower YAML of a text with `tower: tower.yaml`."""
    monkeypatch.chdir(tmp_path)

    def resolved(text: str, *flags: str, tower: str = ""):
        (tmp_path / "train.yaml").write_text(text)
        (tmp_path / "tower.yaml").write_text(tower)
        return resolve(["train.yaml", *flags])

    return resolved


def setting(run):
    """(value, source), and the published keys that keep a value of their own."""
    return run["adaptive_patches"], run.source("adaptive_patches"), {n for n in PATCH_KEYS if run[n] is not None}


HOUSE = "adaptive_patches: {method: budget, alpha: [0.2, 1.0]}\n"
WHOLE = {"method": "budget", "alpha": [0.2, 1.0]}
OLD = "patch_selection_method: budget\npatch_alpha: [0.2, 1.0]\n"
OLD_NAMES = {"patch_selection_method", "patch_alpha"}


@pytest.mark.parametrize(
    ("text", "flags", "expected"),
    [
        ("seed: 1\n", [], (None, "default", set())),
        (HOUSE, [], (WHOLE, "train.yaml", set())),
        (OLD, [], (WHOLE, "train.yaml", OLD_NAMES)),
        (OLD, ["--patch_alpha", "0.5"], ({"method": "budget", "alpha": 0.5}, "command line", OLD_NAMES)),
        (HOUSE, ["--patch_alpha", "0.5"], ({"method": "budget", "alpha": 0.5}, "command line", set())),
        (HOUSE, ["--adaptive_patches", "{method: v1}"], ({"method": "v1"}, "command line", set())),
        (OLD, ["--adaptive_patches", "{method: v1}"], ({"method": "v1"}, "command line", set())),
        (OLD, ["--adaptive_patches", "none"], (None, "command line", set())),
        (HOUSE, ["--patch_selection_method", "v1", "--patch_alpha", "none"], ({"method": "v1"}, "command line", set())),
        ("adaptive_patches: {method: all}\n", [], ({"method": "all"}, "train.yaml", set())),
        (
            "adaptive_patches: {method: all}\n",
            ["--patch_selection_method", "budget", "--patch_alpha", "0.5", "--patch_importance", "laplacian"],
            ({"method": "budget", "alpha": 0.5, "importance": "laplacian"}, "command line", set()),
        ),
        ("patch_selection_method: all\n", [], ({"method": "all"}, "train.yaml", {"patch_selection_method"})),
        # what these leave out is for the model's own image processor to say
        ("patch_alpha: 0.5\n", [], ({"alpha": 0.5}, "train.yaml", {"patch_alpha"})),
        ("patch_alpha: 0.5\n", ["--patch_alpha", "none"], (None, "default", set())),
        (
            "patch_thresholds: [2, 1]\n",
            ["--patch_importance", "laplacian"],
            ({"thresholds": [2.0, 1.0], "importance": "laplacian"}, "command line", {*PATCH_KEYS} - OLD_NAMES),
        ),
    ],
)
def test_one_setting(run, text, flags, expected):
    assert setting(run(text, *flags)) == expected


def test_a_towers_choice_may_be_changed_member_by_member(run):
    tower = "vision_tower: x\nmm_vision_tower_type: hevc_vit_packing\n" + HOUSE
    found = run("tower: tower.yaml\n", "--patch_alpha", "0.3", tower=tower)
    assert setting(found) == ({"method": "budget", "alpha": 0.3}, "command line", set())


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        (HOUSE + "patch_alpha: 0.5\n", [], "train.yaml: adaptive_patches and patch_alpha are both given, expected one"),
        (
            "seed: 1\n",
            ["--adaptive_patches", "{method: v1}", "--patch_importance", "entropy"],
            "command line: adaptive_patches and patch_importance are both given",
        ),
        (
            "adaptive_patches: {method: budget}\n",
            [],
            "train.yaml: adaptive_patches: alpha: missing, which budget needs",
        ),
        ("adaptive_patches: {alpha: 0.5}\n", [], "train.yaml: adaptive_patches: method: found None"),
        ("adaptive_patches: {method: all, alpha: 0.5}\n", [], "adaptive_patches: alpha: found 0.5 with method all"),
        (HOUSE, ["--patch_selection_method", "v1"], "command line: adaptive_patches: alpha: has no part in method v1"),
        (
            HOUSE,
            ["--patch_alpha", "[0.5, 0.3]"],
            "adaptive_patches: alpha: found [0.5, 0.3], expected a number, or two",
        ),
        (HOUSE, ["--patch_selection_method", "none"], "command line: adaptive_patches: method: found None"),
        (
            OLD,
            ["--patch_alpha", "[0.5, 0.3]"],
            "command line: patch_alpha: found [0.5, 0.3], expected a number, or two",
        ),
        ("patch_alpha: -1\n", [], "train.yaml: patch_alpha is -1.0, expected number from 0"),
        (
            OLD,
            ["--patch_selection_method", "all"],
            "train.yaml: patch_alpha: found [0.2, 1.0] with patch_selection_method",
        ),
        ("patch_alpha: 0.5\npatch_thresholds: [1]\n", [], "train.yaml: patch_alpha: has no part in method v1"),
        ("patch_thresholds: [1]\n", [], "train.yaml: patch_thresholds: found [1.0], expected 2 numbers"),
        (OLD + "patch_importance: reconstruction\n", [], "train.yaml: patch_importance: found 'reconstruction' with"),
        (OLD + "patch_importance: colour\n", [], "patch_importance is 'colour', expected one of entropy, laplacian"),
    ],
)
def test_refused(run, text, flags, message):
    with pytest.raises(LlavaError) as error:
        run(text, *flags)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_names_say_where_a_member_was_given(run):
    assert patch_names(run(HOUSE))["alpha"] == "train.yaml: adaptive_patches: alpha"
    assert patch_names(run("patch_alpha: 0.5\n", "--patch_importance", "entropy")) == {
        "method": "patch_selection_method",
        "alpha": "train.yaml: patch_alpha",
        "thresholds": "patch_thresholds",
        "importance": "command line: patch_importance",
    }


def test_the_keys_are_the_published_arguments_members():
    assert set(PATCH_KEYS.values()) == set(PUBLISHED)


def test_checks_import_no_tower():
    code = (
        "import sys, llava.config\n"
        "llava.config.resolve(['--adaptive_patches', '{method: budget, alpha: 0.5}', '--patch_importance', 'none'])\n"
        "print([name for name in sys.modules if name.startswith('llava.model.') or name == 'torch'])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
