"""`vision_micro_batch` and frozen encoders: the numbers of one plain call, with less memory."""

import gc
import weakref

import pytest
import torch

from llava.errors import LlavaError
from llava.model.compiled_blocks import model_blocks
from llava.model.vision_chunks import chunk_ends, set_micro_batch
from tests import tiny
from tests.model import small
from tests.model.qwen2_vl import parts
from tests.model.test_training_forward import batch, gradients

NATIVE = {
    "mm_vision_tower_type": "hevc_vit_packing",
    "image_aspect_ratio": "native",
    "mm_projector_type": "spatial_merge",
}
LLAVA = {  # tower, changes of the config
    "clip": ("clip", {"image_grid_pinpoints": "(1x1),...,(2x2)"}),
    "packed": ("hevc_vit", NATIVE | {"mm_patch_merge_type": "flat"}),
    "adaptive": ("hevc_vit", NATIVE | {"adaptive_patches": {"method": "budget", "alpha": 0.5}}),
}


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("towers")
    sides = {"clip": 28, "hevc_vit": 56}
    return {kind: tiny.tower(folder / kind, kind=kind, side=side) for kind, side in sides.items()}


def llava(towers, case):
    kind, changes = LLAVA[case]
    return small.model(towers[kind], **changes).train().requires_grad_(True)


def llava_batch(case):
    """Five images of four records, with crops for CLIP and sizes of their own for the others."""
    made = batch()
    if case != "clip":
        made["images"] = [small.pixels(3, *side, seed=i) for i, side in enumerate([(56, 84), (28, 56), (84, 28)])]
        made["modalities"] = ["image"] * 3
        made["image_sizes"] = [(84, 56), (56, 28), (28, 84)]
    return made


def qwen_vl(kind, folder, **images):
    """(model in training mode, a batch of three images in two rows and its labels)."""
    model, processor = parts.load(tiny.qwen2_vl(folder / kind, kind))
    pictures = [parts.picture(180, 140), parts.picture(120, 150, 1), parts.picture(130, 120, 2)]
    for name, value in images.items():
        setattr(processor.image_processor, name, value)
    inputs = dict(
        processor(images=pictures, text=[parts.prompt(1), parts.prompt(2)], padding=True, return_tensors="pt")
    )
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return model.train().requires_grad_(True), inputs


def calls_of(module):
    """The list that every call of the module adds to."""
    calls = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def assert_same(model, inputs, encoder, sizes):
    """The loss and every gradient, with {most images in a call: how many calls}."""
    expected, calls = gradients(model, inputs), calls_of(encoder)
    for most, count in sizes.items():
        set_micro_batch(model, most)
        calls.clear()
        loss, found = gradients(model, inputs)
        assert len(calls) == count and loss == pytest.approx(expected[0], abs=1e-6)
        assert found.keys() == expected[1].keys()
        for name, gradient in expected[1].items():
            assert (found[name] - gradient).abs().max() < 1e-6 * max(1, gradient.abs().max()), name
    set_micro_batch(model, None)


@pytest.mark.parametrize("case", LLAVA)
def test_llava_in_chunks(towers, case):
    model = llava(towers, case)
    sizes = {1: 8, 3: 3, 8: 1} if case == "clip" else {1: 3, 2: 2, 3: 1}
    assert_same(model, llava_batch(case), model.get_vision_tower(), sizes)


@pytest.mark.parametrize("kind", parts.VISION)
def test_qwen_vl_in_chunks(tmp_path, kind):
    model, inputs = qwen_vl(kind, tmp_path)
    assert_same(model, inputs, model.model.visual, {1: 3, 2: 2, 3: 1})


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_kept_patches_in_chunks(tmp_path, kind):
    from llava.model.adaptive_patches import PatchChoice

    choice = PatchChoice.from_mapping({"method": "budget", "alpha": 0.5})
    model, inputs = qwen_vl(kind, tmp_path, adaptive_patches=choice)
    assert len(inputs["pixel_values"]) < inputs["image_grid_thw"].prod(1).sum()
    assert_same(model, inputs, model.model.visual, {1: 3, 2: 2})


def test_where_chunks_end():
    assert chunk_ends([1] * 5, 2) == [2, 4, 5] and chunk_ends([1] * 4, 4) == [4]
    assert chunk_ends([8, 1, 1, 9, 1], 4) == [1, 3, 4, 5]  # a clip is not cut


def test_a_model_without_vision_is_refused():
    with pytest.raises(LlavaError, match="vision_micro_batch is 2, but Linear has no vision encoder"):
        set_micro_batch(torch.nn.Linear(2, 2), 2)
    set_micro_batch(torch.nn.Linear(2, 2), None)


# --- a frozen encoder ---


class Kept:
    """A tensor that autograd was given to keep."""

    def __init__(self, tensor):
        self.tensor = tensor


def kept_of(module, run) -> tuple:
    """How many tensors autograd keeps, when all is computed, of calls of the module; and what was run gives."""
    inside, kept = [], weakref.WeakSet()
    before = module.register_forward_pre_hook(lambda *_: inside.append(1))
    after = module.register_forward_hook(lambda *_: inside.clear())

    def pack(tensor):
        made = Kept(tensor)
        if inside:
            kept.add(made)
        return made

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda made: made.tensor):
        result = run()
    before.remove()
    after.remove()
    gc.collect()
    return len(kept), result


def encoder_of(model):
    return model.get_vision_tower().vision_tower if hasattr(model, "get_vision_tower") else model.model.visual


@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.parametrize("case", [*LLAVA, *parts.VISION])
def test_a_frozen_encoder_keeps_nothing(towers, tmp_path, case, checkpointing):
    """Neither by itself nor under gradient checkpointing, reentrant or not, which would run it again."""
    model, inputs = (llava(towers, case), llava_batch(case)) if case in LLAVA else qwen_vl(case, tmp_path)
    encoder = encoder_of(model)
    if checkpointing is None:  # a case that can tell
        assert kept_of(encoder, lambda: model(**inputs).loss)[0] > 10
    encoder.requires_grad_(False)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    set_micro_batch(model, 1 if checkpointing else None)
    calls = calls_of(model_blocks(model, tower_alone=True)[0])
    kept, loss = kept_of(encoder, lambda: model(**inputs).loss)
    count = len(calls)
    loss.backward()
    assert kept == 0 and len(calls) == count > 0
    learns = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()]
    assert any("embed_tokens" in name for name in learns)
