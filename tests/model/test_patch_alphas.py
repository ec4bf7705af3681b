"""Alphas that come with the images: in the packed tower, and in the forward of a model around it."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from llava.constants import IMAGE_TOKEN_INDEX
from llava.errors import LlavaError
from llava.model.adaptive_patches import kept_patches
from tests.model.test_adaptive_tower import BUDGET, NATIVE, SIZES, build, chosen_labels, encoder, make, prepared

__all__ = ["encoder"]  # a fixture


def test_alpha_from_a_range(encoder):
    """It comes with the images, else it is the middle; counted ahead as the most it can be."""
    tower = build(encoder, adaptive_patches={"method": "budget", "alpha": [0.2, 0.8]})
    image = prepared(tower, [(112, 112)])[0][0]
    middle = build(encoder, adaptive_patches=BUDGET).choose_patches([image])
    assert torch.equal(tower.eval().choose_patches([image]).levels, middle.levels)
    assert torch.equal(tower.train().choose_patches([image]).levels, middle.levels)  # nothing is drawn inside
    alphas = [tower.patch_chooser.choice.draw(0, epoch, 3, 0) for epoch in range(40)]
    counts = tower.choose_patches([image] * 40, alphas).lengths
    assert len(set(counts)) > 5 and min(counts) >= 10 and max(counts) <= 51  # of 64: budgets 13 to 51
    for alpha, count in zip(alphas, counts, strict=True):
        alone = build(encoder, adaptive_patches={"method": "budget", "alpha": alpha})
        assert alone.choose_patches([image]).lengths == [count] == tower.choose_patches([image], [alpha]).lengths
    assert tower.patch_chooser.count(image, merging=False) == 49
    lowest = build(encoder, adaptive_patches={"method": "v2", "alpha": [0.5, 1.5]}).patch_chooser
    assert lowest.count(image, False) == len(
        kept_patches(chosen_labels(prepared(tower, [(112, 112)])[1][0], {"method": "v2", "alpha": 0.5})).levels
    )


def test_alphas_go_to_their_images(encoder):
    """Images of several shapes and a clip, which keeps all patches, whatever stands in its place."""
    tower = build(encoder, adaptive_patches=BUDGET)
    images = prepared(tower)[0]
    alphas = [0.3, 0.9, 0.5, 0.2, 0.7]
    alone = [tower.choose_patches([image], [alpha]) for image, alpha in zip(images, alphas, strict=True)]
    together = tower.choose_patches([*images, images[1][None]], [*alphas, 0.1])
    assert together.lengths == [one.lengths[0] for one in alone] + [16] and together.lengths[1] != together.lengths[3]
    assert torch.equal(together.levels[:-16], torch.cat([one.levels for one in alone]))
    assert torch.equal(together.rows[:-16], torch.cat([one.rows for one in alone]))


@pytest.mark.parametrize(
    ("options", "alphas", "words"),
    [
        (BUDGET, [0.5], "patch_alphas: found 1, expected one for each of 2 images"),
        (BUDGET, [0.5, -1.0], "alpha: found"),
        ({"method": "v1"}, [0.5, 0.5], "patch_alphas: found 2, expected none with method v1"),
    ],
)
def test_alphas_that_cannot_be(encoder, options, alphas, words):
    tower = build(encoder, adaptive_patches=options)
    with pytest.raises(LlavaError, match=words):
        tower.choose_patches(prepared(tower, SIZES[:2])[0], alphas)


@pytest.mark.parametrize("training", [True, False])
def test_alphas_come_with_the_batch(encoder, training):
    """`forward` with one alpha an image is the model of that alpha, image by image; a text row's dummy has one too."""
    model = make(encoder, adaptive_patches={"method": "budget", "alpha": [0.2, 1.0]}, **NATIVE).train(training)
    images = prepared(model.get_vision_tower(), SIZES[:3])[0]
    row, alphas = [3, IMAGE_TOKEN_INDEX, 4, 5], [0.3, 0.9, 0.5]

    def loss(images, alphas, rows=None, model=model, modalities=("image",)):
        ids = torch.tensor(rows or [row] * len(images))
        with torch.no_grad():
            labels = torch.where(ids > 3, ids, -100)
            out = model(input_ids=ids, labels=labels, images=images, patch_alphas=alphas, modalities=modalities)
        return out.loss.item()

    alone = [loss([image], [alpha]) for image, alpha in zip(images, alphas, strict=True)]
    assert len(set(alone)) == 3 and np.mean(alone) == pytest.approx(loss(images, alphas), abs=1e-6)
    for image, alpha, expected in zip(images, alphas, alone, strict=True):
        fixed = make(encoder, adaptive_patches={"method": "budget", "alpha": alpha}, **NATIVE).train(training)
        assert loss([image], None, model=fixed) == expected
    assert loss(images[:1], None) == loss(images[:1], [0.6]) != alone[0]  # the middle
    rows = [row, [3, 4, 5, 6], row]
    expected = loss(images[::2], alphas[::2], rows)
    assert loss(images, alphas, rows) == loss(images, alphas, rows, modalities=["image", "text", "image"]) == expected
    assert loss(images, alphas[::-1], rows) != expected
    plain_batch = torch.stack([images[1]] * 2)  # without newlines
    apart = [loss(plain_batch[:1], [alpha]) for alpha in (0.3, 0.9)]
    assert loss(plain_batch, [0.3, 0.9]) == pytest.approx(np.mean(apart), abs=1e-6) and apart[0] != apart[1]
    for wrong in ([0.3], [0.3, 0.9, 0.5, 0.5]):
        with pytest.raises(LlavaError, match=f"patch_alphas: found {len(wrong)}, expected one for each of 3 images"):
            loss(images, wrong, rows)
    plain = make(encoder, adaptive_patches=None, **NATIVE)
    with pytest.raises(LlavaError, match="patch_alphas: found 1, expected none: the tower keeps all patches"):
        loss(images[:1], [0.3], model=plain)


def test_alphas_of_a_prompt(encoder):
    """`generate` with an alpha is the model of that alpha."""
    model = make(encoder, adaptive_patches={"method": "budget", "alpha": [0.2, 1.0]}, **NATIVE).eval()
    image = prepared(model.get_vision_tower(), SIZES[:1])[0]

    def scores(model, **given):
        options = dict(max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True)
        return model.generate(torch.tensor([[3, IMAGE_TOKEN_INDEX, 4]]), images=image, **options, **given).logits[0]

    fixed = make(encoder, adaptive_patches={"method": "budget", "alpha": 0.3}, **NATIVE).eval()
    assert torch.equal(scores(model, patch_alphas=[0.3]), scores(fixed))
    assert not torch.equal(scores(model, patch_alphas=[0.3]), scores(model))


def test_the_contract_does_not_import_its_registry():
    code = (
        "import sys\n"
        "import llava.model.multimodal_encoder.patch_choice, llava.model.multimodal_encoder.base\n"
        "print('llava.model.multimodal_encoder.builder' in sys.modules)\n"
        "from llava.model.multimodal_encoder.builder import COMPRESSED, uses_compression\n"
        "from llava.model import vision_settings\n"
        "print((COMPRESSED, uses_compression) == (vision_settings.COMPRESSED, vision_settings.uses_compression))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", "True"]
