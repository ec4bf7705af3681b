"""LLaVA models of a few thousand random weights."""

import torch

from llava.model.families import LANGUAGE_MODELS
from tests import tiny

PAD, EOS, VOCAB = 0, 2, 120
FAMILIES = {row.module.removeprefix("llava_"): row for row in LANGUAGE_MODELS.values()}
# so that a window shorter than the rows, and caps that bend what is computed, are in every test of the family
CHANGES = {
    "mistral": {"sliding_window": 8},
    "gemma2": {"sliding_window": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
}
# what a run of LLaVA-NeXT writes into config.json; single tests change single values
VISION = {
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_projector_type": "mlp2x_gelu",
    "mm_patch_merge_type": "spatial_unpad",
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": "(1x1),...,(3x3)",
    "mm_use_im_patch_token": False,
}


def classes(family):
    """(config class, model class) of a key of `FAMILIES`: "llama", "mistral", "qwen", ..."""
    model_class, config_class = FAMILIES[family].load()
    return config_class, model_class


def config(tower, family="qwen", **changes):
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "initializer_range": 0.2,  # large enough for answers that differ
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": EOS,
        "tie_word_embeddings": False,
        "mm_vision_tower": str(tower),
        **VISION,
        **CHANGES.get(family, {}),
    }
    return classes(family)[0](**{**values, **changes})


def model(tower, family="qwen", **changes):
    """A model in eval mode on a tower's folder; the tower has the folder's weights."""
    torch.manual_seed(0)
    built = classes(family)[1](config(tower, family, **changes))
    built.get_vision_tower().load_model()
    return built.eval()


def pixels(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tower(folder, side=42, layers=3, kind="clip"):
    """Folder of a tower with (side / 14)**2 tokens."""
    return tiny.tower(folder, kind=kind, layers=layers, side=side)
