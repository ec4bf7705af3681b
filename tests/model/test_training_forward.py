"""The loss in training mode: the same number as the full logits give, and gradients that are right."""

import copy

import pytest
import torch
import torch.nn.functional as F

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from tests.model import small

X = IMAGE_TOKEN_INDEX
SIDE = 28


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    return small.tower(tmp_path_factory.mktemp("clip"), side=SIDE)


@pytest.fixture(scope="module", params=["qwen", "gemma2"])
def model(tower, request):
    return small.model(tower, request.param, image_grid_pinpoints="(1x1),...,(2x2)")


@pytest.fixture
def trained(model):
    """The model in training mode, all parameters trainable; afterwards as before."""
    model.train().requires_grad_(True)
    yield model
    model.zero_grad()
    model.gradient_checkpointing_disable()
    model.eval()


def batch(labelled=True):
    ids = torch.tensor([[11, X, 12, 13, 14, 15], [21, 22, 23, 0, 0, 0], [31, X, 32, X, 33, 0]])
    labels = torch.tensor(
        [[-100, -100, 12, 13, -100, 15], [-100, 22, 23, -100, -100, -100], [-100, -100, -100, -100, 33, -100]]
    )
    return {
        "input_ids": ids,
        "attention_mask": ids != 0,
        "labels": labels if labelled else torch.full_like(labels, IGNORE_INDEX),
        "images": [small.pixels(5, 3, SIDE, SIDE), small.pixels(3, SIDE, SIDE), small.pixels(2, 3, SIDE, SIDE, seed=4)],
        "image_sizes": [(50, 56), (20, 30), (20, 30)],
        "modalities": ["image", "image", "video"],
    }


def loss_of_logits(model, inputs, count=None):
    """From full logits, by hand: the token at t is predicted at t - 1."""
    inputs = dict(inputs)
    labels = inputs.pop("labels")
    merged = model.prepare_inputs_labels_for_multimodal(
        inputs["input_ids"],
        None,
        inputs["attention_mask"],
        None,
        labels,
        inputs["images"],
        inputs["modalities"],
        inputs["image_sizes"],
    )
    logits = model(**inputs).logits
    losses = [
        -F.log_softmax(logits[b, t - 1].float(), -1)[target]
        for b, row in enumerate(merged[5].tolist())
        for t, target in enumerate(row)
        if t and target != IGNORE_INDEX
    ]
    return torch.stack(losses).sum() / (count or len(losses))


def gradients(model, inputs, **kwargs):
    model.zero_grad()
    loss = model(**inputs, **kwargs).loss
    loss.backward()
    return loss.item(), {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def same(a, b, atol=1e-5):
    return a.keys() == b.keys() and all(torch.allclose(a[key], b[key], atol=atol) for key in a)


def test_loss_is_that_of_the_full_logits(trained):
    inputs = batch()
    out = trained(**inputs)
    expected = loss_of_logits(trained, inputs)
    assert out.logits is None and abs(out.loss - expected).item() < 1e-5
    for count in (4, torch.tensor(7)):
        found = trained(**inputs, num_items_in_batch=count).loss
        assert abs(found - loss_of_logits(trained, inputs, int(count))).item() < 1e-5
    trained.eval()
    with torch.no_grad():
        evaluated = trained(**inputs)
    assert abs(evaluated.loss - expected).item() < 1e-5 and evaluated.logits.shape[-1] == small.VOCAB
    assert trained(**{k: v for k, v in inputs.items() if k != "labels"}).loss is None


def test_gradients_are_those_of_the_full_logits(trained):
    inputs = batch()
    _, found = gradients(trained, inputs)
    trained.zero_grad()
    loss_of_logits(trained, inputs).backward()
    expected = {k: p.grad for k, p in trained.named_parameters() if p.grad is not None}
    assert same(found, expected)
    for part in ("vision_tower", "mm_projector", "image_newline", "embed_tokens", "lm_head"):
        assert any(part in name and gradient.abs().sum() > 0 for name, gradient in found.items())


def test_batch_without_labels(trained):
    """Loss 0 and no movement, not NaN."""
    for kwargs in ({}, {"num_items_in_batch": 0}, {"num_items_in_batch": torch.tensor(0)}):
        loss, found = gradients(trained, batch(labelled=False), **kwargs)
        assert loss == 0 and len(found) > 40
        assert all(torch.count_nonzero(g) == 0 and torch.isfinite(g).all() for g in found.values())
    trained.eval()
    with torch.no_grad():
        out = trained(**batch(labelled=False))
    assert out.loss == 0 and out.logits is not None


def test_gradient_checkpointing(trained):
    loss, expected = gradients(trained, batch())
    trained.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert trained.is_gradient_checkpointing
    again, found = gradients(trained, batch())
    assert abs(loss - again) < 1e-6 and same(found, expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_does_not_count(tower, attention, side):
    """Rows of different lengths together give what each gives alone, with and without the mask that is left out."""
    model = small.model(tower, image_grid_pinpoints="(1x1),...,(2x2)", tokenizer_padding_side=side)
    model.set_attn_implementation({"": attention})
    model.train().requires_grad_(True)
    inputs, images = batch(), ((0, 1), (1, 1), (1, 3))
    loss, found = gradients(model, inputs)
    total, sums = 0.0, {}
    for row, (first, last) in enumerate(images):
        keep = inputs["attention_mask"][row]
        one = {k: inputs[k][row : row + 1, keep] for k in ("input_ids", "labels", "attention_mask")}
        one |= {k: inputs[k][first:last] for k in ("images", "image_sizes", "modalities")}
        value, grads = gradients(model, one, num_items_in_batch=6)
        total += value
        for key, g in grads.items():
            sums[key] = sums.get(key, 0) + g
    assert int((inputs["labels"][:, 1:] != IGNORE_INDEX).sum()) == 6
    assert abs(loss - total) < 1e-5 and same(found, sums)
    expected = loss_of_logits(model, inputs)
    assert abs(loss - expected.item()) < 1e-5


def test_a_mask_that_was_given_with_embeddings_counts(trained):
    """The mask is only left out where the merge has put the padding: on the right."""
    embeds, labels = small.pixels(1, 4, 32), torch.tensor([[5, 6, 7, 8]])
    padded = torch.cat([torch.zeros(1, 3, 32), embeds], dim=1)
    padded_labels = torch.cat([torch.full((1, 3), IGNORE_INDEX), torch.tensor([[-100, 6, 7, 8]])], dim=1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    alone = trained(inputs_embeds=embeds, labels=labels).loss
    found = trained(inputs_embeds=padded, labels=padded_labels, attention_mask=mask).loss
    assert abs(alone - found).item() < 1e-5


def test_text_batch_in_training(trained):
    """No image in the batch, or only a text row's dummy: the loss of the text alone, gradients of zero for the rest."""
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    inputs = {"input_ids": ids, "labels": torch.where(ids > 0, ids, -100), "attention_mask": ids != 0}
    plain, found = gradients(trained, inputs)
    of_images = [value for key, value in found.items() if "vision_tower" in key or "mm_projector" in key]
    assert len(of_images) > 4 and not any(value.any() for value in of_images)
    dummies = {"images": [small.pixels(3, SIDE, SIDE)] * 2, "image_sizes": [(9, 9)] * 2, "modalities": ["text"] * 2}
    assert abs(gradients(trained, {**inputs, **dummies})[0] - plain) < 1e-6
    trained.eval()
    with torch.no_grad():
        assert abs(trained(**inputs).loss.item() - plain) < 1e-5


def test_frozen_parts_get_no_gradient(model):
    other = copy.deepcopy(model).train().requires_grad_(True)
    other.get_vision_tower().requires_grad_(False)
    _, found = gradients(other, batch())
    assert not any("vision_tower" in key for key in found) and any("mm_projector" in key for key in found)
    other.requires_grad_(False)
    other.model.mm_projector.requires_grad_(True)
    _, projector = gradients(other, batch())
    assert all("mm_projector" in key for key in projector) and len(projector) == 4
    assert all(torch.allclose(projector[key], found[key], atol=1e-5) for key in projector)
