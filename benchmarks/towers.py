"""Images per second of the packed HEVC-ViT against the same one called image by image and on a padded batch.

All three run in one process with the same weights; their outputs are compared first. Writes one JSON.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
for folder in (HERE, ROOT):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
from llava.errors import report_errors  # noqa: E402

# images, least and most pixels of a side
PRESETS = {"demo": (64, (56, 448)), "vit-l": (16, (224, 1008))}
LABELS = {"packed": "packed", "one_by_one": "one by one", "padded": "padded, mask"}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="towers.py", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: cuda if there is one")
    parser.add_argument("--preset", choices=PRESETS, help="encoder (default: vit-l in bf16 on CUDA, else demo)")
    parser.add_argument("--images", type=int, help="images of a batch (default: demo 64, vit-l 16)")
    parser.add_argument(
        "--sizes", type=int, nargs=2, metavar=("MIN", "MAX"), help="pixels of a side (demo 56 448, vit-l 224 1008)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each side")
    parser.add_argument("--seed", type=int, default=0, help="of sizes and pixels")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the blocks (not those of the padded side)"
    )
    parser.add_argument("--output", type=Path, default=HERE / "results" / "towers.json", help="JSON to write")
    return parser


def check_options(args: argparse.Namespace, patch: int) -> None:
    least, most = args.sizes
    if args.images < 1 or args.repeats < 1:
        raise SystemExit(f"error: --images {args.images} --repeats {args.repeats}: expected at least 1")
    if not 0 < least <= most or -(-least // patch) > most // patch:
        raise SystemExit(f"error: --sizes {least} {most}: no multiple of the patch, {patch}, from the one to the other")


def measure(args: argparse.Namespace, device: str) -> dict:
    """Compare and time the three sides; prints as it goes.

    Returns:
        {"shapes", "ceilings", "differences", "equal", "figures": {"forward": {side: ...}, "forward_backward": ...}}
    """
    import torch
    from gpu_checks import measure, sides

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    ceilings = measure.ceilings(device, device == "cpu")
    matmul = next(rate for name, rate in ceilings.items() if name.startswith("matmul"))
    model = sides.make_model(args.preset, device, dtype)
    config = model.config
    check_options(args, config.patch_size)
    if args.compile:
        for block in model.encoder.layers:
            block.compile(dynamic=True)
    sizes = sides.draw_sizes(args.images, *args.sizes, config.patch_size, args.seed)
    lengths = [h * w // config.patch_size**2 for h, w in sizes]
    input_sets = [sides.draw_images(sizes, device, dtype, args.seed + 1 + i) for i in range(sides.INPUT_SETS)]
    shapes = {
        "encoder": f"{args.preset}: {config.num_hidden_layers} layers, width {config.hidden_size}, "
        f"{config.num_attention_heads} heads, patch {config.patch_size}, {str(dtype).removeprefix('torch.')}",
        "images": f"{args.images} of {args.sizes[0]} to {args.sizes[1]} px a side, "
        f"{len(set(lengths))} different numbers of tokens, {min(lengths)} to {max(lengths)}",
        "tokens": sum(lengths),
        "tokens_padded": len(lengths) * max(lengths),
    }
    print("\n".join(f"{name}: {value}" for name, value in shapes.items()))
    print(", ".join(f"{name} {value:,.2f}" for name, value in ceilings.items()), flush=True)
    differences = sides.compare(model, input_sets[0])
    for name, (value, limit) in differences.items():
        kind = "largest difference" if dtype == torch.float32 else "relative difference"
        print(f"{LABELS[name]} against packed: {kind} {value:.1e} (limit {limit:.0e})", flush=True)
    flops, found = sides.forward_flops(config, lengths), {}
    for mode, backward in (("forward", False), ("forward_backward", True)):
        timed = sides.time_sides(model, input_sets, device, backward, args.repeats)
        found[mode] = sides.figures(timed, flops * (3 if backward else 1), args.images, matmul)
        print_table(mode, found[mode])
    return {
        "shapes": shapes,
        "ceilings": ceilings,
        "differences": differences,
        "equal": all(value <= limit for value, limit in differences.values()),
        "figures": found,
    }


def print_table(mode: str, found: dict[str, dict]) -> None:
    print(f"\n{mode.replace('_', ' + '):18} ms (least-most)          images/s  TFLOP/s  of matmul  packed x  peak GiB")
    for name, entry in found.items():
        if "out_of_memory" in entry:
            print(f"{LABELS[name]:18} {entry['out_of_memory']}")
            continue
        span = f"{entry['ms']:,.1f} ({entry['ms_min']:,.1f}-{entry['ms_max']:,.1f})"
        share, memory = f"{entry['share_of_matmul_rate']:.0%}", entry["peak_gib"]
        print(
            f"{LABELS[name]:18} {span:24} {entry['images_per_s']:10,.1f} {entry['tflops']:8.3g} {share:>10} "
            f"{entry['packed_is_faster_by']:9.2f} {'-' if memory is None else format(memory, '9.2f')}",
            flush=True,
        )


@report_errors
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    import gpu_suite

    device = gpu_suite.prepare_torch(args.device)
    args.preset = args.preset or ("vit-l" if device == "cuda" else "demo")
    images, sizes = PRESETS[args.preset]
    args.images, args.sizes = args.images if args.images is not None else images, tuple(args.sizes or sizes)
    report = gpu_suite.start_report(args, device)
    report |= measure(args, device)
    return gpu_suite.finish_report(report, args.output, report["equal"], "the sides' outputs differ")


if __name__ == "__main__":
    sys.exit(main())
