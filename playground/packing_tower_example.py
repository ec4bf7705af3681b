"""A walk through the packed HEVC-ViT tower, every shape printed from a run.

    python playground/packing_tower_example.py [--vision_tower FOLDER]

Without a folder a small encoder with random weights is made (patch 16, width 64); with one, that encoder is loaded.
"""

import argparse
import tempfile

import torch

from llava.errors import report_errors


def make_encoder(folder: str) -> str:
    """Folder of a small random encoder in the packed layout."""
    from llavavit import LlavaViTPackingConfig, LlavaViTPackingModel

    torch.manual_seed(0)
    config = LlavaViTPackingConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=2, patch_size=16, image_size=224
    )
    LlavaViTPackingModel(config).save_pretrained(folder)
    return folder


def show(name: str, value) -> None:
    """A line with a tensor's shape, a list of tensors' shapes, or the value itself."""
    if isinstance(value, torch.Tensor):
        value = list(value.shape)
    elif isinstance(value, list) and isinstance(value[0], torch.Tensor):
        value = [list(item.shape) for item in value]
    print(f"{name:24}{value}")


def walk(folder: str) -> None:
    from llava.model.multimodal_encoder.builder import build_vision_tower
    from llava.model.multimodal_encoder.hevc_vit_packing_tower import images_to_packed, packed_to_features

    tower = build_vision_tower(
        {"mm_vision_tower": folder, "mm_vision_tower_type": "hevc_vit_packing", "mm_vision_select_layer": -2}
    )
    patch = tower.config.patch_size
    side = 14 * patch

    print("\n-- a batch: four images of one size, step by step --")
    images = torch.randn(4, 3, side, side)
    show("images", images)
    patches, grid_thw = images_to_packed(images, patch)
    show("hidden_states", patches)
    show("grid_thw", grid_thw.tolist())
    with torch.no_grad():
        packed = tower.vision_tower(patches, grid_thw, hidden_state_indices=tower.layers()).hidden_states[0]
    show("encoder output", packed)
    features = packed_to_features(packed, grid_thw, batched=True)
    show("features", features)
    print(f"{'equal to tower(images)':24}{torch.equal(features, tower(images))}")

    print("\n-- a list: two images of different sizes and a clip of three frames, in one forward --")
    mixed = [
        torch.randn(3, side, side),
        torch.randn(3, 4 * patch, 10 * patch),
        torch.randn(3, 3, 8 * patch, 6 * patch),
    ]
    show("images", mixed)
    patches, grid_thw = images_to_packed(mixed, patch)
    show("hidden_states", patches)
    show("grid_thw", grid_thw.tolist())
    features, dims = tower(mixed, return_spatial_dims=True)
    show("features", features)
    show("rows and columns", dims)
    alone = [tower([image])[0] for image in mixed]
    worst = max((a - b).abs().max().item() for a, b in zip(alone, features, strict=True))
    print(f"{'one by one':24}largest difference {worst:.1e}")


@report_errors
def main() -> None:
    parser = argparse.ArgumentParser(description="Print the shapes on the way through the packed HEVC-ViT tower.")
    parser.add_argument("--vision_tower", help="folder of an encoder, in either layout (default: a small random one)")
    args = parser.parse_args()
    from transformers.utils import logging

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        walk(args.vision_tower or make_encoder(folder))


if __name__ == "__main__":
    main()
