"""What adaptive patches save in a Qwen2-VL: tokens, time of each phase of a request, memory.

All patches, budget at five alphas, v1 and v2, in one process with one model of random weights, on two photographs and
a page of text, beside what the count of operations allows. Token counts and equal outputs are checked. Writes one JSON
and a chart.
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
for folder in (HERE, ROOT):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
from llava.errors import report_errors  # noqa: E402

DTYPES = ("float32", "bfloat16", "float16")
QUALITY_KEYS = {"selection", "alpha", "exact_match"}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="adaptive_patches.py", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: cuda if there is one")
    parser.add_argument("--preset", help="size (qwen2-vl-7b on CUDA, else mid; small, qwen2-vl-2b)")
    parser.add_argument("--layers", type=int, help="fewer layers of the language model")
    parser.add_argument("--dtype", choices=DTYPES, help="of weights (bfloat16 on CUDA, else float32)")
    parser.add_argument("--images", type=Path, nargs="+", metavar="FILE", help="pictures instead of the three")
    parser.add_argument("--max-pixels", type=int, help="larger pictures are made smaller (default: 28*28*1280)")
    parser.add_argument("--rows", type=int, nargs="+", help="requests in a batch (1 and 8 on CUDA, else 1)")
    parser.add_argument("--repeats", type=int, default=3, help="timed requests of each case")
    parser.add_argument(
        "--process-on", choices=("host", "device"), default="device", help="where patches are selected and pooled"
    )
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: CPU time, where other work runs beside it"
    )
    parser.add_argument(
        "--quality", type=Path, metavar="JSON", help="exact match by selection and alpha, to set beside"
    )
    parser.add_argument("--output", type=Path, default=HERE / "results" / "adaptive_patches.json", help="JSON to write")
    parser.add_argument("--plot", type=Path, help="chart to write (default: beside the JSON, .png)")
    return parser


def check_options(args: argparse.Namespace) -> None:
    for name in ("repeats", "layers", "max_pixels", "rows"):
        value = getattr(args, name)
        if value is not None and min(value if isinstance(value, list) else [value]) < 1:
            raise SystemExit(f"error: --{name.replace('_', '-')} {value}: expected at least 1")
    if args.max_pixels is not None and args.max_pixels < 56 * 56:
        raise SystemExit(f"error: --max-pixels {args.max_pixels}: expected at least {56 * 56}")


def read_quality(path: Path | None) -> list[dict]:
    """Rows {selection, alpha, exact_match, n, ...} of a JSON: a list of them, or what `llava.eval.exact_match` writes.

    That one has them as "selections", with alpha behind the method: "budget:0.7"; without, it is 1.
    """
    if path is None:
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: --quality {path}: {error}") from None
    rows = content.get("rows") if isinstance(content, dict) else content
    if isinstance(content, dict) and "selections" in content:
        parts = [(row, *name.partition(":")[::2]) for name, row in content["selections"].items()]
        rows = [{**row, "selection": name, "alpha": float(alpha or 1)} for row, name, alpha in parts]
    if not isinstance(rows, list) or not all(isinstance(row, dict) and set(row) >= QUALITY_KEYS for row in rows):
        raise SystemExit(f"error: --quality {path}: expected a list of rows with {', '.join(sorted(QUALITY_KEYS))}")
    return rows


def quality_by_case(rows: list[dict], cases) -> dict[str, dict]:
    """{case: its row}; "none" has no selection, alpha does not count for none and v1."""
    from gpu_checks.adaptive_bench import case_name

    found = {}
    for selection, alpha in cases:
        for row in rows:
            same = row["selection"] == selection or (selection is None and row["selection"] == "none")
            if same and (alpha is None or row["alpha"] == alpha):
                found[case_name(selection, alpha)] = row
    return found


def measure(args: argparse.Namespace, device: str) -> dict:
    """{"shapes", "ceilings", "figures": {picture: {case: ...}}, "aims", "verdicts", "passed"}; prints as it goes."""
    import torch
    from gpu_checks import adaptive_bench, qwen2_vl
    from gpu_checks.measure import ceilings

    quality = quality_by_case(read_quality(args.quality), adaptive_bench.CASES)
    dtype = getattr(torch, args.dtype)
    try:
        pictures = qwen2_vl.load_pictures(args.images)
        bench = adaptive_bench.Bench(
            device, args.preset, args.layers, dtype, args.max_pixels, args.clock, args.process_on
        )
    except ValueError as error:  # a size that there is none of, a file that is no picture
        raise SystemExit(f"error: {error}") from None
    shapes, rates = adaptive_bench.shape_text(bench, args.preset), ceilings(device, device == "cpu")
    print(f"{shapes}\n" + ", ".join(f"{name} {value:,.2f}" for name, value in rates.items()), flush=True)
    figures, reached, made = {}, [], []
    for name, picture in pictures.items():
        for rows in args.rows:
            label = name if rows == 1 else f"{name}, {rows} in a batch"
            found = figures[label] = bench.run(picture, rows, args.repeats)
            for case, row in quality.items():
                found[case]["quality"] = row
            print_table(label, picture.size, found)
            reached += [{"picture": label} | aim for aim in adaptive_bench.aims(found, device)]
            made += [(f"{label}, {each[0]}", *each[1:]) for each in adaptive_bench.verdicts(found, dtype)]
    print_aims(reached)
    for label, holds, text in made:
        print(f"{'PASS' if holds else 'FAIL'} {label}: {text}")
    return {
        "shapes": shapes,
        "ceilings": rates,
        "figures": figures,
        "aims": reached,
        "verdicts": [{"label": label, "passed": holds, "text": text} for label, holds, text in made],
        "passed": all(holds for _, holds, _ in made),
    }


def print_table(label: str, size: tuple[int, int], found: dict[str, dict]) -> None:
    text = found["none"]["llm_tokens"] - found["none"]["image_tokens"]["by_hand"]
    print(f"\n{label} ({size[0]}x{size[1]}; {text} text tokens); times in ms, medians")
    print(
        "case        tokens: vision   LLM  processing  selection   vision  prefill        request (least-most)   "
        "faster by: model, with selection, allowed, of it   request  peak GiB  exact match"
    )
    for case, entry in found.items():
        tokens = f"{case:12}{entry['vision_tokens']['by_hand']:14,}{entry['llm_tokens']:6,}"
        if "request" not in entry:
            print(f"{tokens}  {entry['out_of_memory']}")
            continue
        phases = [entry[name]["ms"] for name in ("processing", "selection", "vision", "prefill")]
        request = entry["request"]
        span = f"{request['ms']:,.1f} ({request['ms_min']:,.1f}-{request['ms_max']:,.1f})"
        memory, quality = entry["peak_gib"], entry.get("quality", {}).get("exact_match")
        print(
            tokens
            + "".join(f"{value:{width}.1f}" for value, width in zip(phases, (12, 11, 9, 9), strict=True))
            + f"{span:>28}{entry['model_faster_by']:17.2f}{entry['faster_by']:16.2f}{entry['allowed']:9.2f}"
            f"{entry['of_allowed']:7.0%}{entry['request_faster_by']:10.2f}"
            f"{'-' if memory is None else format(memory, '.3f'):>10}"
            f"{'-' if quality is None else format(quality, '.3f'):>13}"
        )
    print(flush=True)


def print_aims(reached: list[dict]) -> None:
    """A line for each aim, with what each picture came to."""
    by_aim = {}
    for aim in reached:
        by_aim.setdefault((aim["aim"], aim["expected"]), []).append(aim)
    for (name, expected), entries in by_aim.items():
        shown = ", ".join(f"{entry['picture']} {entry['found']:g}" for entry in entries)
        count = sum(entry["reached"] for entry in entries)
        print(f"{name} (aim {expected:g}): {shown}; reached by {count} of {len(entries)}")


def plot(report: dict, path: Path) -> None:
    """A panel for each picture: what the operations allow, measured, whole request; and exact match where given."""
    from gpu_checks.chart import COLOURS, Panel, draw

    panels = []
    for label, found in report["figures"].items():
        cases = [case for case in found if case != "none"]
        names = {
            "allowed by the operations": "allowed",
            "vision + prefill, selection included": "faster_by",
            "whole request": "request_faster_by",
        }
        series = {name: [found[case].get(key) for case in cases] for name, key in names.items()}
        panels.append(Panel(f"{label}: times as fast as with all patches", cases, series, line=1.0))
    quality = {case: entry.get("quality", {}).get("exact_match") for case, entry in found.items()}
    if any(value is not None for value in quality.values()):
        scores = {"exact match": list(quality.values())}
        panels.append(
            Panel("exact match, of another, trained model", list(quality), scores, digits=3, colours=COLOURS[3:])
        )
    machine = report["hardware"].get("gpu") or report["hardware"]["cpu"]
    draw(panels, f"{report['shapes']}; {machine}", path, columns=1 if len(panels) <= 4 else 2)


@report_errors
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    check_options(args)
    import gpu_suite

    if args.clock == "cpu" and args.device == "cuda":
        raise SystemExit("error: --clock cpu: expected wall with --device cuda")
    device = gpu_suite.prepare_torch("cpu" if args.clock == "cpu" else args.device)
    args.preset = args.preset or ("qwen2-vl-7b" if device == "cuda" else "mid")
    args.dtype = args.dtype or ("bfloat16" if device == "cuda" else "float32")
    args.rows = args.rows or ([1, 8] if device == "cuda" else [1])
    args.plot = args.plot or args.output.with_suffix(".png")
    report = gpu_suite.start_report(argparse.Namespace(**vars(args) | {"images": _names(args.images)}), device)
    report |= measure(args, device)
    plot(report, args.plot)
    print(f"chart written to {args.plot}")
    return gpu_suite.finish_report(report, args.output, report["passed"], "a verdict failed")


def _names(paths: list[Path] | None) -> list[str] | None:
    return None if paths is None else [str(path) for path in paths]


if __name__ == "__main__":
    sys.exit(main())
