"""What token compression (ToConv) costs and saves: visual tokens, tower, prefill, training step, memory, parameters.

No compression, 24 -> 12 and 24 -> 8 tokens a side, and the same with 16 -> 12 and 16 -> 8, in one process and with one
language model of random weights. Token counts are checked against the formula. Writes one JSON.
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

LABELS = {
    "tower": "tower, 5 crops",
    "llm_prefill": "LLM prefill",
    "first_token": "first token",
    "train_step": "training step",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="toconv.py", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: cuda if there is one")
    parser.add_argument("--llm", help="size of the LLM (qwen2-7b on CUDA, else demo; small, qwen2-0.5b, qwen2-1.5b)")
    parser.add_argument("--layers", type=int, help="fewer layers of it")
    parser.add_argument("--tower", help="size of the CLIP, at 336 and 224 px (clip-l336 on CUDA, else demo)")
    parser.add_argument(
        "--train", choices=("adapter", "all"), default="adapter", help="projector and compressor, or all parts"
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each case")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "toconv.json", help="JSON to write")
    return parser


def measure(args: argparse.Namespace, device: str) -> dict:
    """{"shapes", "ceilings", "figures": {case: ...}, "verdicts", "passed"}; prints as it goes."""
    from gpu_checks import toconv
    from gpu_checks.measure import ceilings

    try:
        bench = toconv.Bench(device, args.llm, args.tower, args.layers)
    except ValueError as error:  # a size that there is none of
        raise SystemExit(f"error: {error}") from None
    shapes, rates = toconv.shape_text(bench, args.llm, args.tower, args.train), ceilings(device, device == "cpu")
    print(shapes)
    print(", ".join(f"{name} {value:,.2f}" for name, value in rates.items()), flush=True)
    found = bench.run(args.train, args.repeats)
    print_table(found)
    aim = toconv.PREFILL_AIM
    for name in ("llm_prefill", "first_token"):
        faster = found["24 -> 8"][name].get("faster_by")
        print(f"24 -> 8, {LABELS[name]}: faster by {faster} (aim at Qwen2-7B shape on a GPU: {aim:g})")
    verdicts = toconv.verdicts(found)
    for label, holds, text in verdicts:
        print(f"{'PASS' if holds else 'FAIL'} {label}: {text}")
    return {
        "shapes": shapes,
        "ceilings": rates,
        "figures": found,
        "aims": {"24 -> 8, prefill faster by, Qwen2-7B shape on a GPU": aim},
        "verdicts": [{"label": label, "passed": holds, "text": text} for label, holds, text in verdicts],
        "passed": all(holds for _, holds, _ in verdicts),
    }


def print_table(found: dict[str, dict]) -> None:
    print("\ncase           tokens: crop, image   parameters: tower, compressor")
    for case, entry in found.items():
        count, size = entry["tokens"], entry["parameters"]
        print(f"{case:14} {count['per_crop']:12,} {count['per_image']:6,} {size['tower']:19,} {size['compressor']:11,}")
    for name, label in LABELS.items():
        print(f"\n{label:14} ms (least-most)             faster by  peak GiB")
        for case, entry in found.items():
            print(f"{case:14} {_in_words(entry[name])}")
    print(flush=True)


def _in_words(timed: dict) -> str:
    if "out_of_memory" in timed:
        return timed["out_of_memory"]
    span = f"{timed['ms']:,.1f} ({timed['ms_min']:,.1f}-{timed['ms_max']:,.1f})"
    ratio, memory = timed.get("faster_by"), timed["peak_gib"]
    return (
        f"{span:28} {'-' if ratio is None else format(ratio, '.2f'):>9} "
        f"{'-' if memory is None else format(memory, '.3f'):>9}"
    )


@report_errors
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.repeats < 1 or (args.layers is not None and args.layers < 1):
        raise SystemExit(f"error: --repeats {args.repeats} --layers {args.layers}: expected at least 1")
    import gpu_suite

    device = gpu_suite.prepare_torch(args.device)
    args.llm = args.llm or ("qwen2-7b" if device == "cuda" else "demo")
    args.tower = args.tower or ("clip-l336" if device == "cuda" else "demo")
    report = gpu_suite.start_report(args, device)
    report |= measure(args, device)
    return gpu_suite.finish_report(report, args.output, report["passed"], "a verdict failed")


if __name__ == "__main__":
    sys.exit(main())
