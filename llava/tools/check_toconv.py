"""Check the token compressor (ToConv): shapes, gradients and values of the four published geometries.

    python -m llava.tools.check_toconv

Each geometry runs on the features of a small random CLIP made on the spot. The partial convolution is compared with its
formula, written out position by position. Ends with the token counts, and with exit status 1 if a check fails.
"""

import argparse
import math

from llava.errors import report_errors

LIMIT = 1e-5  # largest difference from the formula, float32
PATCH_SIZE = 14
HIDDEN_DIM = 32


def partial_conv_at(grid, weight, row: int, column: int, stride: int, padding: int):
    """One output position of a partial convolution (arXiv 1804.07723) by its formula.

    Args:
        grid: [B, D, in, in], all valid.
        weight: [E, D, k, k].
        row, column: of the output grid.

    Returns:
        [B, E]: the sum over the taps inside the grid, times kernel area / number of those taps.
    """
    side, kernel = grid.shape[-1], weight.shape[-1]
    total, taps = 0, 0
    for i in range(kernel):
        for j in range(kernel):
            y, x = row * stride + i - padding, column * stride + j - padding
            if 0 <= y < side and 0 <= x < side:
                total = total + grid[:, :, y, x] @ weight[:, :, i, j].T
                taps += 1
    return total * (kernel * kernel / taps)


def named_positions(side: int) -> list[tuple[str, int, int]]:
    """(name, row, column) of the corners, the middles of the edges and the centre of an output grid."""
    rows = {"top": 0, "middle": side // 2, "bottom": side - 1}
    columns = {"left": 0, "middle": side // 2, "right": side - 1}
    return [(f"{r} {c}", row, column) for r, row in rows.items() for c, column in columns.items()]


def random_clip(image_size: int):
    """A CLIP vision encoder of two layers and 32 channels, the same at every call."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN_DIM, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPVisionConfig(**sizes, image_size=image_size, patch_size=PATCH_SIZE)
    return CLIPVisionModel._from_config(config)


def check_geometry(input_grid_size: int, output_grid_size: int) -> list[tuple[str, str, bool]]:
    """(what was checked, what was found, whether it holds) for one geometry."""
    import torch

    from llava.model.multimodal_encoder.token_compressor import TokenCompressor

    clip = random_clip(input_grid_size * PATCH_SIZE)
    compressor = TokenCompressor(input_grid_size, output_grid_size, HIDDEN_DIM)
    pixels = torch.randn(2, 3, clip.config.image_size, clip.config.image_size)
    with torch.no_grad():
        tokens = clip(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]  # without the class token
    compressed = compressor(tokens)
    # weighted, since a plain sum of what a GroupNorm gives hardly depends on the convolution before it
    (compressed * torch.randn_like(compressed)).sum().backward()
    expected = (2, output_grid_size**2, HIDDEN_DIM)
    return [
        (
            "shapes",
            f"{list(pixels.shape)} -> {list(tokens.shape)} -> {list(compressed.shape)}",
            tokens.shape == (2, input_grid_size**2, HIDDEN_DIM) and compressed.shape == expected,
        ),
        _check_gradients(clip, compressor),
        _check_values(compressor, tokens),
    ]


def _check_gradients(clip, compressor):
    moved = {
        name: p.grad is not None and bool(p.grad.isfinite().all()) and bool(p.grad.any())
        for name, p in compressor.named_parameters()
    }
    inside_clip = sum(p.grad is not None for p in clip.parameters())
    found = f"{sum(moved.values())} of {len(moved)} of the compressor's parameters, {inside_clip} of CLIP's"
    return "gradients reach", found, all(moved.values()) and not inside_clip


def _check_values(compressor, tokens):
    import torch

    conv, side = compressor.compress_conv, compressor.input_grid_size
    grid = tokens.transpose(1, 2).unflatten(2, (side, side))
    geometry = compressor.stride, compressor.padding
    differences = {}
    with torch.no_grad():
        outputs = conv(grid)
        for name, row, column in named_positions(compressor.output_grid_size):
            formula = partial_conv_at(grid.double(), conv.conv.weight.double(), row, column, *geometry)
            differences[name] = float((outputs[:, :, row, column] - formula).abs().max())
    worst = max(differences, key=lambda name: (math.isnan(differences[name]), differences[name]))
    largest = differences[worst]
    found = f"differ by at most {largest:.1e} ({worst}) at corners, edges and centre"
    return "values", found, largest <= LIMIT


def count_rows() -> list[tuple[str, ...]]:
    """The token counts of the published geometries, a heading first."""
    from llava.model.multimodal_encoder.token_compressor import PUBLISHED_GEOMETRIES

    rows = [("grid", "image", "kernel", "stride", "padding", "receptive field", "tokens", "change")]
    for (before, after), (kernel, stride, padding) in PUBLISHED_GEOMETRIES.items():
        change = 100 * (after**2 / before**2 - 1)
        rows.append(
            (
                f"{before}x{before} -> {after}x{after}",
                f"{before * PATCH_SIZE} px",
                f"{kernel}",
                f"{stride}",
                f"{padding}",
                f"{kernel}x{kernel} tokens",
                f"{before**2} -> {after**2}",
                f"{change:.4g}%",
            )
        )
    return rows


def print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


@report_errors
def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m llava.tools.check_toconv", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.parse_args(argv)

    from llava.model.multimodal_encoder.token_compressor import PUBLISHED_GEOMETRIES

    failed = 0
    for before, after in PUBLISHED_GEOMETRIES:
        print(f"{before}x{before} -> {after}x{after}")
        for name, found, holds in check_geometry(before, after):
            failed += not holds
            print(f"  {'PASS' if holds else 'FAIL'}  {name:<16} {found}")
    print(f"\nTokens of CLIP with a patch of {PATCH_SIZE} px")
    print_table(count_rows())
    print(f"\n{failed} checks FAIL" if failed else "\nall checks PASS")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
