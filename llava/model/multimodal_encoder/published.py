"""Configs of the towers in LLaVA-NeXT's released checkpoints, which name them by hub id and carry no config of theirs.

With these such a checkpoint, which holds the tower's weights, loads where the hub is out of reach.
"""

_CLIP_L = dict(
    model_type="clip_vision_model",
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    patch_size=14,
)
_SO400M = dict(
    model_type="siglip_vision_model",
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27,
    num_attention_heads=16,
    patch_size=14,
)


def _clip_processor(side: int) -> dict:
    return {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}


# hub id -> (encoder config, image processor config); what is not said is the class's default
PUBLISHED = {
    "openai/clip-vit-large-patch14": (_CLIP_L | {"image_size": 224}, _clip_processor(224)),
    "openai/clip-vit-large-patch14-336": (_CLIP_L | {"image_size": 336}, _clip_processor(336)),
    "google/siglip-so400m-patch14-384": (
        _SO400M | {"image_size": 384},
        {"size": {"height": 384, "width": 384}, "resample": 3},  # bicubic
    ),
}
