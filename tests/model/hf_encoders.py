"""A tiny random model of every type that the tower for transformers' vision backbones takes, and its own states."""

import torch

from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_encoder.hf_vision import FACTS

SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2)
PLAIN = dict(**SIZES, image_size=42, patch_size=14)
STAGES = dict(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1])
WINDOWS = dict(embed_dim=8, depths=[1, 2, 1, 1], num_heads=[1, 1, 2, 2], image_size=64, window_size=2)
SAM = dict(
    **PLAIN, window_size=2, global_attn_indexes=[1], num_pos_feats=16, output_channels=16
)  # fmt: skip
KINDS = {
    "dinov2": PLAIN,
    "dinov2_with_registers": {**PLAIN, "num_register_tokens": 2},
    "dinov3_vit": {**PLAIN, "num_register_tokens": 2},
    "siglip2_vision_model": {**SIZES, "patch_size": 14, "num_patches": 9},
    "aimv2_vision_model": {**PLAIN, "is_native": True},
    "mlcd_vision_model": PLAIN,
    "internvl_vision": {**PLAIN, "image_size": [42, 42], "patch_size": [14, 14]},
    "radio": dict(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=42, patch_size=14, max_img_size=84
    ),
    "convnext": {**STAGES, "image_size": 64},
    "convnextv2": {**STAGES, "image_size": 64},
    "dinov3_convnext": {**STAGES, "image_size": 64},
    "vit": PLAIN,
    "vit_mae": PLAIN,
    "vit_msn": PLAIN,
    "deit": PLAIN,
    "metaclip_2_vision_model": PLAIN,
    "altclip_vision_model": PLAIN,
    "chinese_clip_vision_model": PLAIN,
    "blip_vision_model": PLAIN,
    "blip_2_vision_model": PLAIN,
    "ijepa": PLAIN,
    "beit": {**PLAIN, "use_relative_position_bias": True},
    "data2vec-vision": {**PLAIN, "use_relative_position_bias": True},
    "pixio": {**PLAIN, "n_cls_tokens": 4},
    "tipsv2_vision_model": PLAIN,
    "sam_vision_model": SAM,
    "sam_hq_vision_model": SAM,
    "vjepa2": dict(
        **SIZES,
        crop_size=42,
        patch_size=14,
        mlp_ratio=2.0,
        pred_hidden_size=16,
        pred_num_hidden_layers=1,
        pred_num_attention_heads=2,
    ),
    "swin": WINDOWS,
    "swinv2": WINDOWS,
    "hiera": dict(embed_dim=8, depths=[1, 1, 2, 1], num_heads=[1, 1, 2, 2], image_size=[64, 64]),
    "resnet": {**STAGES, "embedding_size": 8, "layer_type": "basic"},
    "regnet": {**STAGES, "embedding_size": 8, "groups_width": 8},
    "segformer": {**STAGES, "num_attention_heads": [1, 1, 2, 2]},
    "pvt_v2": {**STAGES, "num_attention_heads": [1, 1, 2, 2], "image_size": 64},
    "cvt": dict(embed_dim=[8, 16, 24], depths=[1, 1, 2], num_heads=[1, 1, 2]),
}
# the same encoders under their larger models' names
WHOLE = {
    *("siglip2", "aimv2", "metaclip_2", "internvl", "mlcd", "altclip", "chinese_clip", "blip", "blip-2"),
    *("tipsv2", "sam", "sam_hq"),
}
# tokens before the patches
PREFIX = {
    **{"dinov2_with_registers": 3, "dinov3_vit": 3, "deit": 2, "pixio": 4, "tipsv2_vision_model": 2},
    **dict.fromkeys(("siglip2_vision_model", "aimv2_vision_model", "ijepa", "vjepa2"), 0),
    **dict.fromkeys(("sam_vision_model", "sam_hq_vision_model"), 0),
}
MAPS = ("convnext", "convnextv2", "dinov3_convnext", "swin", "swinv2", "hiera", "resnet", "regnet", "segformer")
MAPS += ("pvt_v2", "cvt")
FIXED = ("hiera", "sam_vision_model", "sam_hq_vision_model", "vjepa2")  # of one size
NO_SIZE = ("resnet", "regnet", "segformer", "cvt")  # whose config says none, so that its own is large


def names(kind):
    """(config class, model class) of transformers."""
    import transformers

    return [getattr(transformers, FACTS[kind].name + end) for end in ("Config", "Model")]


def stock(kind, **changes):
    """A random model in which every weight counts."""
    config, model = names(kind)
    torch.manual_seed(1)
    made = model(config(**{**KINDS[kind], **changes})).eval()
    for parameter in made.parameters():  # also those that start at zero, such as positions and layer scales
        torch.nn.init.normal_(parameter, std=0.1)
        if parameter.ndim == 4:  # a convolution: enough for the pixels to come through many of them
            torch.nn.init.kaiming_normal_(parameter)
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.weight, mean=1.0, std=0.1)
            torch.nn.init.normal_(module.running_mean, std=0.1)
    return made


def side_of(kind):
    """A side in pixels for tests: the encoder's own, where that is small."""
    return 64 if kind in MAPS else 42


def build(folder, kind=None, **values):
    if kind in NO_SIZE:
        values.setdefault("image_size", 64)
    return build_vision_tower({"mm_vision_tower": str(folder), "mm_vision_select_layer": -2, **values}).eval()


def naflex(images, patch=14):
    """Arguments of Siglip2's forward."""
    b, _, height, width = images.shape
    h, w = height // patch, width // patch
    patches = [
        image[:, patch * y : patch * (y + 1), patch * x : patch * (x + 1)].permute(1, 2, 0).reshape(-1)
        for image in images
        for y in range(h)
        for x in range(w)
    ]
    return dict(
        pixel_values=torch.stack(patches).view(b, h * w, -1),
        pixel_attention_mask=torch.ones(b, h * w, dtype=torch.long),
        spatial_shapes=torch.tensor([[h, w]] * b),
    )


def own_states(kind, folder, images):
    """Hidden states as the stock model gives them, with no code of the tower."""
    model = names(kind)[1].from_pretrained(folder).eval()
    b, _, height, width = images.shape
    given = naflex(images) if kind == "siglip2_vision_model" else {"pixel_values": images}
    if kind == "vjepa2":
        given = {"pixel_values_videos": torch.stack([images, images], dim=1)}
    if FACTS[kind].interpolates == "asked":
        given["interpolate_pos_encoding"] = True
    if kind == "vit_mae":
        model.config.mask_ratio = 0.0
        given["noise"] = torch.arange(height * width // 196.0).expand(b, -1)
    stages = []
    if kind in ("swin", "swinv2"):  # what its last block hands on, before the patches of four are merged
        for stage in model.encoder.layers:
            stage.blocks[-1].register_forward_hook(lambda _, __, found: stages.append(found[0]))
    with torch.no_grad():
        found = model(**given, output_hidden_states=True)
    if stages:
        sides = [(height // 4 // 2**i, width // 4 // 2**i) for i in range(4)]
        return [None, *(s.unflatten(1, grid).permute(0, 3, 1, 2) for s, grid in zip(stages, sides, strict=True))]
    if kind == "hiera":
        return [state.permute(0, 3, 1, 2) for state in found.reshaped_hidden_states]
    if kind.startswith("sam"):
        return [state.reshape(b, -1, state.shape[-1]) for state in found.hidden_states]
    return found.hidden_states


def expected_tokens(kind, states, config, layer=-1):
    """[B, N, D] of the patches of a hidden state, row by row; of feature maps the last stage's."""
    if kind in MAPS:
        state = states[-1]
        return torch.stack([state[:, :, y, x] for y in range(state.shape[2]) for x in range(state.shape[3])], dim=1)
    return states[layer][:, prefix(kind, config) :]


def prefix(kind, config):
    return config.num_cls_tokens + config.num_registers if kind == "radio" else PREFIX.get(kind, 1)
