"""What the encoders are given, looked at before they work on it.

Shapes: B samples, K visible ones of a sample's L patches; N packed patches of S samples. Shapes and dtypes are looked
at always; values on the host alone, since on a GPU a look is a wait, and in a traced graph by the graph itself.
"""

import torch

from .layers import grid_positions
from .varlen_lengths import pack_lengths
from .varlen_op import register


def _as_tensor(value, name: str, device=None) -> torch.Tensor:
    """A tensor as it is; lists and arrays become one."""
    if isinstance(value, torch.Tensor):
        if device is not None and value.device != device:
            raise ValueError(f"{name}: is on {value.device}, expected it on {device} as the patches")
        return value
    try:
        return torch.as_tensor(value, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{name}: found {type(value).__name__}, expected a tensor ({reason})") from None


def _is_integer(tensor: torch.Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _check_floats(values: torch.Tensor, name: str) -> None:
    """Whole numbers are most likely pixels of 0 to 255, which give features without meaning."""
    if not values.is_floating_point():
        raise ValueError(f"{name}: found {values.dtype}, expected normalised pixels in a floating-point dtype")


# --- the padded model -------------------------------------------------------------------------------------------------


def check_pixels(pixels, channels: int) -> None:
    """Refuse what is not [B, C, H, W] or [B, C, T, H, W] of floating-point numbers."""
    expected = f"expected [B, {channels}, H, W] or [B, {channels}, T, H, W]"
    if not isinstance(pixels, torch.Tensor):
        raise ValueError(f"pixel_values: found {type(pixels).__name__}, {expected} as one tensor")
    shape = pixels.shape
    if pixels.ndim not in (4, 5) or shape[1] != channels or shape[0] == 0 or (pixels.ndim == 5 and shape[2] == 0):
        raise ValueError(f"pixel_values: found shape {tuple(shape)}, {expected}")
    _check_floats(pixels, "pixel_values")


def as_indices(indices, batch: int, widths: tuple[int, ...], device) -> torch.Tensor:
    """`visible_indices` -> [B, K] int64.

    Args:
        indices: [B, K] integers in any order; [K] for every sample the same; or truth values [B, L] or [L], as many
            true ones in every sample.
        widths: what L may be.

    Raises:
        ValueError: any other shape, dtype or device; truth values in a traced graph, where K must be known.
    """
    indices = _as_tensor(indices, "visible_indices", device)
    if indices.ndim == 1:
        indices = indices.expand(batch, -1)
    is_mask = indices.dtype == torch.bool
    wrong = indices.ndim != 2 or indices.shape[0] != batch
    if wrong or (indices.shape[1] not in widths if is_mask else indices.shape[1] == 0):
        expected = f"[{batch}, {widths[0]}] of truth values" if is_mask else f"[{batch}, K] with K > 0"
        raise ValueError(f"visible_indices: found shape {tuple(indices.shape)}, expected {expected}")
    if not is_mask and not _is_integer(indices):
        raise ValueError(f"visible_indices: found {indices.dtype}, expected integers or truth values")
    return _where_true(indices) if is_mask else indices.long()


def _where_true(mask: torch.Tensor) -> torch.Tensor:
    if torch.compiler.is_compiling():
        raise ValueError("visible_indices: found truth values in a traced graph, expected indices, whose number it has")
    counts = mask.sum(1)
    least, most = int(counts.min()), int(counts.max())
    if least != most or not least:
        raise ValueError(
            f"visible_indices: found truth values that keep {least} to {most} patches of a sample, expected as many of "
            "every sample, at least one"
        )
    return mask.nonzero()[:, 1].unflatten(0, (len(mask), -1))


def check_indices(indices: torch.Tensor, limit: int) -> None:
    """Refuse indices outside of 0 to `limit` - 1."""
    if torch.compiler.is_compiling():
        inside = (indices.amin() >= 0) & (indices.amax() < limit)
        torch._assert_async(inside, "visible_indices: found an index below 0 or beyond the last patch")
    elif indices.device.type == "cpu":  # on a GPU, looking would mean waiting for it, at every step
        least, most = int(indices.min()), int(indices.max())
        if not 0 <= least <= most < limit:
            raise ValueError(f"visible_indices: found {least} to {most}, expected 0 to {limit - 1}")


def as_positions(positions, shape: tuple[int, ...], device) -> torch.Tensor:
    """`patch_positions` -> [*shape, 3], of every token that enters the encoder; [K, 3] is for every sample the same.

    Raises:
        ValueError: any other shape, dtype or device.
    """
    positions = _as_tensor(positions, "patch_positions", device)
    if positions.dtype == torch.bool or positions.is_complex():
        raise ValueError(f"patch_positions: found {positions.dtype}, expected numbers (t, h, w)")
    if positions.ndim == 2 and len(shape) == 2:
        positions = positions.expand(shape[0], -1, -1)
    if positions.shape != (*shape, 3):
        raise ValueError(
            f"patch_positions: found shape {tuple(positions.shape)}, expected {(*shape, 3)}, one (t, h, w) for each "
            "token that enters the encoder"
        )
    return positions


# --- the packed model -------------------------------------------------------------------------------------------------


def check_rows(rows, width: int) -> None:
    """Refuse what is not [N, width] of floating-point numbers."""
    if not isinstance(rows, torch.Tensor):
        raise ValueError(f"hidden_states: found {type(rows).__name__}, expected a tensor [N, {width}]")
    if rows.ndim != 2 or rows.shape[1] != width:
        raise ValueError(f"hidden_states: found shape {tuple(rows.shape)}, expected [N, {width}]")
    _check_floats(rows, "hidden_states")


def as_grid(grid_thw) -> torch.Tensor:
    """`grid_thw` -> integers [S, 3]."""
    grid_thw = _as_tensor(grid_thw, "grid_thw")
    if grid_thw.ndim != 2 or grid_thw.shape[1] != 3 or not _is_integer(grid_thw):
        raise ValueError(
            f"grid_thw: found {grid_thw.dtype} of shape {tuple(grid_thw.shape)}, expected integers of shape [S, 3]"
        )
    return grid_thw


def read_grid(grid_thw: torch.Tensor, patches: int) -> list[list[int]]:
    """`grid_thw` on the host.

    Raises:
        ValueError: a size below 1, or another number of patches.
    """
    grid = grid_thw.tolist()
    total = sum(t * h * w for t, h, w in grid)
    if not grid or min(min(sizes) for sizes in grid) < 1 or total != patches:
        raise ValueError(
            f"grid_thw: found {grid[:8]}{' ...' if len(grid) > 8 else ''} with {total} patches, expected "
            f"sizes of at least 1 with the {patches} patches of hidden_states"
        )
    return grid


def _plan(rows, grid_thw):
    """For traced graphs: (`cu_seqlens`, places [N, 3]) on the device of `rows`, from the grid read on the host."""
    grid = read_grid(grid_thw, len(rows))
    cu_seqlens, _ = pack_lengths([t * h * w for t, h, w in grid], rows.device)
    return cu_seqlens, grid_positions(grid, rows.device)


def _plan_shapes(rows, grid_thw):
    cu_seqlens = rows.new_empty(grid_thw.shape[0] + 1, dtype=torch.int32)
    return cu_seqlens, rows.new_empty((rows.shape[0], 3), dtype=torch.int64)


register("packing_plan", "(Tensor rows, Tensor grid_thw) -> (Tensor, Tensor)", _plan, _plan_shapes)
