"""A training step four ways, in one process, on the same weights and samples: samples/s, peak memory, losses.

LLaVA-NeXT's way (padded, crops one by one, a loop that merges, all logits), stock transformers' LlavaNext (padded),
this project unpacked, and packed.
"""

import argparse
import gc
import statistics
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from gpu_suite import finish_report, prepare_torch, start_report  # noqa: E402

from llava.errors import report_errors  # noqa: E402

# the "26M": Qwen2-shaped with a vocabulary of 32,768, and a CLIP that gives 576 tokens for 336 px
SIZES = {
    "26m": {
        "llm": {"vocab_size": 32768, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}
        | {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False},
        "tower": {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 3}
        | {"image_size": 336, "patch_size": 14},
    },
    "tiny": {
        "llm": {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        | {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False},
        "tower": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
        | {"image_size": 56, "patch_size": 14},
    },
}
AIMS = {"packed/unpacked": 1.4, "packed/llava_next": 3.1, "packed/stock": 2.0}
EFFICIENCY_AIM = 0.95  # tokens over places of `pack_scope: buffer`
MEMORY_AIM = 0.30  # of LLaVA-NeXT's way


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="train_step.py", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--size", choices=SIZES, default="26m", help="of the model")
    parser.add_argument("--batch", type=int, default=4, help="samples of a step")
    parser.add_argument("--steps", type=int, default=6, help="timed steps, each with samples of its own")
    parser.add_argument("--ways", nargs="+", choices=("llava_next", "stock", "unpacked", "packed"), help="some of them")
    parser.add_argument("--repeats", type=int, default=2, help="how often the steps are timed, the ways in turn")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "train_step.json")
    return parser


def make_ways(model, names) -> dict:
    from gpu_checks import train_ways

    make = {
        "llava_next": lambda: train_ways.LlavaNext(model),
        "stock": lambda: train_ways.Stock(model),
        "unpacked": lambda: train_ways.Project(model, pack=False),
        "packed": lambda: train_ways.Project(model, pack=True),
    }
    return {name: make[name]() for name in make if names is None or name in names}


class Stepper:
    """Steps of one way from the same weights, with AdamW and gradient checkpointing of the language model."""

    def __init__(self, way):
        import torch

        self.way, self.model = way, way.model
        self.start = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.torch = torch
        self.reset()

    def reset(self) -> None:
        self.model.load_state_dict(self.start)
        self.optimizer = self.torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def step(self, samples: list[dict]) -> float:
        loss = self.way.loss(samples)
        loss.backward()
        self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def measure(ways: dict, batches: list[list[dict]], largest: int, repeats: int, device: str) -> dict:
    """Each way's peak memory in the largest step, before the heap has the gaps that timed steps leave; then its seconds
    a step and losses, the ways taking turns."""
    from llava.train.peak_memory import PeakMemory, given_back

    found = {name: {"seconds": [], "peak_memory_mb": 0.0, "losses": []} for name in ways}
    for name, way in ways.items():  # this also warms up
        stepper = Stepper(way)
        with given_back(), PeakMemory(device) as peak:
            stepper.step(batches[largest])
        found[name]["peak_memory_mb"] = round((peak.gib or 0) * 1024, 1)
        stepper.reset()
        del stepper
        gc.collect()
    for _ in range(repeats):
        for name, way in ways.items():
            stepper, entry = Stepper(way), found[name]
            entry["losses"] = []
            for batch in batches:
                start = time.perf_counter()
                entry["losses"].append(round(stepper.step(batch), 6))
                entry["seconds"].append(time.perf_counter() - start)
            stepper.reset()
            del stepper
            gc.collect()
    return found


def report_of(found: dict, steps: int, batch: int, repeats: int) -> dict:
    ways = {}
    for name, entry in found.items():
        # the samples of each step differ: a step's median over the repeats, then all steps together
        seconds = sum(statistics.median(entry["seconds"][step::steps]) for step in range(steps))
        ways[name] = {
            "samples_per_s": round(steps * batch / seconds, 4),
            "seconds_per_step": round(seconds / steps, 4),
            "peak_memory_mb": entry["peak_memory_mb"],
            "losses": entry["losses"],
        }
    ratios = {
        f"packed/{name}": round(ways["packed"]["samples_per_s"] / way["samples_per_s"], 3)
        for name, way in ways.items()
        if "packed" in ways and name != "packed"
    }
    if {"packed", "llava_next"} <= ways.keys():
        ratios["memory packed/llava_next"] = round(
            ways["packed"]["peak_memory_mb"] / max(ways["llava_next"]["peak_memory_mb"], 1e-9), 3
        )
    return {"schema": 1, "ways": ways, "ratios": ratios, "repeats": repeats}


@report_errors
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    device = prepare_torch(args.device)
    import torch
    from gpu_checks import models, train_ways

    report = start_report(args, device)
    size = SIZES[args.size]
    config = models.make_config(
        "demo", "demo", image_size=size["tower"]["image_size"], **size["llm"], **tower_changes(size["tower"])
    )
    model = models.make_model(config, device, torch.float32).train()
    model.requires_grad_(True)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    mixture = train_ways.read_mixture(size["tower"]["image_size"] / 336)[: args.steps * args.batch]
    samples = train_ways.make_samples(mixture, config.vocab_size - 1)
    batches = [samples[at : at + args.batch] for at in range(0, len(samples), args.batch)]
    lengths = [merged_length(model, sample) for sample in mixture]
    rows = [lengths[at : at + args.batch] for at in range(0, len(lengths), args.batch)]
    slots = sum(max(row) * len(row) for row in rows)
    report["shapes"] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "samples": len(samples),
        "tokens": sum(lengths),
        "padded_slots": slots,
        "padding_share": round(1 - sum(lengths) / slots, 4),
        "step_tokens": [sum(row) for row in rows],
    }
    drawn = train_ways.make_mixture(train_ways.SEED, 4000)
    report["buffer"] = buffer_efficiency([merged_length(model, sample) for sample in drawn])
    print(f"     {report['shapes']}", flush=True)
    print(f"     buffer: {report['buffer']} (aim {EFFICIENCY_AIM})", flush=True)
    largest = max(range(len(rows)), key=lambda step: sum(rows[step]))
    found = measure(make_ways(model, args.ways), batches, largest, args.repeats, device)
    report |= report_of(found, len(batches), args.batch, args.repeats)
    report["host"] = report["hardware"]
    for name, way in report["ways"].items():
        print(
            f"{name:10} {way['samples_per_s']:8.3f} samples/s  {way['seconds_per_step']:8.3f} s a step  "
            f"{way['peak_memory_mb']:8.0f} MB  losses {way['losses'][:3]}"
        )
    for name, ratio in report["ratios"].items():
        aim = AIMS.get(name, MEMORY_AIM if name.startswith("memory") else None)
        print(f"{name}: {ratio}" + (f" (aim {aim})" if aim else ""))
    wrong = differing(report["ways"])
    return finish_report(report, args.output, not wrong, wrong)


def tower_changes(tower: dict) -> dict:
    from transformers import CLIPVisionConfig

    side = tower["image_size"]
    grid = [[side * w, side * h] for w, h in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
    return {"mm_vision_config": CLIPVisionConfig(**tower).to_dict(), "image_grid_pinpoints": grid}


def merged_length(model, sample: dict) -> int:
    """Tokens of a sample of the mixture: its text, and its pictures by their sizes."""
    from llava.images.processing import pixel_shape
    from llava.model.visual_merge import pixel_options

    processor, count = model.get_vision_tower().image_processor, model.visual_token_counter()
    sizes = [tuple(size) for size in sample["images"]]
    shapes = [pixel_shape(size, processor, pixel_options(model.config), len(sizes)) for size in sizes]
    visual = sum(count(shape, size, "image") for shape, size in zip(shapes, sizes, strict=True))
    return sample["prompt"] + sample["answer"] + visual


def buffer_efficiency(lengths: list[int]) -> dict:
    """How full `pack_scope: buffer` makes its rows."""
    from llava.data.packing import plan

    length = 8192
    rows = [row for rank in plan(lengths, length, world=8, seed=0, buffer=1024) for row in rank]
    filled = round(sum(lengths) / (len(rows) * length), 4)
    return {"samples": len(lengths), "pack_length": length, "pack_buffer": 1024, "ranks": 8, "efficiency": filled}


def differing(ways: dict) -> str:
    """What is wrong where ways that must have the same losses have not; "" where all is well."""
    same = [name for name in ("llava_next", "unpacked", "packed") if name in ways]
    for name in same[1:]:
        pairs = zip(ways[name]["losses"], ways[same[0]]["losses"], strict=True)
        worst = max(abs(a - b) for a, b in pairs)
        if worst > 2e-4:
            return f"losses of {name} and {same[0]} differ by {worst:.1e}, expected at most 2e-4"
    return ""


if __name__ == "__main__":
    sys.exit(main())
