"""`torch_compile` and `torch_compile_tower`: few graphs, however many batches follow, and the same numbers."""

import copy
import random

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from llava.errors import LlavaError
from llava.model.compiled_blocks import compile_blocks, model_blocks
from tests.model import small
from tests.model.test_packed_rows import COLLATE, PACK, sample
from tests.model.test_vision_chunks import LLAVA, llava, qwen_vl, towers  # noqa: F401


@pytest.fixture(autouse=True)
def graphs():
    """How many PyTorch has made so far."""
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.mark.parametrize("case", ["clip", "packed", "qwen2_5_vl"])
def test_a_tower_on_all_batch_sizes(towers, tmp_path, case, graphs):  # noqa: F811
    if case in LLAVA:
        model = llava(towers, case)
        side = 28 if case == "clip" else 56
        shapes = [(3, side, side)] if case == "clip" else [(3, 56, 84), (3, 28, 56), (3, 84, 28)]
        batches = [[small.pixels(*shapes[i % len(shapes)], seed=i) for i in range(n)] for n in range(10, 0, -1)]
        run = (lambda m, b: m.encode_images(torch.stack(b))) if case == "clip" else (lambda m, b: m.encode_images(b))
    else:
        model, inputs = qwen_vl(case, tmp_path)
        pixels, grid = inputs["pixel_values"][: 8 * 10], torch.tensor([[1, 8, 10]])
        batches = [(pixels.repeat(n, 1), grid.repeat(n, 1)) for n in range(10, 0, -1)]
        run = lambda m, b: m.model.get_image_features(*b).pooler_output  # noqa: E731
    plain, names = copy.deepcopy(model), model.state_dict().keys()
    found = compile_blocks(model, tower_alone=True, backend="eager")
    assert found == len(model_blocks(plain, tower_alone=True)) > 1 and model.state_dict().keys() == names
    for inputs in batches:
        for found, expected in zip(run(model, inputs), run(plain, inputs), strict=True):
            assert (found - expected).abs().max() < 1e-5
    made = graphs()
    assert 0 < made <= 6, dict(counters["graph_break"])
    for inputs in batches:
        run(model, inputs)
    assert graphs() == made


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("attention", "collate"), [("varlen", PACK), ("sdpa", COLLATE)], ids=["packed", "padded"])
def test_a_model_on_all_kinds_of_batches(towers, attention, collate, checkpointing, graphs):  # noqa: F811
    """Loss and gradients of batches drawn at random, of one sample and of several, with images and without."""
    model = llava(towers, "clip")
    model.config._attn_implementation = attention
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    plain, draw, made = copy.deepcopy(model), random.Random(0), []
    assert compile_blocks(model, backend="eager") == len(model_blocks(model)) > len(model_blocks(model, True))
    for step in range(16):
        shapes = [(draw.randint(0, 3), draw.randint(2, 9)) for _ in range(draw.randint(1, 6))]
        crops = [draw.choice([1, 1, 5]) for _ in shapes]
        batch = [sample(*shape, 7 * step + at, crops[at]) for at, shape in enumerate(shapes)]
        losses = [one(**collate(batch)).loss for one in (model, plain)]
        for loss in losses:
            loss.backward()
        assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-6)
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            assert ours.grad is None or (ours.grad - theirs.grad).abs().max() < 1e-5
        made.append(graphs())
    assert 0 < made[-1] <= 16 and made[8] == made[-1], made


def test_a_tower_that_is_not_there():
    with pytest.raises(LlavaError, match="torch_compile_tower: Linear has no vision encoder"):
        compile_blocks(torch.nn.Linear(2, 2), tower_alone=True)


def test_a_run_is_compiled_in_its_blocks(tmp_path, monkeypatch, graphs):
    """As a run on a GPU would: the steps of an uncompiled run, the checkpoint under the same names."""
    from llava.train import speed
    from tests.support.families import FamilyKit

    kit = FamilyKit("llava", tmp_path)
    plain = kit.run(tmp_path / "plain")
    own = speed.speed_up

    def compiled(model, args):
        args.torch_compile, args.torch_compile_backend = True, "eager"
        own(model, args)

    monkeypatch.setattr(speed, "speed_up", compiled)
    run = kit.run(tmp_path / "compiled")
    assert run.losses == pytest.approx(plain.losses, abs=1e-5) and 0 < graphs() < 20
    names = [load_file(tmp_path / way / "model.safetensors").keys() for way in ("plain", "compiled")]
    assert names[0] == names[1]
