"""Merge a LoRA adapter into its base model, so that what results is a plain checkpoint of its family.

python -m llava.tools.merge_lora --model-path ADAPTER [--model-base BASE] --save-model-path OUT
"""

import argparse
import os

from llava.errors import LlavaError, report_errors
from llava.inference import own_code
from llava.utils import rank0_print


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Merge a LoRA adapter into its base model.")
    parser.add_argument("--model-path", required=True, help="folder of the adapter")
    parser.add_argument("--model-base", help="the model it was trained on (default: as the adapter's config names it)")
    parser.add_argument("--save-model-path", required=True, help="folder to write; must not hold a model yet")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, float16 (default: the base's)")
    own_code.add_options(parser)
    return parser


def stored_dtype(folder: str) -> str:
    """The dtype that a checkpoint's config names; float32 where it names none."""
    from llava.model.builder import read_config

    values = read_config(folder)
    return str(values.get("dtype") or values.get("torch_dtype") or "float32").removeprefix("torch.")


@report_errors
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    out = args.save_model_path
    from llava.model.lora import is_lora, recorded_base

    if not is_lora(args.model_path):
        found = "no adapter_config.json" if os.path.isdir(args.model_path) else "no such folder"
        raise LlavaError(f"{args.model_path}: found {found}, expected the folder of a LoRA adapter")
    if os.path.exists(os.path.join(out, "config.json")):
        raise LlavaError(f"save-model-path {out}: a model lies there, expected a new folder")
    base = args.model_base or recorded_base(args.model_path)

    import torch

    from llava.families import family_of
    from llava.model.builder import pick_dtype
    from llava.model.generation import generation_settings

    dtype = pick_dtype(stored_dtype(base) if args.dtype == "auto" else args.dtype, device_is_cpu=False)
    settings = generation_settings(base)
    loaded = family_of(base).load(
        args.model_path,
        **{"base": args.model_base, "dtype": dtype, "device": "cpu", "generation_config": settings},
        **own_code.overrides(args),
    )
    with torch.no_grad():
        loaded.model.save_pretrained(out)
    loaded.processor.save_pretrained(out)
    rank0_print(f"{args.model_path} merged into {base}: saved to {out}")


if __name__ == "__main__":
    main()
