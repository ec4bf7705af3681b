"""What it costs to watch a run's numbers (`llava.train.number_watch`): the same run, with and without by turns.

A training run of this project takes its steps in blocks, every second one without the watch. Writes one JSON. Under
torchrun all processes take part.
"""

import argparse
import statistics
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

WATCHED = ("batch", "backward", "gradient", "on_step_begin", "on_step_end")
WARMUP = 2  # blocks


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="number_watch.py", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: cuda if there is one")
    parser.add_argument("--pairs", type=int, default=20, help="blocks of each side")
    parser.add_argument("--block", type=int, default=5, help="steps of a block")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: this process's time, where others use the machine",
    )
    parser.add_argument("--demo", type=Path, default=ROOT / "playground" / "demo", help="folder of the demo's data")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "number_watch.json", help="JSON to write")
    parser.add_argument(
        "words", nargs=argparse.REMAINDER, help="after --: a run's command line; else the demo's second stage"
    )
    return parser


class Turns:
    """Takes the watch out of every second block of steps, and keeps the seconds of each step's block.

    Attributes:
        seconds: of a step, with the watch and without.
        inside: seconds of all steps in the watch's own code; what it waits for the device, too.
    """

    def __init__(self, block: int, device: str, clock: str):
        self.block, self.device, self.watched, self.steps = block, device, True, 0
        self.now = time.process_time if clock == "cpu" else time.perf_counter
        self.seconds: dict[bool, list[float]] = {True: [], False: []}
        self._begun, self.inside, self.watched_steps = None, 0.0, 0

    def install(self) -> None:
        from llava.train.number_watch import NumberWatch

        for name in WATCHED:
            setattr(NumberWatch, name, self._by_turns(name, getattr(NumberWatch, name)))

    def _by_turns(self, name, method):
        def call(watch, *args, **kwargs):
            if name == "on_step_begin":
                self._step()
            if not self.watched:
                return watch._backward(*args, **kwargs) if name == "backward" else None
            begun, backward, elsewhere = self.now(), watch._backward, []
            watch._backward = self._timed(backward, elsewhere)
            try:
                return method(watch, *args, **kwargs)
            finally:
                watch._backward = backward
                if self.steps > (WARMUP + 1) * self.block:
                    self.inside += self.now() - begun - sum(elsewhere)
                    self.watched_steps += name == "on_step_end"

        return call

    def _timed(self, function, seconds: list[float]):
        def call(*args, **kwargs):
            begun = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                seconds.append(self.now() - begun)

        return call

    def _step(self) -> None:
        from gpu_checks.measure import synchronize

        if self.steps % self.block == 0:
            synchronize(self.device)
            now = self.now()
            if self.steps > WARMUP * self.block:
                self.seconds[self.watched].append((now - self._begun) / self.block)
            self.watched, self._begun = not self.watched, now
        self.steps += 1


def demo_run(folder: Path) -> list[str]:
    """The demo's second stage on its random models; what is not there yet is made."""
    from playground import make_demo_data, make_demo_model

    if not (folder / "train.json").is_file():
        make_demo_data.make(folder, 0)
    if not (folder / "clip_tower").is_dir():
        make_demo_model.make(folder, 0)
    paths = {
        "model_name_or_path": "llm",
        "vision_tower": "clip_tower",
        "image_folder": "images",
        "data_path": "train.json",
    }
    words = [word for key, path in paths.items() for word in (f"--{key}", str(folder / path))]
    return [str(ROOT / "configs/train/demo.yaml"), *words, "--mm_tunable_parts", "mm_mlp_adapter,mm_language_model"]


def measure(args: argparse.Namespace, device: str) -> dict:
    """{"shapes", "figures": {"with", "without", "cost": ...}}; prints as it goes."""
    import torch
    from gpu_checks.measure import spread

    from llava.train.arguments import parse_args
    from llava.train.train import run

    turns = Turns(args.block, device, args.clock)
    with tempfile.TemporaryDirectory() as folder:
        words = [word for word in args.words if word != "--"] or demo_run(args.demo)
        steps = (WARMUP + 2 * args.pairs) * args.block + 1
        own = {"output_dir": Path(folder) / "out", "max_steps": steps, "save_strategy": "no", "disable_tqdm": True}
        parsed = parse_args([*words, *(str(word) for key, value in own.items() for word in (f"--{key}", value))])
        turns.install()
        run(*parsed)
    with_, without = turns.seconds[True], turns.seconds[False]
    costs = [(a - b) / b for a, b in zip(with_, without, strict=False)]
    inside = turns.inside / max(turns.watched_steps, 1)
    quarters = statistics.quantiles(costs, n=4) if len(costs) > 1 else costs * 3
    training = parsed[2]
    shapes = {
        "run": " ".join(word for word in words if not word.startswith("/")),
        "batch": [training.per_device_train_batch_size, training.gradient_accumulation_steps, training.world_size],
        "steps of a block": args.block,
        "clock": args.clock,
        "torch": torch.__version__,
    }
    figures = {
        "with": spread(with_),
        "without": spread(without),
        "cost": {"median": round(quarters[1], 5), "quartiles": [round(quarters[0], 5), round(quarters[2], 5)]},
        "inside": {"ms": round(inside * 1000, 3), "share": round(inside / statistics.median(without), 5)},
    }
    print("\n".join(f"{name}: {value}" for name, value in shapes.items()))
    for name in ("without", "with"):
        print(f"{name:8} {figures[name]['ms']:10.2f} ms a step")
    print(f"inside   {inside * 1000:10.2f} ms of a step, {figures['inside']['share']:.2%}: the watch's own code")
    print(f"cost     {quarters[1]:10.2%} a step (middle half {quarters[0]:.2%} to {quarters[2]:.2%}; aim: under 1%)")
    return {"shapes": shapes, "figures": figures, "aims": {"cost of a step": 0.01}}


@report_errors
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    import gpu_suite

    from llava.utils import is_rank0

    device = gpu_suite.prepare_torch(args.device)
    report = gpu_suite.start_report(args, device)
    report |= measure(args, device)
    return gpu_suite.finish_report(report, args.output, True, "") if is_rank0() else 0


if __name__ == "__main__":
    sys.exit(main())
