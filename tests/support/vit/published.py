"""Published facts of the HEVC-ViT encoders, written down: what configs and code are held against. Imports nothing."""

COMMON = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 448,
    "patch_size": 16,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "layer_norm_type": "layer_norm",
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "rope_theta": 10000.0,
    "use_head": True,
    "head_norm_eps": None,  # not published: as layer_norm_eps
}
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
DEFAULTS = {
    "llava_vit": COMMON,
    "llava_vit_packing": COMMON | {"temporal_patch_size": 1, "spatial_merge_size": 1},
    "onevision_encoder": COMMON | LARGE | {"patch_size": 14, "rope_temporal_size": 64},
}
SIZES = {  # patch, width, heads, layers, MLP width
    "hf_llava_vit_small_ln": [(16, 384, 6, 6, 1536)],
    "hf_llava_vit_base_ln": [(16, 768, 12, 12, 3072)],
    "hf_llava_vit_large_ln": [(14, 1024, 16, 24, 4096)],
    "hf_llava_vit_huge_ln": [(14, 1536, 16, 27, 4608), (14, 1280, 20, 32, 5120)],
    "hf_llava_vit_giant_ln": [(14, 1536, 16, 40, 6144)],
}
SIZE_KEYS = ("patch_size", "hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")
CONSTANTS = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "eps of source norms": 1e-5,
    "eps of the source head": 2.0**-23,  # torch's for an RMSNorm with eps None, in float32
}
GOLDEN_SHA256 = {
    "llava_vit_tiny/model.safetensors": "9c18d3585d117c77d723c1c22096fe60442debb72eab11719504dd23bc62d47b",
    "llava_vit_tiny/io.safetensors": "a4e07452f08750c02fd2d838d376a9bea78006300b8e4c9d1480ffa292a574d2",
    "llava_vit_packing_tiny/model.safetensors": "c002a89cb0937f357c153482ec95a10d344c1923797f4665387e5c59a97ac3c1",
    "llava_vit_packing_tiny/io.safetensors": "a50d899425fe0f7536c65f97224e19b6827d2456aa49aea9d5d1c8b484219937",
    "onevision_encoder_tiny/model.safetensors": "f365c349e029a0b00542f4c466ce42a518ce739f1044c829fb1e6c245f62d3a4",
    "onevision_encoder_tiny/io.safetensors": "9010fbbb97ad71e092883346a63cace3926c11824b3e0338e7a26543e6dd9a06",
}
GOLDEN_FOLDERS = {
    "llava_vit": "llava_vit_tiny",
    "llava_vit_packing": "llava_vit_packing_tiny",
    "onevision_encoder": "onevision_encoder_tiny",
}
# Configs for random weights. Every value that forward uses is another than the default in one of them, so that none can
# be written into the code unseen.
PROBES = {
    "default eps": {
        **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
        "patch_size": 8,
    },
    "every value another": {
        **{"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"num_channels": 2, "patch_size": 8, "rope_theta": 300.0, "layer_norm_eps": 3e-6, "head_norm_eps": 2e-5},
    },
    "RMSNorm, no head": {
        **{"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 3},
        **{"patch_size": 8, "layer_norm_type": "rms_norm", "use_head": False},
    },
}
# a value other than the default for every key that all three types have
NO_DEFAULTS = {
    **{"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 3},
    **{"num_channels": 2, "image_size": 32, "patch_size": 8, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 3e-6},
    **{"layer_norm_type": "rms_norm", "attention_dropout": 0.25, "initializer_range": 0.01, "rope_theta": 300.0},
    **{"use_head": False, "head_norm_eps": 2e-5},
}
