"""The encoders' numbers: published values, plain formulas, packed against padded, gradients, attention kinds."""

import importlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from llavavit.conversion import convert_state_dict
from llavavit.layers import cache_sized, frames_to_patches
from tests.llavavit.encoders import LAYERS, PATCH, assert_same, difference, formulas, images, make, pack, pair

layers = importlib.import_module("llavavit.layers")
GOLDEN = Path(__file__).parents[1] / "golden" / "hevc_vit"
CASES = {
    "llava_vit_tiny": ("image", "video", "video_sparse"),
    "llava_vit_packing_tiny": ("packed", "packed_positions"),
    "onevision_encoder_tiny": ("image", "video"),
}
IMPLEMENTATIONS = ("eager", "sdpa", "varlen")


# --- published values -------------------------------------------------------------------------------------------------


def golden_inputs(io, case):
    """Keyword arguments of a golden case's forward."""
    pixels = io.get("video.pixel_values" if case.startswith("video") else f"{case}.pixel_values")
    given = {
        "pixel_values": pixels,
        "visible_indices": io.get(f"{case}.visible_indices"),
        "patch_positions": io.get(f"{case}.patch_positions"),
        "hidden_states": io.get(f"{case}.hidden_states_in"),
        "grid_thw": io.get(f"{case}.grid_thw"),
    }
    if case == "packed_positions":
        given["grid_thw"] = torch.tensor([[4, 2, 3]])  # as its description says
    return {name: value for name, value in given.items() if value is not None}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("folder", CASES)
def test_published_values(folder, implementation):
    """Every tensor that the published code left, within 1e-5."""
    io = load_file(GOLDEN / folder / "io.safetensors")
    model = AutoModel.from_pretrained(GOLDEN / folder, attn_implementation=implementation).eval()
    compared = set()
    for case in CASES[folder]:
        with torch.no_grad():
            out = model(**golden_inputs(io, case), output_hidden_states=True)
        for name in (name for name in io if name.startswith(f"{case}.")):
            leaf = name.removeprefix(f"{case}.")
            if leaf.startswith("hidden_states."):
                found = out.hidden_states[int(leaf.removeprefix("hidden_states."))]
            elif leaf in ("last_hidden_state", "pooler_output"):
                found = out[leaf]
            else:
                continue
            assert found.shape == io[name].shape and (found - io[name]).abs().max() < 1e-5, name
            compared.add(name)
    inputs = ("pixel_values", "visible_indices", "patch_positions", "hidden_states_in", "grid_thw")
    assert set(io) - compared == {name for name in io if name.endswith(inputs) or ".image." in name}


def test_published_patches():
    io = load_file(GOLDEN / "llava_vit_packing_tiny" / "io.safetensors")
    pictures = [io[name] for name in sorted(io) if name.startswith("packed.image.")]
    rows = torch.cat([frames_to_patches(picture[None], 16) for picture in pictures])
    assert len(pictures) == 4 and torch.equal(rows, io["packed.hidden_states_in"])


# --- plain formulas ---------------------------------------------------------------------------------------------------

SIZES = {"image": (16, 24), "video": (3, 12, 8)}
NORMS = [{}, {"layer_norm_type": "rms_norm", "head_norm_eps": 0.5}, {"rope_theta": 50.0, "layer_norm_eps": 0.3}]


def batch(kind, count=2):
    return torch.stack(images(*[SIZES[kind]] * count))


def run(model, pixels, **inputs):
    with torch.no_grad():
        return model(pixels, output_hidden_states=True, **inputs)


@pytest.mark.parametrize("changes", NORMS, ids=str)
@pytest.mark.parametrize("what", SIZES)
@pytest.mark.parametrize("kind", ["padded", "onevision"])
def test_padded_is_the_formulas(kind, what, changes):
    model, pixels = make(kind, **changes), batch(what)
    assert_same(run(model, pixels), formulas(model, pixels))
    assert ("layernorm_pre.bias" in model.state_dict()) == ("layer_norm_type" not in changes)  # by which formulas go


def places(index, pixels):
    """(t, h, w) of raster indices, one by one."""
    h, w = pixels.shape[-2] // PATCH, pixels.shape[-1] // PATCH
    return torch.tensor([[(i // (h * w), i % (h * w) // w, i % w) for i in row] for row in index.tolist()])


def some_of(limit, count):
    """[2, count] indices below `limit`, in no order."""
    generator = torch.Generator().manual_seed(5)
    return torch.stack([torch.randperm(limit, generator=generator)[:count] for _ in range(2)])


def anywhere(*shape):
    """[*shape, 3] places that are no grid's."""
    return torch.randint(0, 40, (*shape, 3), generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize("what, tokens", [("image", 24), ("video", 18)])
@pytest.mark.parametrize("count", [1, 7, "all"])
def test_llava_vit_takes_the_visible(what, tokens, count):
    model, pixels = make("padded"), batch(what)
    indices = some_of(tokens, tokens if count == "all" else count)
    out = run(model, pixels, visible_indices=indices)
    assert_same(out, formulas(model, pixels, indices=indices))
    if count == "all":  # in another order, and nothing else
        whole = run(model, pixels)
        assert difference(out.pooler_output, whole.pooler_output) < 1e-5
        rows = torch.arange(2)[:, None]
        assert difference(out.last_hidden_state, whole.last_hidden_state[rows, indices]) < 1e-5
    elsewhere = anywhere(*indices.shape)
    out = run(model, pixels, visible_indices=indices, patch_positions=elsewhere)
    assert_same(out, formulas(model, pixels, indices=indices, positions=elsewhere))


def test_patch_positions_of_all_tokens():
    model, pixels = make("padded"), batch("video")
    positions = anywhere(2, 18)
    out = run(model, pixels, patch_positions=positions)
    assert_same(out, formulas(model, pixels, positions=positions))
    assert difference(out.pooler_output, run(model, pixels).pooler_output) > 1e-3


def test_onevision_as_many_indices_as_tokens_are_places_alone():
    """The published usage: a clip of few frames, its places on a time axis of `rope_temporal_size` frames."""
    model, pixels = make("onevision"), batch("video")
    indices = some_of(64 * 6, 18)
    assert int(indices.max()) > 18
    out = run(model, pixels, visible_indices=indices)
    assert_same(out, formulas(model, pixels, positions=places(indices, pixels)))
    own = anywhere(2, 18)
    out = run(model, pixels, visible_indices=indices, patch_positions=own)
    assert_same(out, formulas(model, pixels, positions=own))


def test_onevision_other_numbers_of_indices_choose_tokens():
    model, pixels = make("onevision"), batch("video")
    indices = some_of(18, 5)
    assert_same(run(model, pixels, visible_indices=indices), formulas(model, pixels, indices=indices))
    own = anywhere(2, 5)
    out = run(model, pixels, visible_indices=indices, patch_positions=own)
    assert_same(out, formulas(model, pixels, indices=indices, positions=own))


def test_onevision_images_have_one_frame():
    model, pixels = make("onevision"), batch("image")
    order, fewer = some_of(24, 24), some_of(24, 5)
    out = run(model, pixels, visible_indices=order)
    assert_same(out, formulas(model, pixels, positions=places(order, pixels)))
    assert_same(run(model, pixels, visible_indices=fewer), formulas(model, pixels, indices=fewer))


def test_onevision_clips_longer_than_the_time_axis():
    model, pixels = make("onevision", rope_temporal_size=2), batch("video")
    with pytest.raises(ValueError, match=r"a clip of 3 frames, expected at most rope_temporal_size 2"):
        model(pixels)
    positions = places(torch.arange(18).expand(2, -1), pixels)
    assert_same(run(model, pixels, patch_positions=positions), formulas(model, pixels))
    model.config.rope_temporal_size = None  # the clip's own length
    assert_same(run(model, pixels), formulas(model, pixels))
    with pytest.raises(ValueError, match=r"visible_indices: found 0 to 18, expected 0 to 17"):
        model(pixels, visible_indices=torch.arange(19)[[*range(17), 18]].expand(2, -1))


# --- packed against padded --------------------------------------------------------------------------------------------

MIXED = [(16, 12), (8, 20), (4, 4), (24, 8), (3, 12, 8), (16, 12), (8, 24)]


@pytest.mark.parametrize("changes", [{}, {"layer_norm_type": "rms_norm"}, {"use_head": False}], ids=str)
def test_packed_is_padded_image_by_image(changes):
    padded, packed = pair(**changes)
    samples = images(*MIXED)
    rows, grid = pack(samples)
    out = packed(rows, grid, output_hidden_states=True)
    alone = [padded(sample[None], output_hidden_states=True) for sample in samples]
    expected = type(out)(
        last_hidden_state=torch.cat([one.last_hidden_state[0] for one in alone]),
        pooler_output=None if out.pooler_output is None else torch.cat([one.pooler_output for one in alone]),
        hidden_states=tuple(torch.cat([one.hidden_states[i][0] for one in alone]) for i in range(LAYERS + 1)),
    )
    assert_same(out, expected)
    for found in (out, expected):  # the same function of the outputs of either side
        torch.manual_seed(3)
        values = [found.last_hidden_state, found.hidden_states[1]] + [found.pooler_output] * ("use_head" not in changes)
        sum((value * torch.randn_like(value)).sum() for value in values).backward()
    wanted = convert_state_dict({name: p.grad for name, p in padded.named_parameters()}, "packed")
    found = {name: p.grad for name, p in packed.named_parameters()}
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert wanted[name].abs().max() > 0 and difference(gradient, wanted[name]) < 1e-5, name


# --- in parts on a CPU ------------------------------------------------------------------------------------------------


def test_parts_that_a_cache_holds(monkeypatch):
    width = 2**20 // 100
    assert cache_sized([40, 60, 1, 99, 300, 100, 2], width) == [[40, 60], [1, 99], [300], [100], [2]]
    assert cache_sized([300], width) == [[300]] and cache_sized([1] * 5, width) == [[1] * 5]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert cache_sized([40, 60, 1, 99], width) == [[40, 60, 1, 99]]  # the same module calls on all ranks


@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_parts_are_the_whole(kind, monkeypatch):
    model = make(kind)
    inputs = pack(images(*MIXED)) if kind == "packed" else (torch.cat([batch("image"), batch("image") + 1]),)
    calls = []
    model.encoder.layers[0].register_forward_hook(lambda module, args, output: calls.append(len(output)))
    outs = []
    for limit in (10**6, 30):
        monkeypatch.setattr(
            layers, "cache_sized", lambda lengths, width, limit=limit: cache_sized(lengths, 2**20 // limit)
        )
        out = model(*inputs, output_hidden_states=True)
        model.zero_grad()
        (out.last_hidden_state.square().sum() + out.pooler_output.sum() + out.hidden_states[1].sum()).backward()
        outs.append((out, {name: parameter.grad for name, parameter in model.named_parameters()}))
    assert calls[0] == sum(calls[1:]) and len(calls) > 3 and max(calls[1:]) <= 30
    assert_same(outs[1][0], outs[0][0])
    for name, gradient in outs[0][1].items():
        assert difference(outs[1][1][name], gradient) < 1e-5, name
    chosen = model(*inputs, hidden_state_indices=[2, 0]).hidden_states
    assert torch.equal(chosen[0], outs[1][0].hidden_states[2]) and torch.equal(chosen[1], outs[1][0].hidden_states[0])


def test_a_large_pack_goes_in_parts():
    model, rows = make("packed", num_hidden_layers=1), torch.randn(6 * 2000, 48)
    calls = []
    model.encoder.layers[0].register_forward_hook(lambda module, args, output: calls.append(len(output)))
    run(model, rows, grid_thw=torch.tensor([[1, 40, 50]] * 6))
    assert calls == [10000, 2000]  # 2^20 values of the 96 that an MLP is wide


def test_packed_samples_do_not_see_each_other():
    model, samples = make("packed"), images(*MIXED)
    rows, grid = pack(samples)
    lengths = grid.prod(1).tolist()
    changed = rows.clone()
    changed.split(lengths)[2].add_(1.0)
    before, after = run(model, rows, grid_thw=grid), run(model, changed, grid_thw=grid)
    pieces = zip(before.last_hidden_state.split(lengths), after.last_hidden_state.split(lengths), strict=True)
    assert [torch.equal(a, b) for a, b in pieces] == [i != 2 for i in range(len(MIXED))]
    same = (before.pooler_output == after.pooler_output).all(1).tolist()
    assert same == [i != 2 for i in range(len(MIXED))]


def test_packed_positions():
    """Places given: those of the grid change nothing, others are the formulas' others."""
    padded, packed = pair()
    clip = images((3, 12, 8))[0]
    rows, grid = pack([clip])
    natural = places(torch.arange(18)[None], clip)[0]
    plain = run(packed, rows, grid_thw=grid)
    assert torch.equal(run(packed, rows, grid_thw=grid, patch_positions=natural).last_hidden_state, plain[0])
    elsewhere = anywhere(18)
    out = run(packed, rows, grid_thw=grid, patch_positions=elsewhere)
    expected = formulas(padded, clip[None], positions=elsewhere[None])
    assert difference(out.last_hidden_state, expected.last_hidden_state[0]) < 1e-5


def test_padded_model_on_packed_patches():
    """`grid_thw` makes the padded model a packed one with its own names of the weights."""
    padded, packed = pair()
    rows, grid = pack(images(*MIXED))
    assert_same(run(padded, rows, grid_thw=grid), run(packed, rows, grid_thw=grid))


# --- attention and checkpointing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_attention_implementations_agree(kind, monkeypatch):
    used = []
    backends = importlib.import_module("llavavit.varlen_attention").BACKENDS
    for name, function in list(backends.items()):
        monkeypatch.setitem(backends, name, lambda *args, n=name, f=function: used.append(n) or f(*args))
    model = make(kind)
    inputs = pack(images(*MIXED)) if kind == "packed" else (batch("image"),)
    outs = {}
    for implementation, backend in zip(IMPLEMENTATIONS, ("reference", "sdpa", "sdpa"), strict=True):
        model.set_attn_implementation(implementation)
        outs[implementation] = model(*inputs, output_hidden_states=True)
        assert used == [backend] * (LAYERS + 1)  # the blocks and the pooling
        used.clear()
    assert_same(outs["eager"], outs["sdpa"])
    assert_same(outs["varlen"], outs["sdpa"])


def test_unknown_attention_implementation():
    model = make("padded")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="attn_implementation: found 'flex_attention', expected one of varlen, sdpa"):
        model(batch("image"))
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="backend 'flash_attn' cannot run on cpu"):
        model(batch("image"))


@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_attention_dropout_is_for_training(kind):
    model = make(kind, attention_dropout=0.5)
    inputs = pack(images(*MIXED)) if kind == "packed" else (batch("image"),)
    torch.manual_seed(0)
    plain = model(*inputs)
    assert torch.equal(model(*inputs)[0], plain[0])
    model.train()
    assert difference(model(*inputs)[0], plain[0]) > 1e-2


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["padded", "packed"])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
def test_checkpointing_has_the_same_gradients(kind, reentrant, reads):
    model = make(kind).train()
    inputs = pack(images(*MIXED)) if kind == "packed" else (batch("image"),)
    forwards = []
    model.encoder.layers[1].mlp.register_forward_pre_hook(lambda *args: forwards.append(1))
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        reads.clear()
        out = model(*inputs)
        (out.last_hidden_state.square().sum() + out.pooler_output.sum()).backward()
        assert len(reads) == (1 if kind == "packed" else 0)  # none for the forward pass that is run anew
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
        model.zero_grad()
    assert len(forwards) == 3  # once plain, twice under checkpointing
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], rtol=1e-5, atol=1e-6), name
