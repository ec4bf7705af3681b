"""A OneVision-Encoder checkpoint called as its release describes it: by AutoModel, pictures and far-apart frames."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, CLIPImageProcessorPil

from llavavit import OneVisionEncoderConfig, OneVisionEncoderModel

SIDE, PATCH, FRAMES, TARGET = 56, 14, 4, 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("onevision-encoder")
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE)
    torch.manual_seed(0)
    OneVisionEncoderModel(OneVisionEncoderConfig(**sizes, initializer_range=0.2)).save_pretrained(path)
    crop = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=crop).save_pretrained(path)
    return str(path)


def picture(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (80, 100, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("attention", [None, "sdpa", "eager"])
@torch.no_grad()
def test_pictures_and_frames(folder, attention):
    asked = {} if attention is None else {"attn_implementation": attention}
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, **asked).to("cpu").eval()
    preprocessor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    pixels = preprocessor(images=picture(0), return_tensors="pt")["pixel_values"]
    outputs = model(pixels)
    assert outputs.last_hidden_state.shape == (1, 16, 64) and outputs.pooler_output.shape == (1, 64)

    frames = preprocessor(images=[picture(i) for i in range(FRAMES)], return_tensors="pt")["pixel_values"]
    video = frames.unsqueeze(0).permute(0, 2, 1, 3, 4)  # [B, C, T, H, W]
    times = torch.linspace(0, TARGET - 1, FRAMES).long()
    side = SIDE // PATCH
    places = torch.cartesian_prod(times, torch.arange(side), torch.arange(side))[None]
    indices = (times[:, None] * side**2 + torch.arange(side**2)).reshape(1, -1)  # in the grid of 64 frames
    by_place, by_index = model(video, patch_positions=places), model(video, visible_indices=indices)
    assert by_place.last_hidden_state.shape == (1, FRAMES * side**2, 64)
    assert torch.equal(by_place.last_hidden_state, by_index.last_hidden_state)
    close = model(video, patch_positions=places // torch.tensor([21, 1, 1]))
    assert (close.last_hidden_state - by_place.last_hidden_state).abs().max() > 1e-3  # the time axis is long
