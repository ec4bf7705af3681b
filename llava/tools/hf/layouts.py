"""Which model of transformers a LLaVA model is, and the names of its weights on both sides."""

import re
from dataclasses import dataclass

from llava.errors import LlavaError

AUTO = (
    "transformers has no class for it; it loads with AutoModelForCausalLM where this package is installed "
    "(from llava.model import *)"
)


@dataclass(frozen=True)
class Format:
    """One of transformers' LLaVA models; its classes' names begin with `stem`."""

    model_type: str
    stem: str

    def load(self, kind: str):
        """A class of it: "Config", "ForConditionalGeneration", "Processor", "ImageProcessorPil"."""
        import transformers

        return getattr(transformers, self.stem + kind)

    @property
    def model_class(self) -> str:
        return f"{self.stem}ForConditionalGeneration"


FORMATS = {
    "llava": Format("llava", "Llava"),
    "llava_next": Format("llava_next", "LlavaNext"),
    "llava_onevision": Format("llava_onevision", "LlavaOnevision"),
}


def _kind_of(tower) -> str:
    return type(tower).__name__.removesuffix("Tower").removesuffix("Vision")


def choose_format(path: str, config, tower) -> Format:
    """The transformers model that computes what a LLaVA model does.

    Args:
        path: of the checkpoint, for the message.
        config: its config.
        tower: its vision tower, built without weights.

    Raises:
        LlavaError: there is none; says which part it lacks.
    """
    from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
    from llava.model.multimodal_encoder.siglip_encoder import SigLipVisionTower
    from llava.model.visual_merge import MergeRules

    rules = MergeRules.from_config(config)
    aspect, merge = rules.image_aspect_ratio, rules.mm_patch_merge_type
    projector = getattr(config, "mm_projector_type", None) or "linear"
    reason, cap = None, getattr(config, "final_logit_softcapping", None)
    if cap is not None:
        reason = f"final_logit_softcapping {cap}, which transformers' LLaVA models leave out"
    elif tower is None:
        reason = "no vision tower"
    elif tower.token_compressor is not None:
        reason = "token compression (ToConv)"
    elif type(tower) not in (CLIPVisionTower, SigLipVisionTower):
        reason = f"vision tower of the kind {_kind_of(tower)}, not CLIP or SigLIP"
    elif tower.select_feature.startswith("slice"):
        reason = f"mm_vision_select_feature {tower.select_feature}"
    elif projector != "mlp2x_gelu":
        reason = f"mm_projector_type {projector}, not mlp2x_gelu"
    elif getattr(config, "mm_use_im_start_end", False):
        reason = "mm_use_im_start_end"
    elif "anyres" in aspect and merge == "spatial_unpad" and "cls_patch" not in tower.select_feature:
        return FORMATS["llava_next" if rules.max_crops is None else "llava_onevision"]
    elif aspect in ("pad", "square") and merge == "flat":
        return FORMATS["llava"]
    else:
        reason = f"image_aspect_ratio {aspect} with mm_patch_merge_type {merge}"
        if "cls_patch" in tower.select_feature:
            reason += f" and mm_vision_select_feature {tower.select_feature}"
    raise LlavaError(f"{path}: {reason}: {AUTO}")


# --- names of weights -------------------------------------------------------------------------------------------------

# LLaVA -> the names of the checkpoints on the hub, which every version of transformers and the servers read
_TO_HF = (
    (r"model\.vision_tower\.vision_tower\.(?:vision_model\.)?", "vision_tower.vision_model."),
    (r"model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
    (r"model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"model\.image_newline$", "image_newline"),
    (r"lm_head\.", "language_model.lm_head."),
    (r"model\.", "language_model.model."),
)
# those names, or transformers 5's own without their leading `model.` -> LLaVA
_TO_LLAVA = (
    (r"vision_tower\.(?:vision_model\.)?", "model.vision_tower.vision_tower.vision_model."),
    (r"multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
    (r"multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
    (r"image_newline$", "model.image_newline"),
    (r"(?:language_model\.)?lm_head\.", "lm_head."),
    (r"language_model\.(?:model\.)?", "model."),
)


def _renamed(name: str, rules) -> str | None:
    for pattern, replacement in rules:
        if match := re.match(pattern, name):
            return replacement + name[match.end() :]
    return None


def hf_name(name: str) -> str | None:
    """Name in transformers' folders of a weight with a LLaVA name; None: no part of such a model."""
    return _renamed(name, _TO_HF)


def llava_name(name: str) -> str | None:
    """LLaVA's name of a weight of a transformers folder, old or new; None: no part of a LLaVA model."""
    return _renamed(name.removeprefix("model."), _TO_LLAVA)


def is_buffer(name: str) -> bool:
    """Whether an old checkpoint's tensor is recomputed from the config nowadays."""
    return name.endswith(("rotary_emb.inv_freq", "embeddings.position_ids"))


TOWER = "model.vision_tower.vision_tower.vision_model."
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
