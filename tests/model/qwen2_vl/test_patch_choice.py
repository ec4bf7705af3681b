"""Qwen2-VL's image processor by the house's name for a choice of patches, and by the published ones."""

import json
from pathlib import Path

import pytest

from llava.config import resolve
from llava.config.checks import patch_names
from llava.errors import LlavaError
from llava.model.adaptive_patches import PatchChoice
from llava.model.qwen2_vl import AdaptiveQwen2VLImageProcessor, AdaptiveQwen2VLProcessor
from tests.model.qwen2_vl.parts import make_folder, picture, prompt

V1 = {"method": "v1", "importance": "laplacian", "thresholds": [0.3, 0.2]}
FORMS = [  # the house's mapping, the published arguments
    ({"method": "budget", "alpha": 0.3}, {"patch_selection_method": "budget", "alpha": 0.3}),
    ({"method": "v2", "alpha": 0.8}, {"patch_selection_method": "v2", "alpha": 0.8}),
    (V1, {"patch_selection_method": "v1", "patch_importance": "laplacian", "patch_thresholds": [0.3, 0.2]}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("qwen2_vl"), "qwen2_vl")


def levels(processor, **kwargs):
    return processor([picture(224, 140)], return_tensors="pt", **kwargs)["image_patch_levels"]


@pytest.mark.parametrize(("mapping", "published"), FORMS)
def test_both_forms_are_one(folder, tmp_path, mapping, published):
    stock = AdaptiveQwen2VLImageProcessor.from_pretrained(folder)
    expected = levels(stock, **published)
    assert len(expected.unique()) > 1
    choice = PatchChoice.from_mapping(mapping)
    for given in (mapping, choice):
        ours = AdaptiveQwen2VLImageProcessor.from_pretrained(folder, adaptive_patches=given)
        assert {name: getattr(ours, name) for name in published} == published and ours.adaptive_patches == choice
        assert levels(ours).equal(expected) and levels(stock, adaptive_patches=given).equal(expected)
    assert levels(AdaptiveQwen2VLImageProcessor(size=dict(stock.size), adaptive_patches=mapping)).equal(expected)
    assert levels(ours, adaptive_patches=choice, **published).equal(expected)  # they agree
    set_later = AdaptiveQwen2VLImageProcessor.from_pretrained(folder)
    set_later.adaptive_patches = mapping
    assert levels(set_later).equal(expected)
    ours.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert {name: saved[name] for name in published} == published and "adaptive_patches" not in saved
    again = AdaptiveQwen2VLImageProcessor.from_pretrained(tmp_path)
    assert again.adaptive_patches == choice
    other = AdaptiveQwen2VLImageProcessor.from_pretrained(tmp_path, adaptive_patches={"method": "v2", "alpha": 2})
    assert other.adaptive_patches == PatchChoice("v2", 2)  # the whole of it, in place of the folder's own


def test_a_processors_call_and_loading(folder):
    one = AdaptiveQwen2VLProcessor.from_pretrained(folder, adaptive_patches={"method": "budget", "alpha": 0.3})
    stock = AdaptiveQwen2VLProcessor.from_pretrained(folder)
    inputs = {"images": picture(224, 140), "text": prompt(1), "return_tensors": "pt"}
    choice = PatchChoice("budget", 0.3)
    found = [one(**inputs)]
    found += [stock(**inputs, images_kwargs={"adaptive_patches": given}) for given in (choice, choice.to_mapping())]
    found += [stock(**inputs, images_kwargs={"patch_selection_method": "budget", "alpha": 0.3})]
    assert all(x[key].equal(found[0][key]) for x in found for key in found[0]) and "image_patch_levels" in found[0]
    every = one(**inputs, images_kwargs={"adaptive_patches": None})
    assert "image_patch_levels" not in every and every["pixel_values"].equal(stock(**inputs)["pixel_values"])


def test_files_of_before_load(folder, tmp_path):
    """Of earlier versions, with every published name whatever the method uses."""
    stored = json.loads((Path(folder) / "preprocessor_config.json").read_text())
    old = {"alpha": 0.3, "patch_thresholds": [2.0, 1.0], "patch_importance": "entropy"}
    choices = {"budget": PatchChoice("budget", 0.3), "v1": PatchChoice("v1", thresholds=(2, 1)), None: None}
    for method, expected in choices.items():
        method = {} if method is None else {"patch_selection_method": method}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(stored | old | method))
        assert AdaptiveQwen2VLImageProcessor.from_pretrained(tmp_path).adaptive_patches == expected


def test_of_a_range_a_folder_has_the_middle(folder):
    images = AdaptiveQwen2VLImageProcessor.from_pretrained(folder)
    images.adaptive_patches = PatchChoice("budget", (0.3, 1.0))
    assert images.alpha == 0.65 and images.adaptive_patches == PatchChoice("budget", 0.65)
    images.adaptive_patches = None
    assert images.patch_selection_method is None and images.adaptive_patches is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"adaptive_patches": {"method": "budget", "alpha": 0.3}, "alpha": 0.5},
            "found 0.3 and alpha 0.5, expected one",
        ),
        ({"adaptive_patches": None, "patch_selection_method": "v1"}, "found None and patch_selection_method 'v1'"),
        (
            {"adaptive_patches": V1, "patch_thresholds": [3.0, 2.0]},
            r"found \[0.3, 0.2\] and patch_thresholds \[3.0, 2.0\]",
        ),
        ({"adaptive_patches": {"method": "v2", "alpha": 1, "num_scales": 2}}, "num_scales: found 2, expected 3"),
        ({"adaptive_patches": {"method": "budget"}}, "alpha: missing"),
    ],
)
def test_contradictions_are_refused(folder, arguments, words):
    images = AdaptiveQwen2VLImageProcessor.from_pretrained(folder)
    for act in (
        lambda: levels(images, **arguments),
        lambda: AdaptiveQwen2VLImageProcessor.from_pretrained(folder, **arguments),
        lambda: AdaptiveQwen2VLImageProcessor(**arguments),
    ):
        with pytest.raises(LlavaError, match=f"adaptive_patches: {words}"):
            act()


OWN = {"patch_selection_method": "v2", "alpha": 0.8, "patch_importance": "laplacian", "patch_thresholds": [0.3, 0.2]}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--patch_alpha", "[0.3, 1.0]"], PatchChoice("v2", (0.3, 1.0), "laplacian")),
        (["--patch_importance", "entropy"], PatchChoice("v2", 0.8)),
        (["--patch_selection_method", "v1"], PatchChoice("v1", None, "laplacian", (0.3, 0.2))),
        (["--patch_selection_method", "budget"], PatchChoice("budget", 0.8, "laplacian")),
        (["--adaptive_patches", "{method: budget, alpha: 0.5}"], PatchChoice("budget", 0.5, "laplacian")),
        (["--adaptive_patches", "{method: budget, alpha: 0.5, importance: entropy}"], PatchChoice("budget", 0.5)),
        (["--patch_selection_method", "all"], None),
        (["--adaptive_patches", "{method: all}"], None),
    ],
)
def test_a_run_completes_its_choice_from_the_processor(folder, flags, expected):
    run = resolve(flags)
    images = AdaptiveQwen2VLImageProcessor.from_pretrained(folder, **OWN)
    assert images.completed(run["adaptive_patches"], patch_names(run)) == expected


@pytest.mark.parametrize(
    ("flags", "own", "words"),
    [
        (["--patch_alpha", "0.5"], {}, "command line: patch_alpha: found 0.5 with patch_selection_method None"),
        (
            ["--patch_alpha", "0.5"],
            {"patch_selection_method": "v1"},
            "command line: patch_alpha: has no part in method v1",
        ),
        (
            ["--patch_selection_method", "budget"],
            {"patch_importance": "reconstruction"},
            "patch_importance: found 'recon",
        ),
    ],
)
def test_completions_refused(folder, flags, own, words):
    run = resolve(flags)
    images = AdaptiveQwen2VLImageProcessor.from_pretrained(folder, **own)
    with pytest.raises(LlavaError, match=f"^{words}"):
        images.completed(run["adaptive_patches"], patch_names(run))
