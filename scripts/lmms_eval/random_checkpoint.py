"""A checkpoint of the demo's parts with random weights, whose answers differ from question to question.

python scripts/lmms_eval/random_checkpoint.py --output DIR [--anyres]
"""

import argparse
from pathlib import Path
from types import SimpleNamespace

DEMO = Path("playground/demo")
GRID = [[56, 112], [112, 56], [112, 112]]  # for anyres: crops of the demo's towers


def make(output: str, anyres: bool = False) -> None:
    import torch

    from llava.model.builder import load_tokenizer, make_config, read_config
    from llava.model.families import model_classes

    torch.manual_seed(0)
    model_class, config_class = model_classes("LlavaQwenForCausalLM")
    config = make_config(str(DEMO / "llm"), config_class, read_config(str(DEMO / "llm")))
    config.image_aspect_ratio, config.mm_use_im_patch_token = "anyres" if anyres else "pad", False
    config.image_grid_pinpoints = GRID if anyres else None
    config.mm_use_im_start_end = False  # lmms-eval's `llava_vid` reads it
    config.conversation_template = "qwen_1_5"
    config.tie_word_embeddings, config.initializer_range = False, 0.2
    model = model_class(config)
    parts = SimpleNamespace(
        vision_tower=str(DEMO / "clip_tower"),
        mm_vision_select_layer=-2,
        mm_vision_select_feature="patch",
        mm_projector_type="mlp2x_gelu",
        mm_patch_merge_type="spatial_unpad" if anyres else "flat",
    )
    model.get_model().initialize_vision_modules(parts)
    model.save_pretrained(output)
    load_tokenizer(str(DEMO / "llm")).save_pretrained(output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A demo checkpoint with random weights.")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--anyres", action="store_true", help="crops, unpadded, in place of a padded picture")
    args = parser.parse_args()
    make(args.output, args.anyres)
