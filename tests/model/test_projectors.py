"""Projectors: shapes, published weight names, and what they compute."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from llava.constants import IMAGE_TOKEN_INDEX
from llava.errors import LlavaError
from llava.model.multimodal_projector.builder import ProjectedGrid, build_vision_projector
from tests.model import small

NAMES = {
    "linear": ["weight", "bias"],
    "identity": [],
    "mlp1x_gelu": ["0.weight", "0.bias"],
    "mlp2x_gelu": ["0.weight", "0.bias", "2.weight", "2.bias"],
    "mlp3x_gelu": ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"],
    "mlp2x_res1x_gelu": [
        *("0.weight", "0.bias", "2.weight", "2.bias", "3.pre_norm.weight", "3.pre_norm.bias"),
        *("3.proj.0.weight", "3.proj.0.bias", "3.proj.2.weight", "3.proj.2.bias"),
    ],
    "pooler": ["conv_pool.weight", "conv_pool.bias", "proj.1.weight", "proj.1.bias"],
    "patch_merger": ["ln_q.weight", "ln_q.bias", "mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"],
    "spatial_merge": ["ln_q.weight", "ln_q.bias", "mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"],
}
QUARTER = ("pooler", "patch_merger", "spatial_merge")


def build(kind, d_vision=8, d_text=12):
    torch.manual_seed(0)
    built = build_vision_projector(SimpleNamespace(mm_projector_type=kind, mm_hidden_size=d_vision, hidden_size=d_text))
    for parameter in built.parameters():  # norms too: their defaults would hide a missing one
        torch.nn.init.normal_(parameter, std=0.5)
    return built


@pytest.mark.parametrize("kind", NAMES)
def test_names_and_shapes(kind):
    projector = build(kind, d_text=8 if kind == "identity" else 12)
    assert sorted(dict(projector.named_parameters())) == sorted(NAMES[kind])
    x = small.pixels(2, 16, 8)
    out = projector(x, grid=(4, 4)) if kind in QUARTER else projector(x)
    assert out.shape == (2, 4 if kind in QUARTER else 16, 8 if kind == "identity" else 12)


def test_default_is_linear():
    assert isinstance(build_vision_projector(SimpleNamespace(mm_hidden_size=4, hidden_size=6)), torch.nn.Linear)


def test_residual_blocks():
    """Two layers, then y + MLP(y) of the normalised y: not the usual pre-norm residual."""
    projector = build("mlp2x_res1x_gelu")
    w = dict(projector.named_parameters())
    x = small.pixels(1, 5, 8)
    y = F.linear(F.gelu(F.linear(x, w["0.weight"], w["0.bias"])), w["2.weight"], w["2.bias"])
    y = F.layer_norm(y, (12,), w["3.pre_norm.weight"], w["3.pre_norm.bias"])
    inner = F.gelu(F.linear(y, w["3.proj.0.weight"], w["3.proj.0.bias"]))
    assert torch.allclose(projector(x), y + F.linear(inner, w["3.proj.2.weight"], w["3.proj.2.bias"]), atol=1e-5)


def merged(projector, tokens):
    """Four tokens [4, D] to one [E]."""
    w = dict(projector.named_parameters())
    normed = [F.layer_norm(t, t.shape, w["ln_q.weight"], w["ln_q.bias"], eps=1e-6) for t in tokens]
    hidden = F.gelu(F.linear(torch.cat(normed), w["mlp.0.weight"], w["mlp.0.bias"]))
    return F.linear(hidden, w["mlp.2.weight"], w["mlp.2.bias"])


def test_patch_merger_takes_four_consecutive():
    projector, x = build("patch_merger"), small.pixels(2, 16, 8)
    assert projector.mlp[0].weight.shape == (32, 32) and projector.mlp[2].weight.shape == (12, 32)
    for row, out in zip(x, projector(x), strict=True):
        assert torch.allclose(
            out, torch.stack([merged(projector, row[4 * i : 4 * i + 4]) for i in range(4)]), atol=1e-5
        )


@pytest.mark.parametrize("grid", [(4, 6), (6, 4), (2, 12)])
def test_spatial_merge_takes_neighbours(grid):
    h, w = grid
    projector, x = build("spatial_merge"), small.pixels(2, 24, 8)
    for row, out in zip(x, projector(x, grid=grid), strict=True):
        at = row.view(h, w, 8)
        expected = [
            merged(projector, [at[y, c], at[y, c + 1], at[y + 1, c], at[y + 1, c + 1]])
            for y in range(0, h, 2)
            for c in range(0, w, 2)
        ]
        assert torch.allclose(out, torch.stack(expected), atol=1e-5)
    square = small.pixels(1, 16, 8)
    assert torch.equal(projector(square), projector(square, grid=(4, 4)))


def test_pooler_is_a_convolution_of_the_grid():
    projector, x = build("pooler"), small.pixels(2, 15, 8)
    out = projector(x, grid=(3, 5))  # what does not fill a window is left out
    w = dict(projector.named_parameters())
    grid = x.view(2, 3, 5, 8)
    for b in range(2):
        for i, (y, c) in enumerate([(0, 0), (0, 2)]):
            window = grid[b, y : y + 2, c : c + 2]
            value = torch.einsum("yxd,edyx->e", window, w["conv_pool.weight"]) + w["conv_pool.bias"]
            assert torch.allclose(out[b, i], F.linear(F.gelu(value), w["proj.1.weight"], w["proj.1.bias"]), atol=1e-5)
    assert out.shape[1] == 2


@pytest.mark.parametrize("kind", ["mlp0x_gelu", "mlp2x", "mlpx_gelu", "qformer", "mlp2x_gelu_more"])
def test_unknown_kind(kind):
    with pytest.raises(LlavaError, match=f"mm_projector_type: found '{kind}', expected one of linear"):
        build(kind)


def test_misfits():
    with pytest.raises(LlavaError, match="identity: the tower has 8 channels, the language model 12"):
        build("identity")
    with pytest.raises(LlavaError, match="patch_merger: merges 4 tokens, an image has 9"):
        build("patch_merger")(small.pixels(1, 9, 8))
    with pytest.raises(LlavaError, match="spatial_merge"):
        build("spatial_merge")(small.pixels(1, 9, 8))
    with pytest.raises(LlavaError, match="spatial_merge"):
        build("spatial_merge")(small.pixels(1, 16, 8), grid=(2, 4))

    def grid(h, w):
        return h * w, (h, w)

    assert ProjectedGrid(grid, "mlp2x_gelu")(3, 5) == (15, (3, 5))
    assert ProjectedGrid(grid, "pooler")(3, 5) == (2, (1, 2))
    assert ProjectedGrid(grid, "spatial_merge")(4, 6) == (6, (2, 3))
    for kind in ("patch_merger", "spatial_merge"):
        with pytest.raises(LlavaError, match=f"{kind}.*3x5"):
            ProjectedGrid(grid, kind)(3, 5)
    with pytest.raises(LlavaError, match="class token"):
        ProjectedGrid(lambda h, w: (h * w + 1, None), "pooler")(4, 4)


# --- in a whole model ---


@pytest.fixture(scope="module")
def even_tower(tmp_path_factory):
    return small.tower(tmp_path_factory.mktemp("clip_even"), side=56)  # 4 x 4 patches


@pytest.mark.parametrize("kind", [kind for kind in NAMES if kind != "linear"])
def test_under_anyres(even_tower, kind):
    """Crops, unpadding and newlines follow the grid that the projector leaves."""
    model = small.model(even_tower, mm_projector_type=kind)
    assert {f"mm_projector.{name}" for name in NAMES[kind]} == {
        name for name, _ in model.model.named_parameters() if name.startswith("mm_projector")
    }
    side = 2 if kind in QUARTER else 4
    crops = small.pixels(7, 3, 56, 56)  # base, then 3 x 2 crops
    ids = torch.tensor([[5, IMAGE_TOKEN_INDEX, 6]])
    embeds = model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, [crops], ["image"], [(168, 112)])
    tokens = side**2 + 2 * side * (3 * side + 1)
    assert embeds[4].shape == (1, tokens + 2, 32)
    assert model.visual_token_counter()(crops.shape, (168, 112), "image") == tokens
    with torch.no_grad():
        base = model.encode_images(crops[:1])[0]
    assert torch.allclose(embeds[4][0, 1 : 1 + side**2], base, atol=1e-5)
    newline = model.model.image_newline
    ends = embeds[4][0, 1 + side**2 + 3 * side : -1 : 3 * side + 1]
    assert len(ends) == 2 * side and torch.equal(ends, newline.expand_as(ends))
    # a video: 2 frames, each pooled by two once more, then one newline
    embeds = model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, [crops[:2]], ["video"], [(9, 9)])
    assert embeds[4].shape[1] == 2 * (side // 2) ** 2 + 1 + 2
    assert model.visual_token_counter()((2, 3, 56, 56), (9, 9), "video") == 2 * (side // 2) ** 2 + 1


@pytest.mark.parametrize("kind", QUARTER)
def test_merged_crop_is_its_own_merge(even_tower, kind):
    """In a list of images of one size or many, every image is projected as if it were alone."""
    model = small.model(even_tower, mm_projector_type=kind)
    images = [small.pixels(3, 56, 56, seed=i) for i in range(3)]
    with torch.no_grad():
        alone = [model.encode_images(image[None])[0] for image in images]
        listed = model.encode_images(images)
        batched = model.encode_images(torch.stack(images))
    for a, b, c in zip(alone, listed, batched, strict=True):
        assert torch.allclose(a, b, atol=1e-5) and torch.allclose(a, c, atol=1e-5)
