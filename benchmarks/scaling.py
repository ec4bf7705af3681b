"""What training runs cost on 8 to 1,024 GPUs: time, memory and communication, by a model calibrated by measurements.

    python benchmarks/scaling.py                                        # a table over devices and ZeRO stages
    python benchmarks/scaling.py --llm Qwen/Qwen2-72B-Instruct --tower google/siglip-so400m-patch14-384 --gpu h100-80
    python benchmarks/scaling.py --fits --gpu a100-80 --hours 48        # which of the shipped recipes fit
    python benchmarks/scaling.py --runs RUNS.json --hours 48 --output OUT.json      # which of these training runs do

RUNS.json: [{"name", "argv": [CONFIG.yaml, "--key", "value", ...]}], of training runs.

Nothing runs on a GPU and no weight is read; what is assumed is printed, and kept in the JSON.
"""

import argparse
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
for folder in (HERE, ROOT):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
from llava.errors import LlavaError, report_errors  # noqa: E402

DEVICES = (8, 16, 32, 64, 128, 256, 512, 1024)


def build_parser() -> argparse.ArgumentParser:
    from costs.facts import GPUS, MODELS

    parser = argparse.ArgumentParser(prog="scaling.py", description=__doc__.split("\n")[0])
    parser.add_argument("--gpu", choices=GPUS, default="h100-80", help="kind of device (h100-80)")
    parser.add_argument("--llm", choices=MODELS, default="Qwen/Qwen2-7B-Instruct", help="model, by hub id")
    parser.add_argument("--tower", default="openai/clip-vit-large-patch14-336", help="vision tower, by hub id")
    parser.add_argument("--stages", type=int, nargs="+", choices=(0, 1, 2, 3), default=[2, 3], help="ZeRO (2 3)")
    parser.add_argument("--gpus", type=int, nargs="+", help="numbers of devices (8 to 1024; with --fits and --runs: 8)")
    parser.add_argument("--rows", type=int, default=4, help="samples of a device's micro-batch (4)")
    parser.add_argument(
        "--train", choices=("all", "projector"), default="all", help="what is trained: all parts, or the projector"
    )
    parser.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
    parser.add_argument("--fits", action="store_true", help="which configs of configs/train fit")
    parser.add_argument("--runs", type=Path, metavar="RUNS.json", help="which of these training runs fit")
    parser.add_argument("--hours", type=float, default=48, help="with --fits and --runs: how long one may take (48)")
    parser.add_argument("--output", type=Path, help="JSON to write")
    return parser


def table(args) -> dict:
    """Rows over devices and stages; prints them."""
    from costs.facts import GPUS, MODELS, PICTURE
    from costs.model import Batch, Plan, memory, parameters, step
    from costs.recipes import llava_model, own_vision

    values = dict(MODELS[args.llm].values)
    if "vision_config" in values:
        config, sizes = own_vision(values, 56 * 56, 1280 * 28 * 28)
    else:
        config, sizes = llava_model(values, args.tower, **anyres(args.tower))
    visual, patches = sizes(PICTURE)
    batch = Batch([visual + 300] * args.rows, patches * args.rows, supervised=150 * args.rows)
    parts = frozenset(parameters(config)) if args.train == "all" else frozenset({"mm_mlp_adapter"})
    plan = Plan(GPUS[args.gpu], 8, parts, checkpointing=not args.no_checkpointing)
    print(f"{args.llm}, {args.rows} samples of {batch.tokens[0]:,} tokens a device, {args.train} trained, {args.gpu}")
    print("   GPUs  ZeRO  step s  of it computing  GB sent  samples/s  efficiency  GiB  fits")
    rows = []
    for stage in args.stages:
        for devices in args.gpus or DEVICES:
            one = replace(plan, devices=devices, zero=stage)
            held, took = memory(config, batch, one), step(config, batch, one)
            fits = held["total"] <= limit(one.gpu)
            rows.append({"gpus": devices, "zero": stage, "memory": held, "fits": fits, **took})
            print(
                f"{devices:7,} {stage:5} {took['step_s']:7.2f} {took['computing_s']:16.2f} "
                f"{took['bytes_sent'] / 1e9:8.1f} {took['samples_per_s']:10,.1f} {took['efficiency']:11.2f} "
                f"{held['total'] / 2**30:4.0f}  {'yes' if fits else 'no'}"
            )
    return {"model": args.llm, "tower": args.tower, "parameters": parameters(config), "rows": rows}


def limit(gpu) -> float:
    """Bytes that a run may take of a device."""
    from costs.model import USABLE

    return gpu.memory * 1e9 * USABLE


def anyres(tower: str) -> dict:
    """LLaVA-NeXT's image handling with a tower."""
    from costs.facts import TOWERS

    from llava.model.multimodal_encoder.published import PUBLISHED

    found = TOWERS.get(tower) or PUBLISHED.get(tower)
    if found is None:
        raise SystemExit(f"error: --tower {tower!r}: expected one of {', '.join((*TOWERS, *PUBLISHED))}")
    side = found[0]["image_size"]
    return {
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "spatial_unpad",
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": [[side * w, side * h] for w, h in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))],
    }


def fits(args) -> dict:
    """Which of the shipped recipes, or of the runs that are given, fit on each number of devices; prints them."""
    from costs.facts import GPUS
    from costs.model import USABLE
    from costs.recipes import fit, least_devices

    found, named = [], _named_runs(args)
    for devices in args.gpus or [8]:
        print(f"{devices} x {args.gpu}, {limit(GPUS[args.gpu]) / 2**30:.0f} GiB usable of each, {args.hours:g} hours")
        print("recipe                   GiB    hours  step s  breaks          fits from (GPUs)")
        for name, read in named:
            try:
                recipe = read(GPUS[args.gpu], devices)
            except LlavaError as error:
                found.append({"recipe": name, "gpus": devices, "error": str(error)})
                print(f"{name:22} {error}")
                continue
            one, least = fit(recipe, args.hours, USABLE), least_devices(recipe, args.hours, USABLE)
            found.append({"recipe": name, "gpus": devices, **one, "least_gpus": least})
            print(
                f"{name:22} {one['memory']['total'] / 2**30:5.0f} {one['hours']:8.1f} "
                f"{one['step']['step_s']:7.1f}  {', '.join(one['breaks']) or 'nothing':15} {least or 'never'}"
            )
    return {"hours": args.hours, "recipes": found}


def _named_runs(args) -> list:
    """(name, what reads it for a device and a number of them) of each run to look at."""
    from costs.recipes import read_recipe, read_run

    if args.runs:
        runs = _read_runs(args.runs)
        return [(run["name"], partial(read_run, run["argv"], run["name"])) for run in runs]
    paths = sorted((ROOT / "configs" / "train").glob("*.yaml"))
    paths = [path for path in paths if not path.stem.startswith("demo")]  # those take minutes on a CPU
    return [(path.stem, partial(read_recipe, str(path))) for path in paths]


def _read_runs(path: Path) -> list[dict]:
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))
        fits = all(isinstance(run["name"], str) and isinstance(run["argv"], list) for run in runs)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SystemExit(f"error: --runs {path}: {error!r}, expected a list of runs with name and argv") from None
    if not fits:
        raise SystemExit(f"error: --runs {path}: expected a list of runs with name and argv")
    return runs


def assumptions(args) -> list[str]:
    from costs import facts, model

    said = [*model.ASSUMPTIONS]
    said.append(
        f"every sample has one picture of {facts.PICTURE[0]} x {facts.PICTURE[1]} pixels, and text; memory is that of "
        f"one of {facts.LARGEST[0]} x {facts.LARGEST[1]} with {facts.LONGEST_TEXT:,} tokens"
        if args.fits or args.runs
        else f"every sample has one picture of {facts.PICTURE[0]} x {facts.PICTURE[1]} pixels and 300 tokens of text, "
        "150 of them supervised; the micro-batch of a device stays, so that the global batch grows with them"
    )
    if args.fits or args.runs:
        said += [f"{name}: {data.samples:,} samples, {data.source}" for name, data in facts.DATA.items()]
        said.append("global batches as published (128, 256, 512), by accumulation; adaptive patches keep all of theirs")
    return said


@report_errors
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    for name, values in (("--rows", [args.rows]), ("--gpus", args.gpus or [1]), ("--hours", [args.hours])):
        if min(values) <= 0:
            raise SystemExit(f"error: {name} {min(values):g}: expected a number above 0")
    said = assumptions(args)
    report = fits(args) if args.fits or args.runs else table(args)
    print("\nassumed:", *(f"- {line}" for line in said), sep="\n")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({"schema": 1, "gpu": args.gpu, **report, "assumptions": said}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
