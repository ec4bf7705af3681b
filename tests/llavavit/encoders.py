"""Small encoders with random weights, inputs for them, and what the plain formulas make of both."""

import torch

from llava.tools.vit.reference import encode
from llavavit import (
    LlavaViTConfig,
    LlavaViTModel,
    LlavaViTPackingConfig,
    LlavaViTPackingModel,
    OneVisionEncoderConfig,
    OneVisionEncoderModel,
)
from llavavit.conversion import convert_state_dict
from llavavit.layers import frames_to_patches

KINDS = {
    "padded": (LlavaViTConfig, LlavaViTModel),
    "packed": (LlavaViTPackingConfig, LlavaViTPackingModel),
    "onevision": (OneVisionEncoderConfig, OneVisionEncoderModel),
}
PATCH, WIDTH, LAYERS = 4, 64, 3


def make(kind, seed=0, **changes):
    """An encoder whose weights, norms and biases included, all tell in the output."""
    config_class, model_class = KINDS[kind]
    sizes = dict(
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        patch_size=PATCH,
        image_size=16,
    )
    torch.manual_seed(seed)
    model = model_class(config_class(**sizes | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def pair(**changes):
    """A padded and a packed encoder with the same weights."""
    padded, packed = make("padded", **changes), make("packed", **changes)
    packed.load_state_dict(convert_state_dict(padded.state_dict(), "packed"))
    return padded, packed


def images(*sizes, channels=3, seed=0):
    """Random images [C, h, w], or clips [C, T, h, w] for sizes (T, h, w), in pixels."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(channels, *size, generator=generator) for size in sizes]


def pack(samples):
    """Images and clips -> (rows [N, C*p*p], grid_thw [S, 3])."""
    clips = [sample if sample.ndim == 4 else sample[:, None] for sample in samples]
    rows = torch.cat([frames_to_patches(clip.transpose(0, 1), PATCH) for clip in clips])
    return rows, torch.tensor([(clip.shape[1], clip.shape[2] // PATCH, clip.shape[3] // PATCH) for clip in clips])


def formulas(model, pixels, indices=None, positions=None):
    """Outputs of the plain formulas in float64 with the model's weights."""
    config = model.config
    return encode(
        convert_state_dict(model.state_dict(), "source"),
        pixels.double(),
        num_heads=config.num_attention_heads,
        layer_norm_eps=config.layer_norm_eps,
        head_norm_eps=config.layer_norm_eps if config.head_norm_eps is None else config.head_norm_eps,
        rope_theta=config.rope_theta,
        indices=indices,
        positions=positions,
    )


def difference(found, expected):
    """Largest difference of two tensors of one shape, over the largest value expected."""
    assert found.shape == expected.shape
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1)).item()


def assert_same(found, expected, limit=1e-5):
    """Two outputs (last_hidden_state, pooler_output, hidden_states) agree."""
    assert difference(found.last_hidden_state, expected.last_hidden_state) < limit
    assert (found.pooler_output is None) == (expected.pooler_output is None)
    if expected.pooler_output is not None:
        assert difference(found.pooler_output, expected.pooler_output) < limit
    assert len(found.hidden_states) == len(expected.hidden_states)
    for a, b in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert difference(a, b) < limit
