"""How large a batch is by what the host knows, against what the model's own merge and encoder make of it."""

import pytest
import torch

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.families import get_family
from llava.families.batch_sizes import BatchSizes
from llava.model import llava_arch
from llava.model.host import HostCopies
from tests.model import small

NATIVE = {"image_aspect_ratio": "native", "min_pixels": 28 * 28, "max_pixels": 10**6, "image_grid_pinpoints": None}
BUDGET = {"adaptive_patches": {"method": "budget", "alpha": 0.5}, "mm_projector_type": "spatial_merge"}
ANYRES = [((3, 3, 56, 56), (100, 50)), ((2, 3, 56, 56), (40, 40)), ((5, 3, 56, 56), (90, 100))]
CASES = {  # tower, config, (pixels, (width, height)) of three images
    "anyres": ("clip", {}, ANYRES),
    "merged": ("clip", {"mm_projector_type": "spatial_merge"}, ANYRES),
    "cut": ("clip", {"tokenizer_model_max_length": 40}, ANYRES),
    "pad": ("siglip", {"image_aspect_ratio": "pad", "mm_patch_merge_type": "flat"}, [((3, 56, 56), (9, 9))] * 3),
    "native": ("hevc_vit_packing", NATIVE, [((3, 28, 56), (56, 28)), ((3, 84, 28), (28, 84)), ((3, 56, 56), (56, 56))]),
    "adaptive": ("hevc_vit_packing", NATIVE | BUDGET, [((3, 112, 56), (56, 112))] * 3),
    "s2": (
        "clip",
        {"s2": True, "s2_scales": "56,112", "image_aspect_ratio": "pad", "mm_patch_merge_type": "flat"},
        [((3, 112, 112), (9, 9))] * 3,
    ),
}


def batch_of(model, images):
    """Three rows of other lengths: one image, text, two images."""
    rows = [[5, IMAGE_TOKEN_INDEX, 7, 8], [5, 6, 7], [IMAGE_TOKEN_INDEX, 4, IMAGE_TOKEN_INDEX, 5, 6, 7]]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    labels = torch.where(mask & (ids > 6), ids, IGNORE_INDEX)
    generator = torch.Generator().manual_seed(0)
    pixels = [torch.rand(shape, generator=generator) for shape, _ in images]
    chooser, levels = model.get_vision_tower().patch_chooser, None
    if chooser is not None:
        levels = [chooser.levels_of(image) for image in pixels]
    host = HostCopies(input_ids=ids, attention_mask=mask, labels=labels, patch_levels=levels)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "images": pixels, "host": host}
    return batch | {"image_sizes": [size for _, size in images], "modalities": ["image"] * 3}


def entered(model, batch, monkeypatch):
    """(plan of the merge, lengths of the encoder's sequences, rows that the projector makes) of a forward pass."""
    plans, sequences, made = [], [], []
    plan_merge = llava_arch.plan_merge

    def plan(*args, **kwargs):
        plans.append(plan_merge(*args, **kwargs))
        return plans[-1]

    def see(_, args, kwargs):
        grids = args[1] if len(args) > 1 else kwargs.get("grid_thw")
        if torch.is_tensor(grids):  # packed
            sequences.extend(grids.prod(1).tolist())
        else:
            sequences.extend([(args[0].shape[-1] // 14) ** 2] * len(args[0]))

    monkeypatch.setattr(llava_arch, "plan_merge", plan)
    hooks = [
        model.get_vision_tower().vision_tower.register_forward_pre_hook(see, with_kwargs=True),
        model.get_model().mm_projector.register_forward_hook(
            lambda _, args, out: made.append(out.numel() // out.shape[-1])
        ),
    ]
    model(**batch)
    for hook in hooks:
        hook.remove()
    return plans[0], sequences, sum(made)


@pytest.mark.parametrize("case", CASES)
def test_merged_batches(case, tmp_path, monkeypatch):
    kind, changes, images = CASES[case]
    model = small.model(small.tower(tmp_path, side=56, kind=kind), **changes).train()
    batch = batch_of(model, images)
    sizes = get_family("llava").batch_sizes(batch, model)
    plan, sequences, made = entered(model, batch, monkeypatch)
    assert sizes.tokens == plan.mask.sum(1).tolist()
    assert sizes.slots == plan.mask.numel()
    text = len(plan.text_ids) if plan.fits is None else int(plan.fits[: len(plan.text_ids)].sum())
    assert sizes.visual == sum(sizes.tokens) - text
    lengths = [n if isinstance(n, int) else n[0] * n[1] * n[2] for n in sizes.patches]
    assert sorted(lengths) == sorted(sequences) and sum(lengths) > 0
    assert sizes.projected == made
    assert sizes.supervised == 4 and (case != "cut" or max(sizes.tokens) == 40)


def test_a_clip_is_one_sequence_where_the_tower_sees_time(tmp_path):
    model = small.model(small.tower(tmp_path, side=56, kind="hevc_vit_packing"))
    batch = batch_of(model, [((4, 3, 56, 56), (9, 9))] * 3) | {"modalities": ["video", "video", "image"]}
    batch["images"][2] = batch["images"][2][:1]
    sizes = get_family("llava").batch_sizes(batch, model)
    assert sizes.patches == [(4, 4, 4), (4, 4, 4), 16]


def test_text_alone_and_nothing_left(tmp_path):
    model = small.model(small.tower(tmp_path / "clip", side=56))
    ids = torch.tensor([[5, 6, 7], [5, 6, 0]])
    host = HostCopies(input_ids=ids, attention_mask=ids > 0, labels=ids)
    sizes = get_family("llava").batch_sizes({"host": host}, model)
    assert sizes == BatchSizes(tokens=[3, 2], slots=6, supervised=4)
    ids = torch.tensor([[0, 0]])
    mask = torch.tensor([[True, False]])
    host = HostCopies(input_ids=ids, attention_mask=mask, labels=torch.full_like(ids, IGNORE_INDEX))
    assert get_family("llava").batch_sizes({"host": host}, model) == BatchSizes()


def test_packed_rows(tmp_path):
    """Samples of one row are told apart by their lengths, in places of the row as it is collated."""
    model = small.model(small.tower(tmp_path / "clip", side=56))
    ids = torch.tensor([[5, IMAGE_TOKEN_INDEX, 7, 5, 6]])
    host = HostCopies(input_ids=ids, labels=ids, packed=[3, 2])
    batch = {"host": host, "images": [torch.zeros(2, 3, 56, 56)], "image_sizes": [(40, 40)], "modalities": ["image"]}
    count = model.visual_token_counter()((2, 3, 56, 56), (40, 40))
    sizes = get_family("llava").batch_sizes(batch, model)
    assert sizes.tokens == [2 + count, 2] and sizes.slots == 4 + count and sizes.visual == count

    kinds = torch.tensor([[0, 1, 1, 0, 0, 1]])  # the last stands for a picture of its own, behind the samples
    host = HostCopies(
        input_ids=kinds, labels=kinds, packed=[4, 1], mm_token_type_ids=kinds, image_grid_thw=torch.tensor([[1, 2, 4]])
    )
    sizes = get_family("qwen2_vl").batch_sizes({"host": host}, None)
    assert sizes.tokens == [4] and sizes.visual == 2 and sizes.patches == [(1, 2, 4)]


def qwen_batch(**more):
    kinds = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    labels = torch.where(torch.arange(5)[None] == 2, 7, IGNORE_INDEX).expand(3, -1)
    host = {"input_ids": kinds + 3, "attention_mask": mask, "labels": labels, "mm_token_type_ids": kinds}
    return {"host": HostCopies(**host | more)}


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_expanded_batches(name):
    grids = torch.tensor([[1, 2, 4], [1, 2, 2]])
    sizes = get_family(name).batch_sizes(qwen_batch(image_grid_thw=grids), None)
    patches = [(1, 2, 4), (1, 2, 2)]
    assert sizes == BatchSizes([5, 3, 4], slots=15, visual=3, patches=patches, projected=3, supervised=3)


def test_expanded_batches_of_chosen_patches():
    grids = torch.tensor([[1, 4, 4], [1, 2, 2]])
    levels = torch.tensor([3] * 16 + [2] * 4)  # one large patch each
    sizes = get_family("qwen2_vl").batch_sizes(qwen_batch(image_grid_thw=grids, image_patch_levels=levels), None)
    assert sizes.patches == [1, 1] and sizes.projected == sizes.visual == 3


def test_a_picture_that_stands_for_none_counts_nothing():
    kinds = torch.tensor([[0, 0, 0, 1]])
    host = {"input_ids": kinds, "labels": kinds, "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    host |= {"mm_token_type_ids": kinds, "image_grid_thw": torch.tensor([[1, 2, 2]])}
    sizes = get_family("qwen2_vl").batch_sizes({"host": HostCopies(**host)}, None)
    assert sizes.tokens == [3] and sizes.slots == 4 and sizes.visual == sizes.projected == 0 and sizes.patches == []
