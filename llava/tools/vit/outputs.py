"""Outputs of an HEVC-ViT checkpoint from its several forms, and how far they lie apart."""

from llava.errors import LlavaError
from llava.tools.vit.checkpoint import Checkpoint, class_of, model_class, read_state

TOLERANCE = 1e-4


def random_images(config, count: int = 2):
    """[count, C, 8*p, 6*p] in float32: not square, so that rows and columns cannot change places unseen."""
    import torch

    p = config.patch_size
    return torch.randn(count, config.num_channels, 8 * p, 6 * p, generator=torch.Generator().manual_seed(0))


def run_reference(checkpoint: Checkpoint, pixels):
    """`Outputs` of the plain formulas for the weights of a checkpoint."""
    from llava.tools.vit.reference import encode
    from llavavit.conversion import convert_state_dict

    config = checkpoint.config
    if config.hidden_act != "gelu":
        raise LlavaError(f"{checkpoint.path}: hidden_act: found {config.hidden_act!r}, expected 'gelu'")
    return encode(
        convert_state_dict(read_state(checkpoint.path), "source"),
        pixels,
        num_heads=config.num_attention_heads,
        layer_norm_eps=config.layer_norm_eps,
        head_norm_eps=config.layer_norm_eps if config.head_norm_eps is None else config.head_norm_eps,
        rope_theta=config.rope_theta,
    )


def run_converted(checkpoint: Checkpoint, layout: str, pixels):
    """`Outputs` of the model of a layout with a checkpoint's weights, which are read, converted and dropped again."""
    import torch

    from llavavit.conversion import convert_config, convert_state_dict

    config = checkpoint.config
    if layout != checkpoint.layout:
        config = convert_config(config.to_dict(), model_class(layout).config_class)
    with torch.device("meta"):
        model = class_of(config)(config)
    state = convert_state_dict(read_state(checkpoint.path), layout)
    model.load_state_dict({name: state.pop(name).float() for name in list(state)}, assign=True)
    return run_model(model.eval(), pixels)


def run_folder(folder: str, layout: str, pixels):
    """`Outputs` of what `from_pretrained` makes of a folder."""
    import torch

    return run_model(model_class(layout).from_pretrained(folder, dtype=torch.float32).eval(), pixels)


def run_model(model, pixels):
    """`Outputs` of a padded or packed model for [B, C, H, W] or [B, C, T, H, W]."""
    import torch

    with torch.no_grad():
        out = model(**model_inputs(model.config, pixels), output_hidden_states=True)
    return unpack(out.last_hidden_state, out.pooler_output, out.hidden_states, len(pixels))


def model_inputs(config, pixels) -> dict:
    """What the padded or packed model of a config takes, for pixels as in `run_model`."""
    import torch
    import torch.nn.functional as F

    from llavavit import LlavaViTPackingConfig

    if config.model_type != LlavaViTPackingConfig.model_type:
        return {"pixel_values": pixels}
    clips, p = pixels if pixels.ndim == 5 else pixels[:, :, None], config.patch_size
    batch, _, frames, height, width = clips.shape
    rows = F.unfold(clips.transpose(1, 2).flatten(0, 1), p, stride=p).transpose(1, 2).flatten(0, 1)
    grid = torch.tensor([[frames, height // p, width // p]] * batch)
    return {"hidden_states": rows.contiguous(), "grid_thw": grid}


def unpack(last_hidden_state, pooler_output, hidden_states, batch: int):
    """`Outputs` of a model, each [batch, L, D] whether it came packed or not."""
    from llava.tools.vit.reference import Outputs

    def batched(x):
        return x.reshape(batch, -1, x.shape[-1])

    return Outputs(batched(last_hidden_state), pooler_output, tuple(map(batched, hidden_states)))


def differences(found, expected) -> dict[str, float]:
    """Largest difference of each output that there is.

    Hidden states grow with depth and with them their rounding: where a state's largest value is above 1, its difference
    is told in units of that value.
    """

    def largest(a, b):
        return float((a - b).abs().max())

    result = {"last_hidden_state": largest(found.last_hidden_state, expected.last_hidden_state)}
    if expected.pooler_output is not None:
        result["pooler_output"] = largest(found.pooler_output, expected.pooler_output)
    states = list(zip(found.hidden_states, expected.hidden_states, strict=True))
    result["hidden_states"] = _worst(largest(a, b) / max(1.0, float(b.abs().max())) for a, b in states)
    return result


def _worst(values) -> float:
    """The largest; NaN where there is one, which `max` would pass over."""
    values = list(values)
    return next((value for value in values if value != value), max(values))


def check_differences(measured: dict[str, float], what: str) -> None:
    """Raise LlavaError where an output differs by more than `TOLERANCE`, or is NaN."""
    for name, value in measured.items():
        if not value <= TOLERANCE:
            raise LlavaError(
                f"{what}: {name} differs by {value:.1e}, expected at most {TOLERANCE:.0e}; nothing is written"
            )


def describe_inputs(config) -> str:
    """What `random_images` are, in words."""
    count, _, height, width = random_images(config).shape
    return f"{count} random images of {height}x{width} pixels in float32"
