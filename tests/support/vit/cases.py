"""Inputs that use all that an HEVC-ViT encoder can do, and how its forms and the formulas take them.

Outputs are dictionaries of packed tensors, one token after the other: `last_hidden_state` [N, D], `pooler_output`
[samples, D] and `hidden_states.i` [N, D].
"""

from typing import NamedTuple

import torch

from llava.tools.vit.outputs import model_inputs
from llava.tools.vit.reference import Outputs, encode

LONG_TIME_AXIS = "long time axis"


class Case(NamedTuple):
    """One call of the packed model, a call for each of `samples` of the padded one.

    samples: each [B, C, height, width] or [B, C, T, height, width].
    padded: further arguments of the padded model: visible_indices, patch_positions.
    formulas: further arguments of `encode`: indices, positions. What the same input is for the formulas.
    """

    name: str
    samples: list
    padded: dict | None = None
    formulas: dict | None = None


def build_cases(channels: int, patch: int, rope_temporal_size: int | None = None) -> list[Case]:
    """Cases for an encoder with such pixels; those of a long time axis where there is a `rope_temporal_size`."""
    generator = torch.Generator().manual_seed(1)

    def pixels(batch, *grid):
        return torch.randn(batch, channels, *grid[:-2], grid[-2] * patch, grid[-1] * patch, generator=generator)

    def choose(batch, count, total):
        return torch.stack([torch.randperm(total, generator=generator)[:count] for _ in range(batch)])

    sparse, spread = choose(2, 7, 3 * 2 * 3), choose(2, 2 * 2 * 3, (rope_temporal_size or 2) * 2 * 3)
    places = torch.randint(0, 40, (2, 6, 3), generator=generator)
    few_places = torch.randint(0, 40, (2, 7, 3), generator=generator)
    cases = [
        Case("image", [pixels(2, 3, 4)]),
        Case("video", [pixels(2, 3, 2, 3)]),
        Case("sparse video", [pixels(2, 3, 2, 3)], {"visible_indices": sparse}, {"indices": sparse}),
        Case("mixed sizes", [pixels(1, 3, 2), pixels(1, 1, 5), pixels(1, 2, 2, 1), pixels(1, 1, 1)]),
        Case("explicit positions", [pixels(2, 2, 3)], {"patch_positions": places}, {"positions": places}),
        Case(
            "sparse, explicit positions",
            [pixels(2, 3, 2, 3)],
            {"visible_indices": sparse, "patch_positions": few_places},
            {"indices": sparse, "positions": few_places},
        ),
    ]
    if rope_temporal_size is not None:
        # as many indices as tokens: all tokens stay, and the indices say where they stand in the long time axis
        positions = raster_places(spread, 2, 3)
        cases.append(Case(LONG_TIME_AXIS, [pixels(2, 2, 2, 3)], {"visible_indices": spread}, {"positions": positions}))
    return cases


def raster_places(index: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """[...] places counted in raster order -> [..., 3] as (t, h, w)."""
    frame = rows * columns
    return torch.stack([index // frame, index % frame // columns, index % frame % columns], dim=-1)


def named(outputs: list[Outputs]) -> dict[str, torch.Tensor]:
    """Outputs of the samples as one dictionary of packed tensors."""

    def pack(tensors):
        return torch.cat([tensor.flatten(0, -2) for tensor in tensors])

    result = {"last_hidden_state": pack([out.last_hidden_state for out in outputs])}
    if outputs[0].pooler_output is not None:
        result["pooler_output"] = pack([out.pooler_output for out in outputs])
    for i in range(len(outputs[0].hidden_states)):
        result[f"hidden_states.{i}"] = pack([out.hidden_states[i] for out in outputs])
    return result


def run_formulas(state: dict, case: Case, **settings) -> dict[str, torch.Tensor]:
    """The formulas in float64; `settings` are the keyword arguments of `encode` that a config gives."""
    return named([encode(state, sample.double(), **settings, **(case.formulas or {})) for sample in case.samples])


@torch.no_grad()
def run_padded(model, case: Case) -> dict[str, torch.Tensor]:
    calls = [model(pixel_values=sample, **(case.padded or {}), output_hidden_states=True) for sample in case.samples]
    return named([Outputs(out.last_hidden_state, out.pooler_output, out.hidden_states) for out in calls])


@torch.no_grad()
def run_packed(model, case: Case) -> dict[str, torch.Tensor]:
    """All samples in one call; also returns the rows that it was given, as `hidden_states_in`."""
    inputs = [model_inputs(model.config, sample) for sample in case.samples]
    rows, grid = (torch.cat([each[name] for each in inputs]) for name in ("hidden_states", "grid_thw"))
    chosen = case.formulas or {}
    indices, positions = chosen.get("indices"), chosen.get("positions")
    if indices is not None:
        batch, count = indices.shape
        if positions is None:
            positions = raster_places(indices, *grid[0, 1:].tolist())
        starts = torch.arange(batch)[:, None] * (len(rows) // batch)
        rows, grid = rows[(starts + indices).flatten()], torch.tensor([[1, 1, count]] * batch)
    positions = None if positions is None else positions.flatten(0, 1)
    out = model(hidden_states=rows, grid_thw=grid, patch_positions=positions, output_hidden_states=True)
    packed = Outputs(out.last_hidden_state, out.pooler_output, out.hidden_states)
    return named([packed]) | {"hidden_states_in": rows}


def run_case(model, case: Case) -> dict[str, torch.Tensor]:
    run = run_padded if model.main_input_name == "pixel_values" else run_packed
    return run(model, case)


def read_golden_case(path: str, prefix: str, patch: int, layers: int) -> tuple[Case, dict[str, torch.Tensor]]:
    """A case with published outputs, (case, outputs), from a file of them.

    Args:
        path: io.safetensors.
        prefix: which of its cases.
        patch, layers: of its encoder.
    """
    from safetensors.torch import load_file

    file = load_file(path)
    io = {name.removeprefix(f"{prefix}."): value for name, value in file.items() if name.startswith(f"{prefix}.")}
    if "image.0" in io:
        samples = [io[f"image.{i}"][None] for i in range(len(io["grid_thw"]))]
    elif "pixel_values" in io:
        samples = [io["pixel_values"]]
    elif "hidden_states_in" in io:  # the clip of 4 frames of 2 x 3 patches that the rows were cut from
        rows = io["hidden_states_in"].unflatten(0, (4, 6)).transpose(1, 2)
        frames = torch.nn.functional.fold(rows, (2 * patch, 3 * patch), patch, stride=patch)
        samples = [frames.transpose(0, 1)[None]]
    else:
        samples = [file["video.pixel_values"]]
    indices, positions = io.get("visible_indices"), io.get("patch_positions")
    if positions is not None and positions.ndim == 2:
        positions = positions[None]
    padded = {"visible_indices": indices, "patch_positions": positions}
    outputs = {name: io[name].flatten(0, -2) for name in ("last_hidden_state", "pooler_output")}
    for name, value in io.items():
        if name.startswith("hidden_states."):
            index = int(name.rpartition(".")[2])
            outputs[f"hidden_states.{index % (layers + 1)}"] = value.flatten(0, -2)
    if "hidden_states_in" in io:
        outputs["hidden_states_in"] = io["hidden_states_in"]
    return Case(prefix, samples, padded, {"indices": indices, "positions": positions}), outputs


def random_state(shapes: dict[str, torch.Tensor], small: bool = False) -> dict[str, torch.Tensor]:
    """Seeded random weights for the names and shapes of a padded model, with every bias and norm at work.

    small: the tokens stay near 1e-3 from the patch embedding to the pooled vector, so that the variance that a norm
        sees is of the size of its eps: another eps then gives quite other outputs.
    """
    generator = torch.Generator().manual_seed(2)
    layers = sum(name.endswith("layer_norm1.weight") for name in shapes)
    state = {}
    for name, like in shapes.items():
        value = torch.randn(like.shape, generator=generator)
        if name.endswith("bias"):
            value *= 0.2
        elif value.ndim == 1:
            value = 1 + 0.2 * value
        elif name != "head.probe":
            value /= like[0].numel() ** 0.5
        into_stream = "self_attn.out_proj" in name or (name.startswith("encoder") and ".mlp.fc2." in name)
        if into_stream:
            value /= (2 * layers) ** 0.5  # as wide at the end as at the start
        if small and (into_stream or any(part in name for part in ("embedding", "norm_pre", "attention.out_proj"))):
            value *= 1e-3
        state[name] = value
    return state
