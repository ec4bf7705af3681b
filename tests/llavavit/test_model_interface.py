"""The encoders as transformers models: hidden states, dtypes, saving and loading, named sizes, what is refused."""

import importlib

import pytest
import torch
from transformers import AutoConfig, AutoModel

from llavavit import SIZES, LlavaViTConfig, LlavaViTPackingConfig, LlavaViTPackingModel, named_config
from tests.llavavit.encoders import KINDS, LAYERS, PATCH, WIDTH, assert_same, difference, formulas, images, make, pack

layers = importlib.import_module("llavavit.layers")
MIXED = [(16, 12), (8, 20), (4, 4), (3, 12, 8)]


def inputs_for(kind):
    return pack(images(*MIXED)) if kind == "packed" else (torch.stack(images((16, 24), (16, 24))),)


# --- hidden states ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("indices", [[0], [2], [-1], [LAYERS], [2, 0], [1, 1, 2]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_chosen_hidden_states(kind, indices):
    model, inputs = make(kind), inputs_for(kind)
    indices = [i % (LAYERS + 1) for i in indices]
    whole = model(*inputs, output_hidden_states=True)
    ran = []
    for number, block in enumerate(model.encoder.layers, start=1):
        block.register_forward_hook(lambda *args, number=number: ran.append(number))
    model.head.register_forward_hook(lambda *args: ran.append("head"))
    out = model(*inputs, hidden_state_indices=indices)
    assert len(out.hidden_states) == len(indices) and out.last_hidden_state is None and out.pooler_output is None
    for index, state in zip(indices, out.hidden_states, strict=True):
        assert torch.equal(state, whole.hidden_states[index])
    assert ran == list(range(1, max(indices) + 1))


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_are_before_the_last_norm(kind):
    model, inputs = make(kind), inputs_for(kind)
    out = model(*inputs, output_hidden_states=True)
    assert len(out.hidden_states) == LAYERS + 1
    assert torch.equal(model.layernorm_post(out.hidden_states[-1]), out.last_hidden_state)
    assert model(*inputs).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(*inputs).hidden_states) == LAYERS + 1


@pytest.mark.parametrize("kind", KINDS)
def test_without_head(kind):
    model, inputs = make(kind, use_head=False), inputs_for(kind)
    out = model(*inputs, output_hidden_states=True)
    assert torch.equal(out.last_hidden_state, out.hidden_states[-1]) and out.pooler_output is None
    assert not [name for name in model.state_dict() if name.startswith(("head", "layernorm_post"))]


@pytest.mark.parametrize("kind", KINDS)
def test_tuple(kind):
    model, inputs = make(kind), inputs_for(kind)
    out, values = model(*inputs), model(*inputs, return_dict=False)
    assert isinstance(values, tuple) and len(values) == 2
    assert torch.equal(values[0], out.last_hidden_state) and torch.equal(values[1], out.pooler_output)


# --- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16(kind, tmp_path):
    """bf16 weights stay so, and so do all outputs, close to float32's."""
    make(kind).save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16} == {model.dtype}
    inputs = inputs_for(kind)  # the pixels in float32
    out = model(*inputs, output_hidden_states=True)
    assert {value.dtype for value in (*out[:2], *out.hidden_states)} == {torch.bfloat16}
    plain = make(kind)(*inputs)
    for found, expected in zip(out[:2], plain[:2], strict=True):
        assert ((found - expected).norm() / expected.norm()) < 3e-2


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # the pooling head's RMSNorm
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_reaches_the_attention(kind, monkeypatch):
    """Float32 weights under bf16 autocast: q, k and v are bf16, or the fast kernels would be out of reach."""
    seen = []
    plain = layers.varlen_attention

    def spy(q, k, v, *args, **options):
        seen.append({q.dtype, k.dtype, v.dtype})
        return plain(q, k, v, *args, **options)

    monkeypatch.setattr(layers, "varlen_attention", spy)
    model, inputs = make(kind), inputs_for(kind)
    expected = model(*inputs).last_hidden_state
    seen.clear()
    for module in model.modules():  # as on CUDA, where norms under autocast are float32
        if isinstance(module, torch.nn.LayerNorm):
            module.register_forward_hook(lambda *args: args[-1].float())
    with torch.autocast("cpu", torch.bfloat16):
        found = model(*inputs).last_hidden_state
    assert seen == [{torch.bfloat16}] * (LAYERS + 1)
    assert ((found - expected).norm() / expected.norm()) < 3e-2


# --- saving, loading, sizes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"layer_norm_type": "rms_norm", "use_head": False, "rope_theta": 50.0}], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(kind, changes, tmp_path):
    """Nothing that the numbers hang on is outside config and weights; rotary frequencies are no buffers."""
    model, inputs = make(kind, **changes), inputs_for(kind)
    assert not list(model.buffers())
    model.save_pretrained(tmp_path)
    loaded, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert type(loaded) is type(model) and not loaded.training
    assert {name: getattr(loaded.config, name) for name in changes} == changes
    out = loaded(*inputs, output_hidden_states=True)
    expected = model(*inputs, output_hidden_states=True)
    assert all(torch.equal(a, b) for a, b in zip(out.to_tuple()[0], expected.to_tuple()[0], strict=True))
    if kind != "packed":
        assert_same(out, formulas(loaded, *inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_registered(kind):
    config_class, model_class = KINDS[kind]
    config = AutoConfig.for_model(config_class.model_type, hidden_size=64, num_attention_heads=2, num_hidden_layers=1)
    assert type(config) is config_class and type(AutoModel.from_config(config)) is model_class


def test_fresh_weights():
    torch.manual_seed(0)
    model = KINDS["packed"][1](LlavaViTPackingConfig(hidden_size=64, num_attention_heads=2, num_hidden_layers=1))
    state = model.state_dict()
    for name, value in state.items():
        if name.endswith("bias"):
            assert not value.any(), name
        elif "norm" in name:
            assert (value == 1).all(), name
    drawn = {"patch_embed.proj.weight", "encoder.layers.0.self_attn.qkv.weight", "head.mlp.fc1.weight"}
    assert all(abs(state[name].std().item() - 0.02) < 2e-3 for name in drawn)
    assert abs(state["head.attention.in_proj_weight"].std().item() - (2 / (4 * 64)) ** 0.5) < 5e-3
    assert abs(state["head.probe"].std().item() - 1) < 0.3


def parameters(patch, hidden, heads, layers, intermediate):
    """Weights of an encoder, counted by hand."""
    mlp = 2 * hidden * intermediate + intermediate + hidden
    attention = 4 * hidden * hidden + 4 * hidden
    norms = 2 * hidden
    head = hidden + attention + hidden + mlp  # probe, attention, RMSNorm, MLP
    return 3 * patch**2 * hidden + 2 * norms + layers * (attention + mlp + 2 * norms) + head


PUBLISHED = {
    "hf_llava_vit_small_ln": (16, 384, 6, 6, 1536),
    "hf_llava_vit_base_ln": (16, 768, 12, 12, 3072),
    "hf_llava_vit_large_ln": (14, 1024, 16, 24, 4096),
    "hf_llava_vit_huge_ln": (14, 1536, 16, 27, 4608),
    "hf_llava_vit_giant_ln": (14, 1536, 16, 40, 6144),
}


@pytest.mark.parametrize("kind", ["padded", "packed"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_named_sizes(name, kind):
    patch, hidden, heads, depth, intermediate = PUBLISHED[name]
    config_class, model_class = KINDS[kind]
    with torch.device("meta"):
        model = model_class(named_config(name, config_class))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters(*PUBLISHED[name])
    state = model.state_dict()
    embedding = "patch_embed.proj" if kind == "packed" else "embeddings.patch_embedding"
    assert state[f"{embedding}.weight"].shape == (hidden, 3, patch, patch)
    assert state[f"encoder.layers.{depth - 1}.mlp.fc1.weight"].shape == (intermediate, hidden)
    assert f"encoder.layers.{depth}.mlp.fc1.weight" not in state
    assert model.config.num_attention_heads == heads and model.config.layer_norm_type == "layer_norm"
    assert set(SIZES) == set(PUBLISHED)


def test_named_config():
    config = named_config("hf_llava_vit_large_ln", LlavaViTPackingConfig, image_size=336)
    assert type(config) is LlavaViTPackingConfig and config.image_size == 336 and config.head_dim == 64
    with pytest.raises(ValueError, match="model name: found 'vit-l', expected one of hf_llava_vit_small_ln"):
        named_config("vit-l")


# --- waits for the device ---------------------------------------------------------------------------------------------


def test_packed_forward_reads_the_grid_and_nothing_else(reads):
    model, (rows, grid) = make("packed"), inputs_for("packed")
    reads.clear()
    out = model(rows, grid, output_hidden_states=True)
    out.pooler_output.sum().backward()
    assert len(reads) == 1 and reads[0] is grid


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_waits_for_no_device(kind, backward):
    """Tensors of the meta device have no values: whatever looks at one, int(), bool() and indexing included, fails."""
    model = make(kind).to("meta")
    pixels, *grid = inputs_for(kind)
    pixels = pixels.to("meta")
    with torch.set_grad_enabled(backward):
        out = model(pixels, *grid, output_hidden_states=True)
        assert out.pooler_output.shape == (len(MIXED) if grid else 2, WIDTH) and out.pooler_output.is_meta
        if backward:
            out.pooler_output.sum().backward()
    with pytest.raises(RuntimeError, match="meta"):
        out.pooler_output.sum().item()


# --- what is refused --------------------------------------------------------------------------------------------------

PIXELS = torch.zeros(2, 3, 16, 24)
GRID = torch.tensor([[1, 4, 6], [1, 2, 2]])
ROWS = torch.zeros(28, 3 * PATCH**2)
BAD = {
    "3 dimensions": (
        "padded",
        dict(pixel_values=PIXELS[0]),
        r"pixel_values: found shape \(3, 16, 24\), expected \[B, 3",
    ),
    "channels": ("padded", dict(pixel_values=PIXELS[:, :2]), r"pixel_values: found shape \(2, 2, 16, 24\)"),
    "height": ("padded", dict(pixel_values=PIXELS[:, :, :15]), "image of 15x24 pixels: expected .* multiples of 4"),
    "width": ("onevision", dict(pixel_values=PIXELS[..., :22]), "image of 16x22 pixels: expected .* multiples of 4"),
    "nothing": ("padded", dict(pixel_values=PIXELS[..., :0]), "image of 16x0 pixels"),
    "positions": (
        "padded",
        dict(pixel_values=PIXELS, patch_positions=torch.zeros(2, 23, 3)),
        r"patch_positions: found shape \(2, 23, 3\), expected \(2, 24, 3\)",
    ),
    "positions of the visible": (
        "padded",
        dict(
            pixel_values=PIXELS,
            visible_indices=torch.zeros(2, 5, dtype=torch.long),
            patch_positions=torch.zeros(2, 24, 3),
        ),
        r"patch_positions: found shape \(2, 24, 3\), expected \(2, 5, 3\)",
    ),
    "index too large": (
        "padded",
        dict(pixel_values=PIXELS, visible_indices=torch.tensor([[0, 24], [0, 1]])),
        "visible_indices: found 0 to 24, expected 0 to 23",
    ),
    "index below zero": (
        "onevision",
        dict(pixel_values=PIXELS, visible_indices=torch.tensor([[0, -1], [0, 1]])),
        "visible_indices: found -1 to 1, expected 0 to 23",
    ),
    "place too late": (
        "onevision",
        dict(pixel_values=PIXELS, visible_indices=torch.arange(1, 25).expand(2, -1)),
        "visible_indices: found 1 to 24, expected 0 to 23",
    ),
    "rows of indices": (
        "padded",
        dict(pixel_values=PIXELS, visible_indices=torch.zeros(1, 5, dtype=torch.long)),
        r"visible_indices: found shape \(1, 5\), expected \[2, K\]",
    ),
    "no indices": (
        "padded",
        dict(pixel_values=PIXELS, visible_indices=torch.zeros(2, 0, dtype=torch.long)),
        r"visible_indices: found shape \(2, 0\)",
    ),
    "state": ("padded", dict(pixel_values=PIXELS, hidden_state_indices=[4]), "found .4., expected indices from 0 to 3"),
    "state below zero": ("packed", dict(hidden_states=ROWS, grid_thw=GRID, hidden_state_indices=[-1]), "found .-1."),
    "no state": ("padded", dict(pixel_values=PIXELS, hidden_state_indices=[]), r"hidden_state_indices: found \[\]"),
    "row": ("packed", dict(hidden_states=ROWS[:, :40], grid_thw=GRID), r"found shape \(28, 40\), expected \[N, 48\]"),
    "pixels": ("packed", dict(hidden_states=PIXELS, grid_thw=GRID), r"hidden_states: found shape \(2, 3, 16, 24\)"),
    "grid of another": ("packed", dict(hidden_states=ROWS[1:], grid_thw=GRID), "with 28 patches, expected .* the 27"),
    "grid with nothing": ("packed", dict(hidden_states=ROWS, grid_thw=GRID * 0), "expected sizes of at least 1"),
    "two wrongs": ("packed", dict(hidden_states=ROWS[:24], grid_thw=torch.tensor([[1, -4, -6]])), "at least 1"),
    "no grid": ("packed", dict(hidden_states=ROWS, grid_thw=GRID[:0]), r"grid_thw: found \[\] with 0 patches"),
    "grid of two": ("packed", dict(hidden_states=ROWS, grid_thw=GRID[:, 1:]), r"shape \(2, 2\), expected integers of"),
    "fractions": ("packed", dict(hidden_states=ROWS, grid_thw=GRID.float()), "grid_thw: found torch.float32"),
    "packed positions": (
        "packed",
        dict(hidden_states=ROWS, grid_thw=GRID, patch_positions=torch.zeros(2, 28, 3)),
        r"patch_positions: found shape \(2, 28, 3\), expected \(28, 3\)",
    ),
    "indices of packed": (
        "padded",
        dict(pixel_values=ROWS, grid_thw=GRID, visible_indices=torch.zeros(2, 5, dtype=torch.long)),
        "visible_indices: have no meaning for packed patches",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(case):
    kind, inputs, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        make(kind)(**inputs)


@pytest.mark.parametrize(
    "config_class, values, message",
    [
        (LlavaViTConfig, dict(hidden_size=96, num_attention_heads=4), "hidden_size 96 with num_attention_heads 4"),
        (LlavaViTConfig, dict(hidden_size=100, num_attention_heads=3), "hidden_size 100 with num_attention_heads 3"),
        (LlavaViTConfig, dict(layer_norm_type="batch_norm"), "layer_norm_type: found 'batch_norm', expected one of"),
        (LlavaViTPackingConfig, dict(spatial_merge_size=2), "spatial_merge_size: found 2, expected 1"),
        (LlavaViTPackingConfig, dict(temporal_patch_size=2), "temporal_patch_size: found 2, expected 1"),
    ],
)
def test_config_refused(config_class, values, message):
    with pytest.raises(ValueError, match=message):
        config_class(**values)


def test_indices_are_not_looked_at_on_a_device():
    """A check there would mean a wait at every step."""
    model = make("padded").to("meta")
    out = model(PIXELS.to("meta"), visible_indices=torch.zeros(2, 5, dtype=torch.long, device="meta"))
    assert out.last_hidden_state.shape == (2, 5, WIDTH)


def test_wide_heads():
    """Heads of 64 channels and of 32: the rotary frequencies split alike."""
    for heads in (1, 2):
        model = make("padded", num_attention_heads=heads)
        pixels = torch.stack(images((16, 24), (16, 24)))
        assert difference(model(pixels).pooler_output, formulas(model, pixels).pooler_output) < 1e-5
    assert isinstance(make("packed"), LlavaViTPackingModel)
