"""Packed rows of LLaVA's families against their samples one by one: loss and every gradient, vision included."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.data.collator import DataCollatorForSupervisedDataset
from llava.model.multimodal_encoder.builder import TOWERS
from tests.model import small

X, SIDE, COUNT = IMAGE_TOKEN_INDEX, 28, 11.0
COLLATE, PACK = DataCollatorForSupervisedDataset(0), DataCollatorForSupervisedDataset(0, pack=True)


def sample(images: int, texts: int = 3, seed: int = 0, crops: int = 1, kind: str = "image") -> dict:
    """Images with `texts` tokens behind each, every second token supervised; with none, text alone."""
    generator = torch.Generator().manual_seed(seed)
    ids = []
    for _ in range(max(images, 1)):
        ids += [X] * (images > 0) + torch.randint(3, small.VOCAB, (texts,), generator=generator).tolist()
    labels = [token if at % 2 and token != X else IGNORE_INDEX for at, token in enumerate(ids)]
    if not images:
        labels[0] = ids[0]  # as LLaVA-NeXT's qwen template has it: of a whole row it is never predicted
    made = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
    if not images:
        return made
    shape = (crops, 3, SIDE, SIDE) if crops > 1 or kind == "video" else (3, SIDE, SIDE)
    pictures = [small.pixels(*shape, seed=10 * seed + number) for number in range(images)]
    return made | {"images": pictures, "image_sizes": [(50, 56)] * images, "modalities": [kind] * images}


def mixture() -> list[dict]:
    made = [sample(1, 4, 1, crops=5), sample(0, 6, 2), sample(3, 2, 3), sample(1, 3, 4, crops=2, kind="video")]
    return [*made, sample(0, 2, 5), sample(1, 9, 6)]


def gradients(model, batches: list[dict]) -> tuple[float, dict]:
    """The summed loss over all batches and its gradients."""
    model.zero_grad()
    loss = sum(model(**batch, num_items_in_batch=COUNT).loss for batch in batches)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_packed(model, samples: list[dict], limit: float = 1e-5) -> None:
    alone, expected = gradients(model, [COLLATE([one]) for one in samples])
    packed, found = gradients(model, [PACK(samples)])
    assert packed == pytest.approx(alone, abs=limit)
    assert found.keys() == expected.keys()
    worst = {name: (found[name] - value).abs().max().item() for name, value in expected.items()}
    assert max(worst.values()) < limit, max(worst.items(), key=lambda item: item[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("towers")


@pytest.fixture(scope="module")
def build(folder):
    """A model in training mode, all of it trained, whose tower is of a kind."""
    towers = {}

    def of(family="qwen", kind="clip", **changes):
        if kind not in towers:
            towers[kind] = small.tower(folder / kind, side=SIDE, kind=kind)
        changes = {"image_grid_pinpoints": "(1x1),...,(2x2)", "mm_vision_tower_type": kind, **changes}
        model = small.model(towers[kind], family, **changes).train().requires_grad_(True)
        model.config._attn_implementation = "varlen"
        return model

    return of


@pytest.mark.parametrize("family", small.FAMILIES)
def test_every_family(build, family):
    check_packed(build(family), mixture())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_checkpointing(build, checkpointing):
    model = build()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    check_packed(model, mixture())


OF_TOWER = {"clip_s2": {"s2_scales": f"{SIDE},{2 * SIDE}", "mm_patch_merge_type": "flat"}}
MERGES = ["flat", "spatial", "spatial_unpad", "spatial_nobase", "spatial_maxpool2x2"]


@pytest.mark.parametrize("merge", MERGES)
def test_every_merge(build, merge):
    check_packed(build(mm_patch_merge_type=merge), mixture())


@pytest.mark.parametrize("kind", [kind for kind in TOWERS if kind != "clip"])
def test_every_tower(build, kind):
    check_packed(build(kind=kind, **OF_TOWER.get(kind, {})), mixture())


ONCE: list = []  # the model that all examples share


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(2, 9)), min_size=1, max_size=7))
def test_any_samples(build, shapes):
    if not ONCE:
        ONCE.append(build())
    check_packed(ONCE[0], [sample(images, texts, seed) for seed, (images, texts) in enumerate(shapes)])


def test_a_sample_has_no_part_in_anothers_loss(build):
    """The gradient of each sample's loss with respect to the others' embeddings is exactly zero."""
    model, samples = build(), mixture()
    batch = PACK(samples)
    embeds = []
    hook = model.get_model().register_forward_pre_hook(
        lambda module, args, kwargs: embeds.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    lengths = [prepared_length(model, one) for one in samples]
    bounds = [0, *itertools.accumulate(lengths)]
    for number, one in enumerate(samples):
        labels = batch["labels"].clone()
        labels[[other for other in range(len(samples)) if other != number]] = IGNORE_INDEX
        host = PACK(
            [
                other if at == number else {**other, "labels": labels[at][: len(other["input_ids"])]}
                for at, other in enumerate(samples)
            ]
        )
        loss = model(**host).loss
        (gradient,) = torch.autograd.grad(loss, embeds[-1], retain_graph=False)
        own = gradient[0, bounds[number] : bounds[number + 1]]
        assert gradient.shape[1] == bounds[-1] and own.any(), one
        rest = torch.cat([gradient[0, : bounds[number]], gradient[0, bounds[number + 1] :]])
        assert not rest.any()
    hook.remove()


def prepared_length(model, one: dict) -> int:
    batch = COLLATE([one])
    names = ("images", "modalities", "image_sizes")
    media = [batch.get(name, [] if name == "images" else None) for name in names]
    return model.prepare_inputs_labels_for_multimodal(
        batch["input_ids"], None, batch["attention_mask"], None, batch["labels"], *media
    )[4].shape[1]


def test_a_row_without_samples(build):
    """What a rank gets that is short of rows: a forward with a loss of zero, in which every part has a gradient."""
    model = build()
    loss, found = gradients(model, [PACK([])])
    assert loss == 0 and not any(value.any() for value in found.values())
    assert found.keys() == gradients(model, [PACK(mixture())])[1].keys()


def test_each_sample_is_cut_by_itself(build):
    model = build(tokenizer_model_max_length=9)
    check_packed(model, [sample(1, 12, 1), sample(0, 12, 2), sample(0, 4, 3)])
