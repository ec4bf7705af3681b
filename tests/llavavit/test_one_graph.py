"""`torch.compile` without a graph break and `torch.export`: one graph for any number of images and patches, the eager
numbers. `aot_eager` runs the traced operations as they are, so that its numbers differ by rounding at most."""

import io
import shutil

import pytest
import torch
from torch._dynamo.utils import counters
from torch.export import Dim

import llavavit.inputs  # noqa: F401  registers the operators that a loaded program needs
from tests.llavavit.encoders import PATCH, assert_same, difference, images, make, pack

MIXED = [[(16, 12), (8, 20)], [(3, 12, 8), (8, 8), (8, 4), (20, 8)], [(4, 8)] * 7]


def compiled(model, backend="aot_eager", **options):
    torch._dynamo.reset()
    counters.clear()
    return torch.compile(model, backend=backend, fullgraph=True, **options)


def gradients(model, out):
    """Gradients of all weights, every output having its part in them."""
    model.zero_grad()
    torch.manual_seed(3)
    values = [out.last_hidden_state, out.pooler_output, *(out.hidden_states or ())]
    sum((value * torch.randn_like(value)).sum() for value in values).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check_same(model, graph, inputs, limit=1e-6, **options):
    expected, found = model(**inputs, **options), graph(**inputs, **options)
    assert type(found) is type(expected)
    for name in ("last_hidden_state", "pooler_output"):
        assert difference(found[name], expected[name]) < limit, name
    wanted = gradients(model, expected)
    got = gradients(model, found)
    assert got.keys() == wanted.keys() and len(wanted) > 15
    for name, gradient in wanted.items():
        assert difference(got[name], gradient) < limit, name


def packed_inputs(sizes):
    rows, grid = pack(images(*sizes))
    for tensor in (rows, grid):
        torch._dynamo.mark_dynamic(tensor, 0)
    return {"hidden_states": rows, "grid_thw": grid}


def padded_inputs(case, batch, count):
    if case == "image":
        return {"pixel_values": torch.randn(batch, 3, 16, 4 * count)}
    pixels = torch.randn(batch, 3, 6, 16, 24)
    if case == "clip":
        return {"pixel_values": torch.randn(batch, 3, count, 16, 24)}
    chosen = torch.stack([torch.randperm(144)[:count] for _ in range(batch)])
    return {
        "pixel_values": pixels,
        "visible_indices": chosen,
        "patch_positions": torch.randint(0, 9, (batch, count, 3)),
    }


@pytest.mark.parametrize("kind, case", [("padded", "image"), ("onevision", "clip"), ("padded", "visible")])
def test_padded_encoder_is_one_graph(kind, case):
    model = make(kind, num_hidden_layers=1)
    graph = compiled(model, backend="aot_eager" if case == "image" else "eager", dynamic=True)
    for batch, count in ((2, 5), (4, 7), (7, 6)):
        check_same(model, graph, padded_inputs(case, batch, count), output_hidden_states=True)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_packed_encoder_is_one_graph():
    model = make("packed", num_hidden_layers=2)
    graph = compiled(model)
    for sizes in MIXED:
        check_same(model, graph, packed_inputs(sizes), output_hidden_states=True)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    given = packed_inputs(MIXED[1])
    with pytest.raises(ValueError, match=r"grid_thw: found .* with 34 patches, expected .* the 33 patches"):
        graph(given["hidden_states"][1:], given["grid_thw"])
    with pytest.raises(ValueError, match=r"grid_thw: found .* expected sizes of at least 1"):
        graph(given["hidden_states"], -given["grid_thw"])


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # the pooling head's RMSNorm
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
@pytest.mark.parametrize("way", ["checkpointing", "autocast", "formula"])
def test_packed_graph_of_other_ways(way):
    model = make("packed", num_hidden_layers=1)
    if way == "checkpointing":
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    if way == "formula":
        model.set_attn_implementation("eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        check_same(model, compiled(model), packed_inputs(MIXED[0]))


def test_padded_formula_in_a_graph():
    model = make("padded", num_hidden_layers=1)
    model.set_attn_implementation("eager")
    check_same(model, compiled(model), padded_inputs("image", 2, 5))


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor builds its kernels with g++, which is not installed")
def test_inductor():
    model = make("packed", num_hidden_layers=1)
    graph = compiled(model, backend="inductor")
    for sizes in MIXED[:2]:
        check_same(model, graph, packed_inputs(sizes), limit=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


def test_indices_are_looked_at_by_the_graph():
    model = make("padded", num_hidden_layers=1)
    graph = compiled(model, backend="eager")
    pixels, indices = torch.randn(2, 3, 16, 24), torch.tensor([[3, 0], [23, 1]])
    with torch.no_grad():
        found, expected = (run(pixels, visible_indices=indices).last_hidden_state for run in (graph, model))
        assert torch.equal(found, expected)
        for wrong in (indices - 1, indices + 1):
            with pytest.raises(RuntimeError, match="visible_indices: found an index below 0 or beyond the last patch"):
                graph(pixels, visible_indices=wrong)


def test_truth_values_want_an_eager_frame():
    """How many there are decides on shapes: one graph cannot have them, `torch.compile` alone goes around."""
    model = make("padded", num_hidden_layers=1)
    pixels, mask = torch.randn(2, 3, 16, 24), (torch.arange(24) % 3 == 0).expand(2, -1)
    with torch.no_grad():
        with pytest.raises(Exception, match="truth values in a traced graph, expected indices"):
            compiled(model, backend="eager")(pixels, visible_indices=mask)
        torch._dynamo.reset()
        found = torch.compile(model, backend="eager")(pixels, visible_indices=mask)
        assert torch.equal(found.pooler_output, model(pixels, visible_indices=mask).pooler_output)


@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_a_graph_that_breaks_inside(kind):
    """A user's hook that no graph can hold: what follows goes on in other frames, some of them eager."""
    model = make(kind, num_hidden_layers=2)
    inputs = packed_inputs(MIXED[1]) if kind == "packed" else padded_inputs("image", 2, 5)
    with torch.no_grad():
        expected = model(**inputs)
        seen = []
        model.encoder.layers[0].register_forward_hook(lambda *args: seen.append(args[-1].tolist()))
        torch._dynamo.reset()
        found = torch.compile(model, backend="eager")(**inputs)
    assert difference(found.last_hidden_state, expected.last_hidden_state) < 1e-6 and len(seen) == 1
    assert difference(found.pooler_output, expected.pooler_output) < 1e-6


# --- export -----------------------------------------------------------------------------------------------------------


def saved_and_loaded(program):
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return torch.export.load(buffer)


def operators(program):
    return {str(node.target) for node in program.graph.nodes if "llavavit" in str(node.target)}


@torch.no_grad()
def check_program(program, model, **given):
    assert_same(program.module()(**given), model(**given))


@torch.no_grad()
def test_export_of_the_padded_encoder():
    model = make("padded", num_hidden_layers=2)
    model.config.output_hidden_states = True
    axes = {0: Dim("batch"), 2: Dim("frames")}, {0: Dim("batch"), 1: Dim("kept")}, {0: Dim("batch"), 1: Dim("kept")}
    given = padded_inputs("visible", 3, 5)
    program = torch.export.export(model, (), given, dynamic_shapes=dict(zip(given, axes, strict=True)))
    program = saved_and_loaded(program)
    assert not operators(program)  # PyTorch's own alone: such a program runs where this package is not
    for batch, frames, kept in ((1, 2, 4), (5, 1, 11)):
        given = padded_inputs("visible", batch, kept)
        given["pixel_values"] = torch.randn(batch, 3, frames, 16, 24)
        given["visible_indices"] %= 24 * frames
        check_program(program, model, **given)
    with pytest.raises(RuntimeError, match="visible_indices: found an index below 0"):
        program.module()(**given | {"visible_indices": given["visible_indices"] + 24})


@torch.no_grad()
def test_export_of_dynamic_sizes():
    """From two rows and two columns of patches on."""
    model = make("onevision", num_hidden_layers=1)
    model.config.output_hidden_states = True
    axes = {0: Dim("batch"), 2: PATCH * Dim("rows", min=2), 3: PATCH * Dim("columns", min=2)}
    given = {"pixel_values": torch.randn(3, 3, 16, 24)}
    program = torch.export.export(model, (), given, dynamic_shapes={"pixel_values": axes})
    for batch, height, width in ((1, 8, 12), (5, 24, 8)):
        check_program(program, model, pixel_values=torch.randn(batch, 3, height, width))


@torch.no_grad()
def test_export_of_the_packed_encoder():
    model = make("packed", num_hidden_layers=2)
    model.config.output_hidden_states = True
    given = dict(zip(("hidden_states", "grid_thw"), pack(images(*MIXED[0])), strict=True))
    axes = {"hidden_states": {0: Dim("patches")}, "grid_thw": {0: Dim("images")}}
    program = saved_and_loaded(torch.export.export(model, (), given, dynamic_shapes=axes))
    assert operators(program) == {"llavavit.packing_plan.default", "llavavit.varlen_attention.default"}
    for sizes in (MIXED[1], [(8, 4)]):
        rows, grid = pack(images(*sizes))
        check_program(program, model, hidden_states=rows, grid_thw=grid)
    with pytest.raises(ValueError, match=r"grid_thw: found .* with 2 patches, expected .* the 1 patches"):
        program.module()(hidden_states=rows[1:], grid_thw=grid)
