"""Why an encoder's config.json names no tower, in one line, from that file alone."""

from llava.errors import LlavaError

from .hf_facts import REMOTE

# types of transformers whose encoder is reached in another way
_PERCEPTION = "its Perception Encoder, which transformers has through timm only, as timm:vit_pe_"
INSTEAD = {
    "timm_wrapper": "the encoder of timm, as timm:NAME",
    "timm_backbone": "the encoder of timm, as timm:NAME",
    "perception_lm": _PERCEPTION + "lang_large_patch14_448",
    "pe_video": _PERCEPTION + "core_large_patch14_336",
    "pe_audio_video": _PERCEPTION + "core_large_patch14_336",
    "gemma3n_vision": "an encoder of timm, as timm:NAME",
    "fast_vlm": "an encoder of timm, as timm:NAME",
    "clipseg": "the CLIP that it was made from (openai/clip-vit-base-patch16)",
    "idefics3": "the SigLIP that it was made from (siglip)",
    "smolvlm": "the SigLIP that it was made from (siglip)",
    "paligemma": "the SigLIP that it was made from (siglip)",
    "gemma3": "the SigLIP that it was made from (siglip)",
    "llava": "the encoder that it was made with (clip)",
    "llava_next": "the encoder that it was made with (clip)",
    "llava_onevision": "the encoder that it was made with (siglip)",
    "dpt": "the ViT that it was made from (vit), or dinov2",
    "depth_anything": "the DINOv2 that it was made from (dinov2)",
    "owlvit": "the CLIP that it was made from (clip)",
    "owlv2": "the CLIP that it was made from (clip)",
    "sam2": "sam, or hiera, which its encoder is one of",
    "sam3": "sam, or dinov3_vit",
    "donut-swin": "swin",
    "maskformer-swin": "swin",
    "vit_hybrid": "vit",
    "vitdet": "vit_mae, which it starts from",
    "videomae": "vjepa2, or vit_mae",
}
# what the tasks say that transformers has a type for: (list of types in transformers, what such a model is)
_TASKS = (
    ("MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES", "a model for detection"),
    ("MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES", "a model for detection"),
    ("MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES", "a model for segmentation"),
    ("MODEL_FOR_MASK_GENERATION_MAPPING_NAMES", "a model for segmentation"),
    ("MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES", "a model for depth"),
    ("MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES", "a model of sound"),
    ("MODEL_FOR_CTC_MAPPING_NAMES", "a model of sound"),
    ("MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES", "a model of video"),
    ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "a whole vision-language model"),
    ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", "an image classifier whose states are no tokens of one layout"),
    ("MODEL_FOR_BACKBONE_MAPPING_NAMES", "an image backbone whose states are no tokens of one layout"),
    ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "a language model"),
    ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", "a language model"),
    ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "a language model"),
    ("MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES", "a language model"),
)
_EXPECTED = (
    "an encoder of pictures (clip, siglip, siglip2, dinov2, dinov3_vit, aimv2, convnext, swin, ...: the types in "
    "llava/model/multimodal_encoder/hf_facts.py) or a class of your own"
)


def no_tower(name: str, values: dict) -> LlavaError:
    """The error for an encoder whose type there is no tower for.

    Args:
        name: folder or hub id of the encoder.
        values: of its config.json.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    kind, remote = values.get("model_type"), values.get("auto_map")
    said = f"vision tower {name!r}: "
    if kind in REMOTE or (remote and kind not in CONFIG_MAPPING_NAMES):
        what = f"model_type {kind!r}" if kind else "no model_type"
        instead = REMOTE.get(kind, f"the same encoder as transformers has it, or {_EXPECTED}")
        return LlavaError(
            f"{said}found {what}, code of its own repository (auto_map), which is not run; expected {instead}"
        )
    if kind is None:
        return LlavaError(f"{said}its config.json has no model_type, expected {_EXPECTED}")
    if kind in INSTEAD:
        return LlavaError(f"{said}found model_type {kind!r}{_nature(kind)}; expected {INSTEAD[kind]}")
    if kind not in CONFIG_MAPPING_NAMES:
        made_with = values.get("transformers_version")
        by = f" (it was saved by transformers {made_with})" if made_with else ""
        return LlavaError(
            f"{said}found model_type {kind!r}, which the installed transformers {transformers.__version__} does not "
            f"know{by}; expected a version that does, mm_vision_tower_type where it is a known type renamed, or "
            f"{_EXPECTED}"
        )
    return LlavaError(f"{said}found model_type {kind!r}{_nature(kind)}; expected {_EXPECTED}")


def _nature(kind: str) -> str:
    """What a type of transformers is, after a comma; nothing where it does not say."""
    from transformers.models.auto import modeling_auto

    if kind.endswith(("_text_model", "_text")):
        return ", a text model"
    found = next((what for names, what in _TASKS if kind in getattr(modeling_auto, names, ())), None)
    return f", {found}" if found else ""
