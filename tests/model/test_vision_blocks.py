"""The blocks of encoders, and where in them their parameters lie."""

import re

import pytest
import torch
import torch.nn as nn

from llava.model.multimodal_encoder.builder import TOWERS, build_vision_tower
from llava.model.vision_blocks import block_levels, block_rate, find_blocks, used_blocks
from tests import tiny

LAYERS = 4
BLOCK = re.compile(r"layers?\.(\d+)\.")


@pytest.fixture(scope="module", params=TOWERS)
def tower(request, tmp_path_factory):
    kind = request.param
    folder = tiny.tower(tmp_path_factory.mktemp("encoder") / "tower", kind, layers=LAYERS)
    scales = {"s2_scales": f"{tiny.SIDE},{2 * tiny.SIDE}"} if kind == "clip_s2" else {}
    cfg = {"mm_vision_tower": folder, "mm_vision_tower_type": kind, "mm_vision_select_layer": -2, **scales}
    return build_vision_tower(cfg)


def test_blocks_that_the_features_come_through(tower):
    """Those that a gradient reaches; of layers -2 the last one is left out."""
    tower.vision_tower.requires_grad_(True)
    tower(torch.randn(1, 3, tower.image_size, tower.image_size)).square().sum().backward()
    reached = {name for name, value in tower.vision_tower.named_parameters() if value.grad is not None}
    layers = {BLOCK.search(name)[1] for name in reached if BLOCK.search(name)}
    names = {module: name for name, module in tower.vision_tower.named_modules()}
    assert [names[block].split(".")[-1] for block in tower.blocks()] == sorted(layers) == ["0", "1", "2"]
    tower.zero_grad(set_to_none=True)
    tower.vision_tower.requires_grad_(False)


def test_levels(tower):
    levels = block_levels(tower.vision_tower, tower.blocks())
    for name, parameter in tower.vision_tower.named_parameters():
        if BLOCK.search(name):
            expected = int(BLOCK.search(name)[1])
        else:  # embeddings and the norm before the blocks; the norm and pooling behind them
            expected = -1 if "embed" in name or "pre" in name else 3
        assert levels[id(parameter)] == expected, name


def test_rates_by_hand():
    rates = [block_rate(1e-3, 0.5, 3, level) for level in (-1, 0, 1, 2, 3)]
    assert rates == [1e-3 / 16, 1e-3 / 8, 1e-3 / 4, 1e-3 / 2, 1e-3]


class Plain(nn.Module):
    """As timm and own encoders are: blocks in a Sequential, parameters of the module itself, a norm."""

    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1))
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 2), nn.GELU(), nn.Linear(4, 4), nn.GELU())
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(4, 1, 8) for _ in range(3)))
        self.norm = nn.LayerNorm(4)
        self.patch_embed = nn.Conv2d(3, 4, 2)  # defined last, used first


def test_an_encoder_of_another_make():
    encoder = Plain()
    assert find_blocks(encoder) == list(encoder.blocks) == used_blocks(encoder, ())
    assert used_blocks(encoder, [encoder.blocks[2]]) == list(encoder.blocks)[:2]
    assert used_blocks(encoder, encoder.blocks[2].parameters()) == list(encoder.blocks)[:2]
    levels = block_levels(encoder, list(encoder.blocks))
    assert levels[id(encoder.position)] == levels[id(encoder.patch_embed.weight)] == -1
    assert levels[id(encoder.blocks[1].norm1.weight)] == 1 and levels[id(encoder.norm.weight)] == 3
    assert find_blocks(nn.Linear(2, 2)) == []
