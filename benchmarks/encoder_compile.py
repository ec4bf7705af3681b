"""Time of the HEVC-ViT encoders as one compiled graph against the same ones run eagerly, padded and packed.

Both run in one process with the same weights and take turns; outputs and gradients are compared first. Writes one JSON.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
for folder in (HERE, ROOT):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

# least and most pixels of a side
PRESETS = {"demo": (56, 224), "vit-l": (224, 672)}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="encoder_compile.py", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: cuda if there is one")
    parser.add_argument("--preset", choices=PRESETS, help="encoder (default: vit-l in bf16 on CUDA, else demo)")
    parser.add_argument("--layers", type=int, help="fewer layers of it")
    parser.add_argument("--images", type=int, default=16, help="images of the largest batch, 4 or more")
    parser.add_argument(
        "--sizes", type=int, nargs=2, metavar=("MIN", "MAX"), help="pixels of a side (demo 56 224, vit-l 224 672)"
    )
    parser.add_argument("--backend", default="inductor", help="of torch.compile; inductor on a CPU needs g++")
    parser.add_argument("--repeats", type=int, default=12, help="timed calls of each side")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "encoder_compile.json", help="JSON to write")
    return parser


def measure(args: argparse.Namespace, device: str) -> dict:
    """{"shapes", "differences", "graphs", "equal", "figures": {kind: {mode: {side: ...}}}}; prints as it goes."""
    import torch
    from gpu_checks import compiled

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    changes = {"num_hidden_layers": args.layers} if args.layers else {}
    report = {"shapes": {}, "differences": {}, "graphs": {}, "figures": {}, "equal": True}
    for kind in compiled.KINDS:
        model = compiled.make_encoder(kind, args.preset, device, dtype, **changes)
        batches = compiled.make_inputs(kind, model, args.images, tuple(args.sizes), seed=0)
        patch = model.config.num_channels * model.config.patch_size**2
        tokens = [next(iter(batch.values())).numel() // patch for batch in batches]
        layers = f"{model.config.num_hidden_layers} layers"
        report["shapes"][kind] = (
            f"{args.preset}, {layers}, {dtype}, three batches of {', '.join(map(str, tokens))} tokens"
        )
        print(f"{kind}: {report['shapes'][kind]}", flush=True)
        graph, found = compiled.compare(model, args.backend, batches)
        graphs = report["graphs"][kind] = found.pop("graphs")
        report["differences"][kind] = found
        told = ", ".join(f"{name} {value:.1e} (limit {limit:.0e})" for name, (value, limit) in found.items())
        print(f"  relative differences: {told}; {graphs} graph(s)", flush=True)
        report["equal"] &= graphs == 1 and all(value <= limit for value, limit in found.values())
        report["figures"][kind] = {}
        for mode, backward in (("forward", False), ("forward_backward", True)):
            timed = compiled.time_both(model, graph, batches, device, backward, args.repeats)
            report["figures"][kind][mode] = timed
            span = {name: f"{x['ms']:,.1f} ({x['ms_min']:,.1f}-{x['ms_max']:,.1f})" for name, x in timed.items()}
            print(
                f"  {mode:17} eager {span['eager']} ms, compiled {span['compiled']} ms, "
                f"faster by {timed['compiled']['faster_by']:.2f}",
                flush=True,
            )
    return report


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    import gpu_suite

    device = gpu_suite.prepare_torch(args.device)
    args.preset = args.preset or ("vit-l" if device == "cuda" else "demo")
    args.sizes = tuple(args.sizes or PRESETS[args.preset])
    if args.images < 4 or args.repeats < 1 or not 0 < args.sizes[0] <= args.sizes[1]:
        raise SystemExit(
            f"error: --images {args.images} --repeats {args.repeats} --sizes {args.sizes[0]} {args.sizes[1]}: expected "
            "4 images, one repeat, and sizes from small to large"
        )
    report = gpu_suite.start_report(args, device)
    report |= measure(args, device)
    return gpu_suite.finish_report(report, args.output, report["equal"], "graph and eager outputs differ")


if __name__ == "__main__":
    sys.exit(main())
