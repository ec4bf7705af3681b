"""The token compressor: values, geometries, refusals, and reading its weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.errors import LlavaError
from llava.model.multimodal_encoder.token_compressor import (
    PartialConv2d,
    TokenCompressor,
    compression_geometry,
    grid_metadata,
    load_token_compressor,
)
from llava.tools.check_toconv import named_positions, partial_conv_at

GOLDEN = Path(__file__).parents[1] / "golden" / "toconv" / "io.safetensors"
PUBLISHED = {(24, 12): (3, 2, 1), (24, 8): (3, 3, 0), (16, 12): (5, 1, 0), (16, 8): (3, 2, 1)}
NAMES = {"compress_conv.conv.weight", "norm.weight", "norm.bias", "pos_embed"}


def compressor(n_in=8, n_out=4, dim=32, seed=0):
    torch.manual_seed(seed)
    made = TokenCompressor(n_in, n_out, dim)
    torch.nn.init.normal_(made.norm.weight)
    torch.nn.init.normal_(made.norm.bias)
    return made


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", PUBLISHED, ids=str)
def test_golden(pair):
    prefix = f"{pair[0]}to{pair[1]}."
    io = {name.removeprefix(prefix): value for name, value in load_file(GOLDEN).items() if name.startswith(prefix)}
    made = TokenCompressor(*pair, 64)
    made.load_state_dict({name: io[name] for name in NAMES})
    torch.testing.assert_close(made(io["tokens"]), io["compressed"], atol=1e-5, rtol=0)


# relative to the output; bfloat16 rounds the convolution, the factor and their product, by 2^-9 each
TOLERANCE = {
    torch.float32: {"atol": 1e-5, "rtol": 0},
    torch.float64: {"atol": 1e-12, "rtol": 0},
    torch.bfloat16: {"atol": 1e-3, "rtol": 3 * 2**-9},
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("pair", PUBLISHED, ids=str)
def test_partial_convolution_is_its_formula(pair, dtype):
    torch.manual_seed(0)
    kernel, stride, padding = PUBLISHED[pair]
    conv = PartialConv2d(32, pair[0], kernel, stride, padding).to(dtype)
    grid = torch.randn(2, 32, pair[0], pair[0]).to(dtype)
    output = conv(grid)
    assert output.dtype == dtype and output.shape == (2, 32, pair[1], pair[1])
    positions = named_positions(pair[1])
    assert len({position[1:] for position in positions}) == 9  # corners, edges and centre
    for _, row, column in positions:
        formula = partial_conv_at(grid.double(), conv.conv.weight.double(), row, column, stride, padding)
        torch.testing.assert_close(output[:, :, row, column].double(), formula, **TOLERANCE[dtype])


@pytest.mark.parametrize(("pair", "geometry"), [((5, 4), (2, 1, 0)), ((7, 3), (3, 2, 0)), ((17, 5), (4, 4, 2))])
def test_every_position_of_other_pairs(pair, geometry):
    assert compression_geometry(*pair) == geometry
    made = compressor(*pair).double()
    made.reset_buffers()
    grid = torch.randn(1, 32, pair[0], pair[0], dtype=torch.float64)
    output = made.compress_conv(grid)
    for row in range(pair[1]):
        for column in range(pair[1]):
            formula = partial_conv_at(grid, made.compress_conv.conv.weight, row, column, made.stride, made.padding)
            torch.testing.assert_close(output[:, :, row, column], formula, atol=1e-6, rtol=0)


def test_a_constant_grid_stays_constant_to_its_border():
    # what the correction is for: with weights that sum to one the padding does not darken the border
    conv = PartialConv2d(1, 24, 3, 2, 1)
    torch.nn.init.constant_(conv.conv.weight, 1 / 9)
    torch.testing.assert_close(conv(torch.full((1, 1, 24, 24), 7.0)), torch.full((1, 1, 12, 12), 7.0))


def test_tokens_are_row_major_and_dtype_is_kept():
    made = compressor(6, 3, 32)
    x = torch.randn(2, 36, 32)
    flipped = made(x.unflatten(1, (6, 6)).transpose(1, 2).flatten(1, 2))
    with torch.no_grad():
        made.compress_conv.conv.weight.copy_(made.compress_conv.conv.weight.transpose(2, 3).clone())
        made.pos_embed.copy_(made.pos_embed.transpose(2, 3).clone())
    transposed = made(x).unflatten(1, (3, 3)).transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(flipped, transposed)
    assert made.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert made(torch.zeros(0, 36, 32, dtype=torch.bfloat16)).shape == (0, 9, 32)


def test_under_autocast_the_factor_takes_the_output_s_dtype():
    made = compressor()
    with torch.autocast("cpu", torch.bfloat16):
        assert made.compress_conv(torch.randn(1, 32, 8, 8)).dtype == torch.bfloat16


def test_gradients_reach_every_parameter():
    made = compressor(dim=64)
    x = torch.randn(2, 64, 64, requires_grad=True)
    (made(x) * torch.randn(2, 16, 64)).sum().backward()
    assert {name for name, p in made.named_parameters() if p.grad.abs().max() > 1e-6} == NAMES
    assert (x.grad.abs().amax(dim=2) > 0).all()  # no token is left out


# --- geometry ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", PUBLISHED, ids=str)
def test_published_geometries(pair):
    assert compression_geometry(*pair) == PUBLISHED[pair]


def fits(n_in, n_out, kernel, stride, padding):
    """Whether a geometry gives the output size and covers every token, by going through the windows."""
    starts = range(-padding, n_in + padding - kernel + 1, stride)
    covered = {start + i for start in starts for i in range(kernel)}
    return len(starts) == n_out and covered >= set(range(n_in))


def test_all_pairs_have_the_smallest_kernel_or_a_reason():
    refused = 0
    for n_in in range(1, 33):
        for n_out in range(1, n_in + 1):
            smaller = [
                (k, s, p)
                for k in range(1, 8)
                for p in range(k // 2 + 1)
                for s in range(k, 0, -1)
                if fits(n_in, n_out, k, s, p)
            ]
            if not smaller:
                refused += 1
                with pytest.raises(LlavaError, match=rf"{n_in}x{n_in} -> {n_out}x{n_out}: needs a kernel of \d+"):
                    compression_geometry(n_in, n_out)
            elif (n_in, n_out) not in PUBLISHED:
                assert compression_geometry(n_in, n_out) == smaller[0], (n_in, n_out)
            else:
                assert fits(n_in, n_out, *compression_geometry(n_in, n_out))
    assert 0 < refused < 500


def test_equal_grids_are_not_compressed():
    assert compression_geometry(9, 9) == (1, 1, 0)
    assert compressor(9, 9)(torch.randn(1, 81, 32)).shape == (1, 81, 32)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((12, 24, 32), "12x12 -> 24x24: the output grid is larger"),
        ((24, 1, 32), "24x24 -> 1x1: needs a kernel of 24, expected at most 7"),
        ((24, 0, 32), "output_grid_size: found 0"),
        ((-24, 12, 32), "input_grid_size: found -24"),
        ((24, 12.0, 32), r"output_grid_size: found 12\.0"),
        ((24, "12", 32), "output_grid_size: found '12'"),
        ((24, 12, 48), "hidden_dim: found 48, expected a multiple of 32, the number of groups of its GroupNorm"),
        ((24, 12, 0), "hidden_dim: found 0"),
    ],
)
def test_refusals(sizes, message):
    with pytest.raises(LlavaError, match=message):
        TokenCompressor(*sizes)


def test_wrong_tokens_name_both_grids():
    made = compressor(24, 12)
    with pytest.raises(LlavaError, match=r"found tokens \[2, 256, 32\], a grid of 16x16, .* a grid of 24x24"):
        made(torch.zeros(2, 256, 32))
    with pytest.raises(LlavaError, match=r"found tokens \[2, 577, 32\], no square grid, .* a grid of 24x24"):
        made(torch.zeros(2, 577, 32))
    with pytest.raises(LlavaError, match=r"found tokens \[2, 576, 64\].*expected \[images, 576, 32\]"):
        made(torch.zeros(2, 576, 64))
    with pytest.raises(LlavaError, match=r"found tokens \[576, 32\], no square grid"):
        made(torch.zeros(576, 32))


def test_it_describes_itself_and_prints_nothing(capsys):
    made = compressor(24, 8)
    made(torch.zeros(1, 576, 32))
    assert capsys.readouterr() == ("", "")
    described = repr(made)
    for part in ("24x24 -> 8x8", "kernel_size=3, stride=3, padding=0", "receptive field 3x3 tokens"):
        assert part in described


# --- weights ----------------------------------------------------------------------------------------------------------


def test_saved_names_are_the_published_ones():
    assert set(compressor().state_dict()) == NAMES


def test_fresh_weights():
    made = TokenCompressor(24, 12, 128)
    assert abs(float(made.pos_embed.detach().std()) - 0.02) < 1e-3
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.fill_(float("nan"))
    made.reset_parameters()
    assert all(p.isfinite().all() for p in made.parameters())
    assert abs(float(made.pos_embed.detach().std()) - 0.02) < 1e-3
    assert (made.norm.weight == 1).all() and (made.norm.bias == 0).all()
    assert made.compress_conv.conv.weight.detach().std() > 0.01


def test_reset_buffers_repairs_the_factor():
    made = compressor(24, 12)
    x = torch.randn(1, 576, 32)
    expected = made(x)
    made.compress_conv.correction.fill_(float("nan"))
    assert made(x).isnan().any()
    made.reset_buffers()
    assert torch.equal(made(x), expected)


def test_a_compressor_built_on_the_meta_device_computes_after_reset():
    expected = compressor()
    with torch.device("meta"):
        made = TokenCompressor(8, 4, 32)
    made.to_empty(device="cpu").load_state_dict(expected.state_dict())
    made.reset_buffers()
    x = torch.randn(1, 64, 32)
    assert torch.equal(made(x), expected(x))


def nested(state):
    return {"compressor_state_dict": {f"_orig_mod.{name}": value for name, value in state.items()}, "epoch": 3}


def prefixed(prefix):
    return lambda state: {prefix + name: value for name, value in state.items()}


def inside_llava(state):
    other = {"model.mm_projector.0.weight": torch.zeros(2, 2), "lm_head.weight": torch.zeros(2)}
    return prefixed("model.vision_tower.token_compressor.")(state) | other


def with_mask_kernel(state):
    return state | {"compress_conv.mask_kernel": torch.ones(1, 1, 3, 3)}


FORMS = {
    "plain": dict,
    "nested": nested,
    "compiled": prefixed("_orig_mod."),
    "parallel": prefixed("module."),
    "parallel of compiled": prefixed("module._orig_mod."),
    "inside LLaVA": inside_llava,
    "mask kernel": with_mask_kernel,
    "nested mask kernel": lambda state: nested(with_mask_kernel(state)),
    "half precision": lambda state: {name: value.bfloat16() for name, value in state.items()},
}
FLAT = sorted(FORMS.keys() - {"nested", "nested mask kernel"})


def check_loaded(path, expected):
    made = compressor(seed=5)
    made.compress_conv.correction.fill_(float("nan"))
    load_token_compressor(made, str(path))
    assert set(expected) == NAMES
    for name, value in made.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, expected[name].float()), name
    assert made(torch.randn(1, 64, 32)).isfinite().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ending", ["pth", "pt", "bin"])
def test_load_pickled_tensors(tmp_path, form, ending):
    state = compressor().state_dict()
    torch.save(FORMS[form](state), tmp_path / f"w.{ending}")
    half = form == "half precision"
    check_loaded(tmp_path / f"w.{ending}", {n: v.bfloat16() for n, v in state.items()} if half else state)


@pytest.mark.parametrize("form", FLAT)
@pytest.mark.parametrize("name", ["w.safetensors", "model.safetensors", "token_compressor.safetensors"])
def test_load_safetensors(tmp_path, form, name):
    state = compressor().state_dict()
    save_file(FORMS[form](state), tmp_path / name)
    half = form == "half precision"
    expected = {n: v.bfloat16() for n, v in state.items()} if half else state
    check_loaded(tmp_path / name if name == "w.safetensors" else tmp_path, expected)


def test_of_two_files_in_a_folder_the_compressor_s_own_is_read(tmp_path):
    own, other = compressor(seed=1).state_dict(), compressor(seed=2).state_dict()
    save_file(own, tmp_path / "token_compressor.safetensors")
    save_file(inside_llava(other), tmp_path / "model.safetensors")
    check_loaded(tmp_path, own)


class Unknown:
    """Something that only unpickling could make."""


def refused(state):
    """(file name, what is in it, what the error says) of each file that is no weights of `compressor()`."""
    without = {name: value for name, value in state.items() if name != "norm.bias"}
    other = compressor(8, 2).state_dict()
    return {
        "missing": ("w.pt", without, r"norm\.bias: found none, expected \(32,\)"),
        "missing nested": ("w.pt", nested(without), r"norm\.bias: found none, expected \(32,\)"),
        "unknown": (
            "w.pt",
            state | {"decoder.weight": torch.zeros(2)},
            r"decoder\.weight: found \(2,\), expected none",
        ),
        "geometry": (
            "w.safetensors",
            other,
            r"8x8 -> 4x4: .*pos_embed: found \(1, 32, 2, 2\), expected \(1, 32, 4, 4\)",
        ),
        "width": ("w.safetensors", compressor(dim=64).state_dict(), r"norm\.weight: found \(64,\), expected \(32,\)"),
        "other model": ("w.safetensors", {f"x{i}": torch.zeros(1) for i in range(9)}, r"and 9 more"),
        "not tensors": ("w.pt", state | {"epoch": 3}, "epoch: found int, expected a token compressor's tensors"),
        "list": ("w.pt", [1, 2], "found list, expected names and tensors"),
        "nested list": ("w.pt", {"compressor_state_dict": [1]}, "found list, expected names and tensors"),
        "code": ("w.pt", {"a": Unknown()}, "not a file of plain tensors"),
        "no pickle": ("w.bin", None, "not a file of plain tensors"),
        "no safetensors": ("w.safetensors", None, "not a whole safetensors file"),
        "ending": ("w.npz", None, r"found no known ending, expected \.safetensors, \.pth, \.pt, \.bin or a folder"),
    }


@pytest.mark.parametrize("kind", refused(compressor().state_dict()))
def test_load_refuses(tmp_path, kind):
    made = compressor(seed=5)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    name, content, message = refused(compressor().state_dict())[kind]
    path = tmp_path / name
    if content is None:
        path.write_text(json.dumps("no weights"))
    elif name.endswith(".safetensors"):
        save_file(content, path)
    else:
        torch.save(content, path)
    with pytest.raises(LlavaError, match=message) as raised:
        load_token_compressor(made, str(path))
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())


def test_a_file_that_names_other_grids(tmp_path):
    """24 -> 8 and 16 -> 8 have weights of the same shapes."""
    path = tmp_path / "token_compressor.safetensors"
    donor, other = TokenCompressor(24, 8, 32), TokenCompressor(16, 8, 32)
    save_file(donor.state_dict(), path)
    load_token_compressor(other, str(path))  # it does not say: taken
    save_file(donor.state_dict(), path, grid_metadata(donor))
    load_token_compressor(TokenCompressor(24, 8, 32), str(tmp_path))
    with pytest.raises(LlavaError, match="compresses 24 -> 8 tokens a side, expected 16 -> 8"):
        load_token_compressor(other, str(path))


def test_load_names_what_is_not_there(tmp_path):
    with pytest.raises(LlavaError, match="no such file"):
        load_token_compressor(compressor(), str(tmp_path / "none.safetensors"))
    expected = r"found no weights of a token compressor, expected token_compressor\.safetensors or model\.safetensors"
    with pytest.raises(LlavaError, match=expected):
        load_token_compressor(compressor(), str(tmp_path))
