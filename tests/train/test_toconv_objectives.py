"""The objectives of the stand-alone training of the token compressor."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from llava.model.multimodal_encoder.token_compressor import PUBLISHED_GEOMETRIES, TokenCompressor
from llava.train.toconv.config import ToConvConfig
from llava.train.toconv.objectives import (
    WGANObjective,
    field_cosine,
    optimal_transport,
    sinkhorn_loss,
    unit_tokens,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "toconv" / "io.safetensors"


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("sides", PUBLISHED_GEOMETRIES)
def test_golden(golden, sides):
    name = "{}to{}.".format(*sides)
    tokens, compressed = golden[name + "tokens"], golden[name + "compressed"]
    compressor = TokenCompressor(*sides, tokens.shape[-1])
    torch.testing.assert_close(
        1 - field_cosine(compressed, tokens, compressor).mean(), golden[name + "rf_cosine_loss"][0], atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        sinkhorn_loss(0.02 * compressed, 0.02 * tokens),
        golden[name + "sinkhorn_loss_of_0.02x"][0],
        atol=1e-6,
        rtol=0,
    )


def slow_transport(cost, epsilon, iterations):
    """Sinkhorn's scalings entry by entry, in double precision and out of the log domain."""
    rows, columns = cost.shape
    kernel = [[math.exp(-float(cost[i, j]) / epsilon) for j in range(columns)] for i in range(rows)]
    u, v = [1.0] * rows, [1.0] * columns
    for _ in range(iterations):
        u = [1 / rows / sum(kernel[i][j] * v[j] for j in range(columns)) for i in range(rows)]
        v = [1 / columns / sum(kernel[i][j] * u[i] for i in range(rows)) for j in range(columns)]
    return sum(u[i] * kernel[i][j] * v[j] * float(cost[i, j]) for i in range(rows) for j in range(columns))


@pytest.mark.parametrize("iterations", [1, 7, 25])
def test_transport_equals_the_slow_formula(iterations):
    cost = 2 * torch.rand(2, 4, 9)
    expected = [slow_transport(cost[b].double(), 0.1, iterations) for b in range(2)]
    torch.testing.assert_close(optimal_transport(cost, 0.1, iterations), torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_transport_gradient():
    cost = torch.rand(1, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c: optimal_transport(c, 0.1, 13), cost)


def test_transport_marginals_are_uniform():
    # with a cost that depends on the row (or the column) alone, <P, C> is its mean whatever the plan
    rows = torch.rand(1, 5, 1).expand(1, 5, 8)
    torch.testing.assert_close(optimal_transport(rows)[0], rows.mean())
    columns = torch.rand(1, 1, 8).expand(1, 5, 8)
    torch.testing.assert_close(optimal_transport(columns)[0], columns.mean())


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4, 1e30])
def test_finite_for_any_cost(scale):
    cost = (scale * torch.rand(2, 4, 16)).requires_grad_()
    value = optimal_transport(cost)
    value.sum().backward()
    assert value.isfinite().all() and (value > 0).all() and (value <= scale).all()
    assert cost.grad.isfinite().all()


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e4, 1e30])
def test_finite_for_any_tokens(scale):
    compressor = TokenCompressor(4, 2, 32)
    y = (scale * torch.randn(2, 4, 32)).requires_grad_()
    x = scale * torch.randn(2, 16, 32)
    loss = sinkhorn_loss(y, x) + (1 - field_cosine(y, x, compressor)).mean()
    loss.backward()
    assert loss.isfinite() and y.grad.isfinite().all()


def test_unit_tokens_do_not_depend_on_the_scale():
    x = torch.randn(2, 16, 32)
    torch.testing.assert_close(unit_tokens(1e25 * x), F.normalize(x, dim=-1))


@pytest.mark.parametrize("sides", [*PUBLISHED_GEOMETRIES, (4, 2), (6, 4)])
def test_field_cosine_equals_the_slow_formula(sides):
    before, after = sides
    compressor = TokenCompressor(before, after, 32)
    x, y = torch.randn(2, before**2, 32), torch.randn(2, after**2, 32)
    found = field_cosine(y, x, compressor).unflatten(1, (after, after))
    grid, out = x.unflatten(1, (before, before)), y.unflatten(1, (after, after))
    for row, column in [(0, 0), (0, after - 1), (after // 2, after // 2), (after - 1, after - 1)]:
        cosines = []
        for i in range(compressor.kernel_size):
            for j in range(compressor.kernel_size):
                r = row * compressor.stride + i - compressor.padding
                c = column * compressor.stride + j - compressor.padding
                if 0 <= r < before and 0 <= c < before:
                    cosines.append(F.cosine_similarity(out[:, row, column], grid[:, r, c], dim=-1))
        torch.testing.assert_close(found[:, row, column], torch.stack(cosines).mean(0), atol=1e-6, rtol=1e-5)


def test_gradient_penalty_of_a_linear_critic():
    compressor = TokenCompressor(4, 2, 32)
    objective = WGANObjective(compressor, ToConvConfig(vision_tower="x", image_folder="y", output_dir="z"))
    weight = torch.randn(32)
    objective.critic = torch.nn.Linear(32, 1, bias=False)
    objective.critic.weight.data[0] = weight
    found = objective._gradient_penalty(torch.randn(2, 4, 32))
    torch.testing.assert_close(found, (weight.norm() - 1).square())
