"""Tiny encoders that take any size, and what the stock models make of the same pixels, in raster order."""

import torch

SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2)
QWEN = dict(depth=3, num_heads=2, out_hidden_size=48, intermediate_size=48, hidden_size=32)
KINDS = {
    "siglip2_vision_model": {**SIZES, "patch_size": 14, "num_patches": 16},
    "pixtral": {**SIZES, "image_size": 56, "patch_size": 14},
    "qwen2_vl_vision": dict(depth=3, embed_dim=32, hidden_size=48, num_heads=2, mlp_ratio=2),
    # windows of 4 x 4 patches, so that pictures have several, not all of them whole
    "qwen2_5_vl_vision": {**QWEN, "window_size": 56, "fullatt_block_indexes": [1]},
    "qwen3_vl_vision": {**QWEN, "patch_size": 16, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
}
PATCH = {"qwen3_vl_vision": 16}
MULTIPLE = {"qwen2_vl_vision": 28, "qwen2_5_vl_vision": 28, "qwen3_vl_vision": 32}


def classes(kind):
    """(config class, stock model class)."""
    import transformers
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    model = {
        "siglip2_vision_model": transformers.Siglip2VisionModel,
        "pixtral": transformers.PixtralVisionModel,
        "qwen2_vl_vision": Qwen2VisionTransformerPretrainedModel,
        "qwen2_5_vl_vision": Qwen2_5_VisionTransformerPretrainedModel,
        "qwen3_vl_vision": Qwen3VLVisionModel,
    }[kind]
    return model.config_class, model


def stock(kind, **changes):
    config, model = classes(kind)
    torch.manual_seed(1)
    made = model(config(**{**KINDS[kind], **changes})).eval()
    for parameter in made.parameters():  # so that places and pixels count
        torch.nn.init.normal_(parameter, std=0.15)
    return made


def sizes(kind):
    """(height, width) of pictures: of two shapes of which one occurs twice, one of them wide, one the smallest."""
    m = MULTIPLE.get(kind, 14)
    return [(3 * m, 5 * m), (m, m), (2 * m, 7 * m), (3 * m, 5 * m), (4 * m, m)]


@torch.no_grad()
def raster_states(model, kind, images):
    """Hidden states of the stock model for a list of [3, H, W], all in one call of its own way of batching.

    Returns:
        For each hidden state a list of [n_i, D].
    """
    return {"siglip2_vision_model": _siglip2, "pixtral": _pixtral}.get(kind, _qwen)(model, images)


def _siglip2(model, images):
    """Padded to the longest and masked."""
    p = model.config.patch_size
    rows = [
        torch.stack(
            [
                image[:, y : y + p, x : x + p].permute(1, 2, 0).reshape(-1)
                for y in range(0, image.shape[1], p)
                for x in range(0, image.shape[2], p)
            ]
        )
        for image in images
    ]
    longest = max(map(len, rows))
    padded = torch.stack([torch.cat([row, torch.zeros(longest - len(row), row.shape[1])]) for row in rows])
    mask = torch.stack([(torch.arange(longest) < len(row)).long() for row in rows])
    shapes = torch.tensor([[image.shape[1] // p, image.shape[2] // p] for image in images])
    found = model(padded, mask, shapes, output_hidden_states=True).hidden_states
    return [[row[: len(own)] for row, own in zip(state, rows, strict=True)] for state in found]


def _pixtral(model, images):
    """Padded to the largest, told the sizes, with its block mask."""
    p = model.config.patch_size
    height, width = (max(image.shape[i] for image in images) for i in (1, 2))
    padded = torch.zeros(len(images), 3, height, width)
    for canvas, image in zip(padded, images, strict=True):
        canvas[:, : image.shape[1], : image.shape[2]] = image
    given = [tuple(image.shape[1:]) for image in images]
    counts = [h * w // p**2 for h, w in given]
    found = model(padded, image_sizes=given, output_hidden_states=True).hidden_states
    return [list(state[0].split(counts)) for state in found]


def _qwen(model, images):
    """By 2x2 blocks, each patch twice in time, and back again."""
    from transformers.vision_utils import get_vision_window_index

    config = model.config
    p, m = config.patch_size, config.spatial_merge_size
    rows, grids, back, base = [], [], [], 0
    for image in images:
        h, w = image.shape[1] // p, image.shape[2] // p
        places = [
            (m * y + j, m * x + i) for y in range(h // m) for x in range(w // m) for j in range(m) for i in range(m)
        ]
        for y, x in places:
            patch = image[:, p * y : p * y + p, p * x : p * x + p]
            rows.append(torch.stack([patch, patch], dim=1).reshape(-1))
        order = {place: number for number, place in enumerate(places)}
        back += [base + order[y, x] for y in range(h) for x in range(w)]
        grids.append([1, h, w])
        base += h * w
    grid_thw = torch.tensor(grids)
    found = model(torch.stack(rows), grid_thw, output_hidden_states=True).hidden_states
    if hasattr(config, "window_size"):
        windows, _ = get_vision_window_index(grid_thw, m, config.window_size, p)
        found = [state.view(-1, m * m, state.shape[-1])[windows.argsort()].flatten(0, 1) for state in found]
    counts = [h * w for _, h, w in grids]
    return [list(state[back].split(counts)) for state in found]
