"""`PatchTokenizer`: from normalised images to patches."""

import math

import numpy as np
import pytest
import torch

from llava.config.patch_choice import METHODS
from llava.errors import LlavaError
from llava.model.adaptive_patches import (
    PatchTokenizer,
    patch_entropy,
    patch_laplacian,
    patch_reconstruction_error,
    select_patches_by_budget,
    select_patches_by_threshold,
    select_patches_by_threshold_v2,
)
from tests.model.adaptive_patches.pictures import noise, picture

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def tokenizer(**changes):
    values = {"num_scales": 3, "base_patch_size": 14, "thresholds": [3.0, 2.0], "mean": MEAN, "std": STD}
    return PatchTokenizer(**{**values, **changes})


def normalised(pixels, mean=MEAN, std=STD):
    mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
    return (pixels / 255 - mean) / std


@pytest.mark.parametrize(
    "method, compute",
    [
        ("entropy", patch_entropy),
        ("laplacian", patch_laplacian),
        ("reconstruction", patch_reconstruction_error),
        ("upsample_mse", patch_reconstruction_error),
    ],
)
def test_maps_are_those_of_the_pixels(method, compute):
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 4, 7)  # every level, in each channel
    expected = compute(pixels, 14)
    for mean, std in [(MEAN, STD), ((0.5,) * 3, (0.5,) * 3), ((0, 0, 0), (1, 1, 1))]:
        maps = tokenizer(method=method, mean=mean, std=std).compute_importance_maps(normalised(pixels, mean, std))
        assert all(torch.equal(maps[size], expected[size]) for size in expected)
        plain = tokenizer(method=method, mean=mean, std=std).compute_importance_maps(pixels)
        assert all(torch.equal(plain[size], expected[size]) for size in expected)


def test_transformers_processor_gives_the_same_maps():
    from PIL import Image
    from transformers import CLIPImageProcessorPil

    pixels = picture(2)
    processor = CLIPImageProcessorPil(do_resize=False, do_center_crop=False)
    image = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    maps = tokenizer().compute_importance_maps(processor(image, return_tensors="pt")["pixel_values"])
    assert all(torch.equal(values, patch_entropy(pixels, 14)[size]) for size, values in maps.items())


@pytest.mark.parametrize(
    "selection, select",
    [
        ("v1", lambda maps: select_patches_by_threshold(maps, [3.0, 2.0])),
        ("v2", lambda maps: select_patches_by_threshold_v2(maps, 0.8)),
        ("budget", lambda maps: select_patches_by_budget(maps, alpha=0.8)),
    ],
)
def test_masks_are_those_of_the_selection(selection, select):
    one = tokenizer(patch_selection_method=selection, alpha=0.8)
    maps = patch_entropy(torch.cat([picture(2), noise(1, 3, 224, 224)]), 14)
    masks, labels, tokens = one.construct_masks(maps)
    expected_masks, expected_labels = select(maps)
    assert torch.equal(labels, expected_labels)
    assert all(torch.equal(masks[size], expected_masks[size]) for size in (14, 28, 56))
    assert tokens == [sum(int(masks[size][image].sum()) for size in masks) for image in range(2)]
    assert len(set(tokens)) == (1 if selection == "budget" else 2)


@pytest.mark.parametrize("selection", ["v1", "v2", "budget"])
def test_old_and_new_names_of_the_arguments_are_one(selection):
    """`method` is published as the importance, and is the selection by its new meaning; a call may name one too."""
    images = normalised(torch.cat([picture(2), noise(1, 3, 224, 224)]))
    published = tokenizer(method="laplacian", patch_selection_method=selection, alpha=0.8, thresholds=[0.3, 0.2])
    maps = published.compute_importance_maps(images)
    expected = published.construct_masks(maps)
    for one in (
        tokenizer(method=selection, importance="laplacian", alpha=0.8, thresholds=[0.3, 0.2]),
        PatchTokenizer(3, 14, [0.3, 0.2], MEAN, STD, "laplacian", selection, 0.8),
        tokenizer(
            method=selection, patch_selection_method=selection, importance="laplacian", alpha=0.8, thresholds=[0.3, 0.2]
        ),
    ):
        found = one.construct_masks(one.compute_importance_maps(images))
        assert torch.equal(found[1], expected[1]) and found[2] == expected[2]
    other = tokenizer(method="v1" if selection == "v2" else "v2", importance="laplacian", thresholds=[0.3, 0.2])
    found = other.construct_masks(maps, patch_selection_method=selection, alpha=0.8)
    assert torch.equal(found[1], expected[1]) and (other.last_budget_info is None) == (selection != "budget")
    assert len({tuple(tokenizer(method=m, thresholds=[0.3, 0.2]).construct_masks(maps, 0.8)[2]) for m in METHODS}) == 3


def test_a_call_refuses_what_a_tokenizer_does():
    one = tokenizer(importance="reconstruction", method="v2", thresholds=None)
    maps = one.compute_importance_maps(normalised(picture(2)))
    for method, words in (
        ("budget", "the reconstruction error of all"),
        ("v1", "thresholds: found None"),
        ("v3", "'v3'"),
    ):
        with pytest.raises(LlavaError, match=words):
            one.construct_masks(maps, patch_selection_method=method)


def test_what_a_budget_was_spent_on_is_told():
    one = tokenizer(patch_selection_method="budget", alpha=0.3, thresholds=None)
    assert one.last_budget_info is None
    images = normalised(torch.cat([picture(2), noise(1, 3, 224, 224)]))
    _, _, tokens = one.construct_masks(one.compute_importance_maps(images))
    assert tokens == [76, 76]
    assert {name: values.tolist() for name, values in one.last_budget_info.items()} == {
        "base_tokens": [16, 16],
        "base_small_tokens": [256, 256],
        "budget": [77, 77],
        "k": [20, 20],
        "alpha": [0.3, 0.3],
        "used_tokens": [76, 76],
    }
    assert tokenizer(alpha=0.3).last_budget_info is None


@pytest.mark.parametrize("height, width", [(112, 168), (98, 126)])
def test_groups_hold_the_pooled_pixels_of_their_patches(height, width):
    pixels = noise(2, 3, height, width, seed=3)
    images = normalised(pixels)
    one = tokenizer(patch_selection_method="budget", alpha=0.5)
    masks, _, tokens = one.construct_masks(one.compute_importance_maps(images))
    groups = one.construct_patch_groups(images, masks)
    assert list(groups) == [14, 28, 56] and sum(len(group) for group in groups.values()) == sum(tokens)
    for size, group in groups.items():
        assert len(group) > 0
        side = size // 14
        for patch, (image, row, col) in zip(group, masks[size].nonzero().tolist(), strict=True):
            whole = images[image, :, size * row : size * (row + 1), size * col : size * (col + 1)].double().numpy()
            np.testing.assert_allclose(patch, whole.reshape(3, 14, side, 14, side).mean((2, 4)), atol=1e-6, rtol=0)


def test_sizes_without_a_patch_give_empty_groups():
    one = tokenizer(patch_selection_method="budget", alpha=1.0)
    for images in (torch.zeros(1, 3, 56, 56), torch.zeros(1, 3, 14, 28)):
        masks, labels, tokens = one.construct_masks(one.compute_importance_maps(images))
        groups = one.construct_patch_groups(images, masks)
        assert {size: tuple(group.shape) for size, group in groups.items()} == {
            14: (labels.numel(), 3, 14, 14),
            28: (0, 3, 14, 14),
            56: (0, 3, 14, 14),
        }
        assert tokens == [labels.numel()]


def test_an_image_that_ends_inside_a_patch_is_selected_but_not_cut():
    """220 pixels are 15 whole cells and a part: that part is a base cell, and no larger patch reaches into it."""
    one = tokenizer(patch_selection_method="budget", alpha=0.2)
    images = normalised(noise(1, 3, 220, 224))
    masks, labels, tokens = one.construct_masks(one.compute_importance_maps(images))
    assert labels.shape == (1, 16, 16) and (labels[:, 14:] == 1).all() and (labels[:, 12:14] < 3).all()
    assert one.last_budget_info["base_tokens"].tolist() == [12 + 8 + 32] and tokens == [52]
    with pytest.raises(LlavaError, match="images: found 220x224 pixels, expected multiples of the patch size 14"):
        one.construct_patch_groups(images, masks)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"method": "gradient"}, "method: found 'gradient', expected entropy, laplacian, reconstruction"),
        ({"patch_selection_method": "v3"}, "patch_selection_method: found 'v3', expected v1, v2, budget"),
        ({"thresholds": [3.0]}, "thresholds: found .3.0., expected 2 numbers for 3 scales"),
        ({"thresholds": None}, "thresholds: found None"),
        ({"thresholds": [3.0], "patch_selection_method": "v2"}, "thresholds: found .3.0., expected 2 numbers"),
        ({"alpha": -0.5}, "alpha: found -0.5"),
        ({"alpha": math.nan}, "alpha: found nan"),
        ({"num_scales": 0}, "num_scales: found 0"),
        ({"base_patch_size": 14.5}, "base_patch_size: found 14.5"),
        ({"std": [1.0]}, "mean, std: found"),
        ({"std": [1.0, 0.0, 1.0]}, "no std of 0"),
        ({"mean": 0.5}, "mean: found 0.5, expected one number a channel"),
        ({"importance": "gradient"}, "importance: found 'gradient', expected entropy"),
        ({"method": "v2", "patch_selection_method": "v1"}, "method, patch_selection_method: found 'v2' and 'v1'"),
        ({"method": "entropy", "importance": "laplacian"}, "method, importance: found 'entropy' and 'laplacian'"),
        ({"method": "budget", "importance": "reconstruction"}, "importance: found 'reconstruction' with method budget"),
        (
            {"method": "reconstruction", "patch_selection_method": "budget"},
            "the reconstruction error of all base patch",
        ),
    ],
)
def test_bad_choices_are_refused(changes, message):
    with pytest.raises(LlavaError, match=message) as error:
        tokenizer(**changes)
    assert "\n" not in str(error.value)


def test_bad_inputs_are_refused():
    one = tokenizer()
    images = torch.zeros(1, 3, 56, 56)
    with pytest.raises(LlavaError, match="NaN or infinite"):
        one.compute_importance_maps(images * math.nan)
    with pytest.raises(LlavaError, match=r"images: found \[1, 1, 56, 56\], expected a tensor \[B, 3, H, W\]"):
        one.compute_importance_maps(images[:, :1])
    maps = one.compute_importance_maps(images)
    with pytest.raises(LlavaError, match=r"maps: found sizes \[14, 28\], expected \[14, 28, 56\]"):
        one.construct_masks({size: maps[size] for size in (14, 28)})
    masks, _, _ = one.construct_masks(maps)
    with pytest.raises(LlavaError, match=r"masks: size 14: found \[1, 4, 4\], expected \[1, 8, 4\]"):
        one.construct_patch_groups(torch.zeros(1, 3, 112, 56), masks)
    with pytest.raises(LlavaError, match="masks: size 56: found a patch that sticks out"):
        one.construct_patch_groups(images[..., :42], {14: masks[14][..., :3], 28: masks[28], 56: masks[56] | True})


# --- the published forms of a call ---


@pytest.mark.parametrize("method", ["v1", "v2", "budget", "all"])
def test_one_tokenizer_for_all_methods(method):
    """What the call names stands above what the tokenizer was made with."""
    images = normalised(torch.cat([picture(2), noise(1, 3, 224, 224)]))
    values = {"alpha": 0.4, "thresholds": [2.5, 1.5]}
    expected = tokenizer(patch_selection_method=method, **values)
    maps = expected.compute_importance_maps(images)
    expected_masks, expected_levels, expected_tokens = expected.construct_masks(maps)
    made = [tokenizer(), tokenizer(method="budget", alpha=0.9), tokenizer(method="all", image_size=(224, 224))]
    for one in made:
        masks, levels, tokens = one.construct_masks(maps, patch_selection_method=method, **values)
        assert torch.equal(levels, expected_levels) and tokens == expected_tokens
        assert all(torch.equal(masks[size], expected_masks[size]) for size in (14, 28, 56))
        assert (one.last_budget_info is None) == (method != "budget")
    if method == "all":
        assert tokens == [256, 256] and masks[14].all() and not masks[28].any() and (levels == 1).all()


def test_thresholds_of_a_call():
    maps = patch_entropy(noise(1, 3, 224, 224), 14)
    one = tokenizer()
    assert one.construct_masks(maps)[2] == one.construct_masks(maps, thresholds=[3, 2])[2] != [256]
    assert one.construct_masks(maps, thresholds=[0, 0])[2] == [256]
    assert (
        one.construct_masks(maps, thresholds=[9.0, 9.0])[2] == [16] == one.construct_masks(maps, thresholds=(9, 9.5))[2]
    )
    assert one.construct_masks(maps, thresholds=torch.tensor([9.0, 0.0]))[2] == [64] and one.thresholds == [3.0, 2.0]
    for thresholds, words in (([9.0], r"thresholds: found \[9.0\], expected 2"), ("ab", "thresholds: found 'ab'")):
        with pytest.raises(LlavaError, match=words):
            one.construct_masks(maps, patch_selection_method="v2", thresholds=thresholds)


@pytest.mark.parametrize("form", [list, tuple, torch.tensor, np.array])
def test_an_alpha_for_each_image_in_any_form(form):
    images = torch.cat([picture(2), picture(2), noise(1, 3, 224, 224)])
    one = tokenizer(thresholds=None, method="budget")
    maps = one.compute_importance_maps(normalised(images))
    assert one.construct_masks(maps, alpha=form([0.1, 0.3, 1.0]))[2] == [25, 76, 256]
    assert (
        one.construct_masks(maps, alpha=np.float32(0.25))[2] == one.construct_masks(maps, alpha=torch.tensor(0.25))[2]
    )
    with pytest.raises(LlavaError, match="expected a number, or one for each of 3 images"):
        one.construct_masks(maps, alpha=form([0.1, 0.3]))


def test_images_and_maps_in_other_forms():
    images = normalised(torch.cat([picture(2), noise(1, 3, 224, 224)]))
    one = tokenizer(method="v2", alpha=0.9)
    maps = one.compute_importance_maps(images)
    expected = one.construct_masks(maps)
    assert all(torch.equal(values, maps[size]) for size, values in one.compute_importance_maps(list(images)).items())
    for form in (lambda values: values.numpy(), lambda values: values.tolist()):
        found = one.construct_masks({size: form(values) for size, values in maps.items()})
        assert torch.equal(found[1], expected[1]) and found[2] == expected[2]
    alone = one.construct_masks({size: values[0] for size, values in maps.items()})
    assert torch.equal(alone[1], expected[1][:1]) and alone[2] == expected[2][:1]
    for wrong in ({14: [[1.0], [2.0, 3.0]], 28: [[1.0]], 56: [[1.0]]}, {14: "a", 28: "b", 56: "c"}):
        with pytest.raises(LlavaError, match="maps: found no tensors, arrays or lists of numbers"):
            one.construct_masks(wrong)
    with pytest.raises(LlavaError, match="images: found list, expected a tensor"):
        one.compute_importance_maps([images[0], images[0, :, :56]])


def test_published_names_of_the_constructor():
    """As the published visualisation makes it: an image size, statistics as arrays, all by keyword."""
    images = normalised(picture(2))
    one = PatchTokenizer(
        num_scales=3,
        base_patch_size=14,
        image_size=(224, 224),
        thresholds=[3, 2],
        mean=np.array(MEAN),
        std=np.array(STD),
        method="entropy",
        laplacian_aggregate="mean",
        patch_selection_method="budget",
        alpha=0.3,
    )
    assert one.construct_masks(one.compute_importance_maps(images))[2] == [76] and one.image_size == (224, 224)
    assert tokenizer(patch_importance="laplacian").importance == "laplacian"
    for changes, words in [
        ({"laplacian_aggregate": "max"}, "laplacian_aggregate: found 'max', expected mean"),
        ({"patch_importance": "entropy", "importance": "laplacian"}, "importance, patch_importance: found"),
        ({"patch_importance": "edges"}, "importance: found 'edges'"),
    ]:
        with pytest.raises(LlavaError, match=words):
            tokenizer(**changes)
    with pytest.raises(LlavaError, match="image_size, if it is given, is a keyword here"):
        PatchTokenizer(3, 14, (224, 224), [3, 2], MEAN, STD)
