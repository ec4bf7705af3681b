"""Convert HEVC-ViT weights to the padded or the packed model, and prove that the outputs stay the same.

    python -m llava.tools.convert_vit --to packing WEIGHTS.pth OUT --model_name hf_llava_vit_large_ln

IN is a folder of `llava_vit`, `llava_vit_packing` or `onevision_encoder`, or a file of weights in any layout. OUT gets
config.json, model.safetensors (in the dtype of IN) and preprocessor_config.json. Then both are read again and given the
same random images in float32: IN in its own model, or in the plain formulas of `vit.reference` for weights in the
source layout, which has no model here. If an output differs by more than 1e-4 there is no OUT.
"""

import argparse

from llava.errors import report_errors
from llava.tools.folders import new_folder, quiet
from llava.tools.vit.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from llava.tools.vit.outputs import (
    TOLERANCE,
    check_differences,
    describe_inputs,
    differences,
    random_images,
    run_converted,
    run_folder,
    run_reference,
)

TARGETS = {"padded": "padded", "packing": "packed"}  # --to -> layout


def convert(checkpoint: Checkpoint, out: str, layout: str, overwrite=False, image_size=None) -> dict[str, float]:
    """Write `out` and compare it with the checkpoint; returns the largest difference of each output.

    One model is in memory at a time.

    Raises:
        LlavaError: outputs differ by more than `TOLERANCE`, or `out` is there; `out` is then as it was before.
    """
    pixels = random_images(checkpoint.config)
    with new_folder(out, checkpoint.path, overwrite) as folder:
        write_checkpoint(folder, checkpoint, layout, image_size)
        if checkpoint.layout == "source":
            expected = run_reference(checkpoint, pixels)
        else:
            expected = run_converted(checkpoint, checkpoint.layout, pixels)
        measured = differences(run_folder(folder, layout, pixels), expected)
        check_differences(measured, out)
    return measured


def print_differences(measured: dict[str, float], config) -> None:
    print(f"largest differences on {describe_inputs(config)} (limit {TOLERANCE:.0e}):")
    for name, value in measured.items():
        print(f"  {name:<18} {value:.1e}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Convert HEVC-ViT weights, and prove that the outputs stay the same.")
    parser.add_argument("source", metavar="IN", help="folder, .safetensors, or .pth (read without running code)")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("--to", required=True, choices=TARGETS, help="the model to convert to")
    parser.add_argument("--model_name", help="published size, which the weights must have: hf_llava_vit_large_ln, ...")
    parser.add_argument(
        "--config", metavar="CONFIG.json", help="config of the weights (default: the folder's, else by size)"
    )
    parser.add_argument("--image_size", type=int, help="side in pixels to write into the configs")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT, once the new one is proven equal")
    return parser


@report_errors
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    quiet()
    checkpoint = read_checkpoint(args.source, args.model_name, args.config, args.image_size)
    print(f"read     {checkpoint}")
    if frames := getattr(checkpoint.config, "rope_temporal_size", None):
        print(f"note     rope_temporal_size {frames} is left out: places in a clip count in its own frames")
    layout = TARGETS[args.to]
    measured = convert(checkpoint, args.out, layout, args.overwrite, args.image_size)
    print(f"written  {args.out} ({layout} layout)")
    print_differences(measured, checkpoint.config)


if __name__ == "__main__":
    main()
