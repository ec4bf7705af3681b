"""How fast the lengths of records are told from headers and texts (`llava.data.lengths`): first, and from what is kept.

Records are made on the spot: a small picture and two questions with answers, of words of a fixed list. Writes one JSON.
"""

import argparse
import json
import os
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
for folder in (HERE, ROOT):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
from llava.errors import report_errors  # noqa: E402

PICTURES = 300  # that are drawn; each record has a link of its own to one of them, and its header is read again
WORDS = (
    "the",
    "a",
    "cat",
    "sits",
    "on",
    "table",
    "with",
    "red",
    "cup",
    "and",
    "blue",
    "chair",
    "near",
    "what",
    "shown",
)
GRID = "(1x1),...,(6x6)"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lengths.py", description=__doc__.split("\n")[0])
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="numbers of processes to try")
    parser.add_argument("--tokenizer", default=None, help="folder of one; else that of the tests, of 703 tokens")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "lengths.json", help="JSON to write")
    return parser


def make_records(folder: Path, count: int) -> Path:
    """The path of a data file of `count` records of pictures (JPEG, PNG, WebP) of random sizes."""
    from PIL import Image

    generator = random.Random(0)
    names = [f"{at}.{('jpg', 'png', 'webp')[at % 3]}" for at in range(min(PICTURES, count))]
    for name in names:
        size = generator.randint(60, 400), generator.randint(60, 400)
        Image.effect_noise(size, 60).convert("RGB").resize(size).save(folder / name)

    def words(number: int) -> str:
        return " ".join(generator.choices(WORDS, k=number))

    records = []
    for at in range(count):
        texts = [f"<image>\n{words(12)}", words(30), words(10), words(25)]
        turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
        name = generator.choice(names)
        os.link(folder / name, folder / f"record_{at}_{name}")
        records.append({"id": str(at), "image": f"record_{at}_{name}", "conversations": turns})
    path = folder / "records.json"
    path.write_text(json.dumps(records))
    return path


def parts(folder: Path, tokenizer: str | None):
    """(family, loaded, args) of LLaVA with CLIP-L/336 and anyres_max_9, without any weights."""
    from transformers import AutoTokenizer, CLIPImageProcessorPil

    from llava.data.dataset import SampleArgs
    from llava.data.preprocess import Preprocessor
    from llava.families import get_family
    from llava.families.base import Loaded
    from llava.model.multimodal_encoder.base import FixedGrid
    from llava.model.multimodal_projector.builder import ProjectedGrid
    from llava.model.visual_merge import MergeRules, VisualTokenCounter

    words = AutoTokenizer.from_pretrained(tokenizer or ROOT / "tests/golden/llava/tokenizer_qwen")
    processor = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    rules = MergeRules("spatial_unpad", "anyres_max_9", image_grid_pinpoints=GRID)
    count = VisualTokenCounter(rules, ProjectedGrid(FixedGrid(24), "mlp2x_gelu"))
    prepare = Preprocessor(words, "qwen_1_5")
    loaded = Loaded(None, words, words, processor, 4096, "qwen_1_5", count, prepare)
    args = SampleArgs(str(folder), image_aspect_ratio="anyres_max_9", image_grid_pinpoints=GRID)
    return get_family("llava"), loaded, args


def timed(work) -> tuple[float, float, object]:
    """(wall seconds, CPU seconds of this process and of those that it started and that have ended, what `work` gives).

    The second tells what it costs where others use the machine, too.
    """
    begun, cpu = time.perf_counter(), cpu_seconds()
    made = work()
    return time.perf_counter() - begun, cpu_seconds() - cpu, made


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def measure(count: int, processes: list[int], tokenizer: str | None) -> dict:
    """The figures of reading and, by the number of processes, of both ways; prints as it goes."""
    from llava.data.length_cache import places
    from llava.data.lengths import record_lengths
    from llava.data.records import load_records

    def row(name: str, seconds: float, cpu: float) -> dict:
        print(
            f"{name}: {seconds:.1f} s, {count / seconds:,.0f} records/s; {cpu / count * 1e3:.3f} ms of CPU a record; "
            f"1M records by this: {seconds / count * 1e6 / 60:.1f} min",
            flush=True,
        )
        return {"seconds": seconds, "cpu_seconds": cpu, "records_per_s": count / seconds}

    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        path = make_records(Path(folder), count)
        made = parts(Path(folder), tokenizer)
        seconds, cpu, records = timed(lambda: load_records(str(path)))
        figures["read"] = row("reading of the records alone", seconds, cpu)
        for number in processes:
            for place in places(str(path)):
                Path(place).unlink(missing_ok=True)
            found = {}
            for name in ("first", "kept"):
                seconds, cpu, lengths = timed(lambda number=number: record_lengths(records, *made, processes=number))
                found[name] = row(f"{number} process{'es' * (number > 1)}, {name}", seconds, cpu)
                found[name]["tokens"] = int(lengths.tokens.sum())
            figures[f"{number} processes"] = found
    return figures


@report_errors
def main(argv=None) -> int:
    from gpu_checks.measure import hardware

    args = build_parser().parse_args(argv)
    figures = measure(args.records, args.processes, args.tokenizer)
    report = {
        "schema": 1,
        "shapes": {"records": args.records, "pictures": min(PICTURES, args.records), "tokenizer": args.tokenizer},
        "hardware": hardware("cpu"),
        "figures": figures,
        "million": "seconds of one million records are those of these times 1e6 / records: an extrapolation",
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=2))
    print(f"written: {args.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
