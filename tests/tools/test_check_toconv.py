"""`python -m llava.tools.check_toconv`: it holds for what is here, and fails for what is not."""

import re

import pytest
import torch

from llava.model.multimodal_encoder.token_compressor import PartialConv2d, TokenCompressor
from llava.tools import check_toconv
from llava.tools.check_toconv import check_geometry, main, partial_conv_at


def verdicts(pair=(16, 8)):
    return {name: holds for name, _, holds in check_geometry(*pair)}


def test_all_checks_pass_and_the_counts_are_told(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert "FAIL" not in out and out.endswith("all checks PASS\n")
    assert len(re.findall("^  PASS", out, re.MULTILINE)) == 12
    counts = re.findall(r"(\d+ -> \d+) +(-[\d.]+%)$", out, re.MULTILINE)
    assert counts == [
        ("576 -> 144", "-75%"),
        ("576 -> 64", "-88.89%"),
        ("256 -> 144", "-43.75%"),
        ("256 -> 64", "-75%"),
    ]


def test_the_table_is_aligned(capsys):
    check_toconv.print_table(check_toconv.count_rows())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    for title in ("image", "kernel", "receptive field", "tokens", "change"):
        start = lines[0].index(title)
        assert all(line[start] != " " and line[start - 1] == " " for line in lines), title


def uncorrected(correction):
    return torch.ones_like(correction)


def nan_at_the_centre(correction):
    correction = correction.clone()
    correction[..., 4, 4] = float("nan")
    return correction


@pytest.mark.parametrize("fault", [uncorrected, nan_at_the_centre])
def test_a_wrong_correction_exits_with_1(monkeypatch, capsys, fault):
    correction = PartialConv2d._correction

    def wrong(self, device=None):
        return fault(correction(self, device))

    monkeypatch.setattr(PartialConv2d, "_correction", wrong)
    monkeypatch.setattr("llava.model.multimodal_encoder.token_compressor.PUBLISHED_GEOMETRIES", {(16, 8): (3, 2, 1)})
    assert main([]) == 1
    out = capsys.readouterr().out
    assert re.search(r"FAIL  values +differ by at most (nan|\d)", out)
    assert out.endswith("checks FAIL\n")


def test_a_parameter_without_gradient_fails(monkeypatch):
    forward = TokenCompressor.forward

    def with_fixed_positions(self, tokens):
        self.pos_embed.requires_grad_(False)
        return forward(self, tokens)

    monkeypatch.setattr(TokenCompressor, "forward", with_fixed_positions)
    assert verdicts() == {"shapes": True, "gradients reach": False, "values": True}


def test_a_gradient_in_clip_fails(monkeypatch):
    random_clip = check_toconv.random_clip

    def with_gradient(image_size):
        clip = random_clip(image_size)
        clip.post_layernorm.bias.grad = torch.zeros_like(clip.post_layernorm.bias)
        return clip

    monkeypatch.setattr(check_toconv, "random_clip", with_gradient)
    assert verdicts()["gradients reach"] is False


def test_tokens_of_another_number_fail(monkeypatch):
    forward = TokenCompressor.forward
    monkeypatch.setattr(TokenCompressor, "forward", lambda self, tokens: forward(self, tokens)[:, 1:])
    assert verdicts() == {"shapes": False, "gradients reach": True, "values": True}


def test_the_formula_on_numbers_done_by_hand():
    grid = torch.arange(1.0, 10).view(1, 1, 3, 3)
    weight = torch.ones(1, 1, 3, 3)
    # the corner sees 1, 2, 4 and 5 under 4 of 9 taps; the centre all of them
    assert partial_conv_at(grid, weight, 0, 0, 1, 1).item() == pytest.approx(12 * 9 / 4)
    assert partial_conv_at(grid, weight, 0, 1, 1, 1).item() == pytest.approx(21 * 9 / 6)
    assert partial_conv_at(grid, weight, 1, 1, 1, 1).item() == 45
    assert partial_conv_at(grid, weight, 1, 1, 2, 1).item() == pytest.approx(28 * 9 / 4)
