"""Requests to a Qwen2-VL with adaptive patches: tokens, operations, time of each phase, and what is gained."""

import contextlib
import functools
import statistics
import time

import numpy as np
import torch

from gpu_checks import qwen2_vl
from gpu_checks.measure import PeakMemory, free_memory, spread, synchronize
from gpu_checks.numerics import relative

# (selection, alpha); the first is what the others are held against
CASES = (
    (None, None),
    ("budget", 1.0),
    ("budget", 0.7),
    ("budget", 0.5),
    ("budget", 0.3),
    ("budget", 0.2),
    ("v1", None),
    ("v2", 1.0),
    ("v2", 0.7),
)
PHASES = ("processing", "selection", "vision", "prefill", "model", "request")
SAME, SAME_BF16 = 1e-5, 2e-2  # alpha 1.0 against none: absolute in float32, relative in bf16
ALLOWED_AIM = 0.85  # of the speed-up that the operations allow, on a GPU at 7B shape, selection included
PUBLISHED = {0.5: 1.3, 0.3: 2.0, 0.2: 2.5}  # budget alpha: the whole request faster by
SELECTION_AIM = 0.03  # of the request, on a CPU


# "cpu": CPU time of this process, which does not grow when other processes want the same cores; of one thread
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def case_name(selection: str | None, alpha: float | None) -> str:
    return "none" if selection is None else selection if alpha is None else f"{selection} {alpha}"


def case_options(selection: str | None, alpha: float | None) -> dict:
    """`images_kwargs` of a call."""
    return {"patch_selection_method": selection} | ({} if alpha is None else {"alpha": alpha})


class Phases:
    """Context: hooks that note when vision encoder and model begin and end; of each the first call counts."""

    def __init__(self, model, device: str, clock):
        self.device, self.clock, self.marks = device, clock, {}
        self.parts = {"vision": model.model.visual, "forward": model}

    def __enter__(self):
        self.hooks = []
        for name, module in self.parts.items():
            begin, end = (functools.partial(self._note, (name, at)) for at in ("begin", "end"))
            self.hooks += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
        return self

    def __exit__(self, *exception):
        for hook in self.hooks:
            hook.remove()

    def _note(self, key, *call):
        if key in self.marks:
            return
        self.marks[key] = self.clock()
        if self.device == "cuda":
            self.marks[key] = torch.cuda.Event(enable_timing=True)
            self.marks[key].record()

    def seconds(self) -> dict[str, float]:
        """{"vision", "prefill"}, once the device has come to the end."""

        def between(first, last):
            a, b = self.marks[first], self.marks[last]
            return a.elapsed_time(b) / 1000 if self.device == "cuda" else b - a

        vision = between(("vision", "begin"), ("vision", "end"))
        whole = between(("forward", "begin"), ("forward", "end"))
        inside = between(("forward", "begin"), ("vision", "begin")) >= 0  # else encoded before the model was called
        return {"vision": vision, "prefill": whole - vision if inside else whole}


SELECTION_STEPS = ("select", "kept_patches", "pooled_patches")  # of llava.model.qwen2_vl.image_processing


@contextlib.contextmanager
def timed_selection(clock, device: str):
    """Notes the seconds that an image processor spends in choosing, gathering and pooling patches."""
    from llava.model.qwen2_vl import image_processing

    seconds, plain = [], {name: getattr(image_processing, name) for name in SELECTION_STEPS}

    def timed(function):
        def call(*args, **options):
            start = clock()
            found = function(*args, **options)
            synchronize(device)
            seconds.append(clock() - start)
            return found

        return call

    for name, function in plain.items():
        setattr(image_processing, name, timed(function))
    try:
        yield seconds
    finally:
        for name, function in plain.items():
            setattr(image_processing, name, function)


class Bench:
    """One Qwen2-VL with random weights, one processor; the cases take turns, so what else runs meets all alike."""

    def __init__(
        self,
        device: str,
        preset: str,
        layers: int | None,
        dtype: torch.dtype,
        most_pixels: int | None = None,
        clock: str = "wall",
        process_on: str = "host",
    ):
        self.device, self.clock = device, CLOCKS[clock]
        self.process_on_device = process_on == "device"
        self.config = qwen2_vl.make_config(preset, layers)
        self.model = qwen2_vl.make_model(self.config, device, dtype)
        self.processor = qwen2_vl.make_processor(most_pixels)

    def inputs(self, picture, case, rows: int = 1, on_device: bool = False):
        options = case_options(*case)
        if on_device and case[0] is not None:  # transformers' own processing knows no device
            options["device"] = self.device
        return self.processor(
            images=[[picture] for _ in range(rows)],
            text=[qwen2_vl.PROMPT] * rows,
            return_tensors="pt",
            images_kwargs=options,
        )

    def request(self, picture, case, rows: int) -> dict[str, float]:
        """Seconds of one request from the picture to the first token, and of its phases."""
        clock, phases = self.clock, Phases(self.model, self.device, self.clock)
        with timed_selection(clock, self.device) as selection, phases, torch.inference_mode():
            synchronize(self.device)
            start = clock()
            inputs = self.inputs(picture, case, rows, self.process_on_device)
            processed = clock()
            self.model.generate(**inputs.to(self.device), do_sample=False, max_new_tokens=1)
            synchronize(self.device)
            end = clock()
        times = {"processing": processed - start, "model": end - processed, "request": end - start}
        return times | phases.seconds() | {"selection": sum(selection)}

    @torch.inference_mode()
    def counts(self, picture, case) -> dict:
        """Tokens of one picture: of the processor, of the model, and by hand from the levels; and the logits."""
        inputs, seen = self.inputs(picture, case), {}
        elsewhere = self.inputs(picture, case, on_device=True)
        unequal = sum(int((inputs[name] != elsewhere[name].cpu()).sum()) for name in inputs if "levels" in name)

        def look(module, args, out):
            seen["rows"], seen["merged"] = len(out.last_hidden_state), len(out.pooler_output)

        hook = self.model.model.visual.register_forward_hook(look)
        logits = self.model(**inputs.to(self.device), use_cache=False).logits[0].float()
        hook.remove()
        _, height, width = inputs["image_grid_thw"][0].tolist()
        vision, merged = height * width, height * width // 4
        if "image_patch_levels" in inputs:
            cells = np.bincount(inputs["image_patch_levels"].cpu(), minlength=4)  # base patches by level
            vision, merged = int(cells[1] + cells[2] // 4 + cells[3] // 16), int((cells[1] + cells[2]) // 4)
            merged += int(cells[3]) // 16
        in_prompt = int((inputs["input_ids"] == self.config.image_token_id).sum())
        return {
            "base_patches": height * width,
            "vision_tokens": {"processor": len(inputs["pixel_values"]), "model": seen["rows"], "by_hand": vision},
            "image_tokens": {"processor": in_prompt, "model": seen["merged"], "by_hand": merged},
            "llm_tokens": inputs["input_ids"].shape[1],
            "levels_unequal_on_device": unequal,
            "logits": logits,
        }

    def run(self, picture, rows: int, repeats: int) -> dict[str, dict]:
        """{case: counts, operations, times of each phase, memory, how many times faster than none}."""
        found, seconds = {}, {}
        stock = None
        for case in CASES:
            entry = self.counts(picture, case)
            logits = entry.pop("logits")
            stock = logits if stock is None else stock
            if case == ("budget", 1.0):
                entry["difference_from_none"] = (
                    (logits - stock).abs().max().item()
                    if self.model.dtype == torch.float32
                    else relative(logits, stock)
                )
            del logits
            free_memory(self.device)
            try:
                if self.device == "cuda":  # elsewhere `counts` has warmed up
                    self.request(picture, case, rows)
                with PeakMemory(self.device) as peak:
                    self.request(picture, case, rows)
            except torch.OutOfMemoryError as error:
                entry["out_of_memory"] = str(error).split(".")[0]
            else:
                entry["peak_gib"], seconds[case] = peak.gib, []
            found[case] = entry | {"flops": self.flops(entry, rows)}
        for _ in range(repeats):
            for case, times in seconds.items():
                times.append(self.request(picture, case, rows))
        for case, times in seconds.items():
            found[case] |= {name: spread([each[name] for each in times]) for name in PHASES}
        add_ratios(found, seconds)
        return {case_name(*case): entry for case, entry in found.items()}

    def flops(self, entry: dict, rows: int) -> dict[str, float]:
        patches, merged = entry["vision_tokens"]["by_hand"], entry["image_tokens"]["by_hand"]
        return {
            "vision": qwen2_vl.vision_flops(self.config, [patches] * rows, merged * rows),
            "llm": qwen2_vl.llm_flops(self.config, [entry["llm_tokens"]] * rows),
        }


def add_ratios(found: dict[tuple, dict], seconds: dict[tuple, list[dict]]) -> None:
    """What the operations allow, how many times faster than none, and the selection's share of the request.

    A request is held against none's of the same round, so that a machine that slows down meets both; then the median of
    all rounds.

    Args:
        found: entries with "flops", which are added to.
        seconds: of each case that was timed, each round's phases.
    """
    plain = found[CASES[0]]
    for case, entry in found.items():
        entry["allowed"] = round(sum(plain["flops"].values()) / sum(entry["flops"].values()), 3)
        rounds = list(zip(seconds.get(CASES[0], ()), seconds.get(case, ()), strict=False))
        if not rounds:
            continue
        ratios = {
            "model_faster_by": [none["model"] / own["model"] for none, own in rounds],
            "faster_by": [none["model"] / (own["model"] + own["selection"]) for none, own in rounds],
            "request_faster_by": [none["request"] / own["request"] for none, own in rounds],
            "selection_share": [own["selection"] / own["request"] for _, own in rounds],
        }
        entry |= {name: round(statistics.median(values), 4) for name, values in ratios.items()}
        entry["of_allowed"] = round(entry["faster_by"] / entry["allowed"], 3)


def verdicts(found: dict[str, dict], dtype: torch.dtype) -> list[tuple[str, bool, str]]:
    """(label, whether it holds, text) of one picture: counts and equal outputs; no time decides."""
    wrong, counted = [], []
    for name, entry in found.items():
        vision, image = entry["vision_tokens"], entry["image_tokens"]
        counted.append(f"{name} {vision['by_hand']}, {image['by_hand']}")
        for kind, counts in (("vision", vision), ("image", image)):
            if len(set(counts.values())) > 1:
                wrong.append(f"{name}: {kind} tokens {counts}")
        if entry["levels_unequal_on_device"]:
            wrong.append(f"{name}: {entry['levels_unequal_on_device']} levels of host and device differ")
    text = "; ".join(wrong or counted)
    made = [("vision tokens and image tokens of processor, model and by hand", not wrong, text)]
    exact = dtype == torch.float32
    value, limit = found["budget 1.0"]["difference_from_none"], SAME if exact else SAME_BF16
    text = f"{'largest' if exact else 'relative'} difference {value:.1e} (limit {limit:.0e})"
    made.append(("budget 1.0 against none, logits", value <= limit, text))
    return made


def aims(found: dict[str, dict], device: str) -> list[dict]:
    """Aims of one picture with the figures beside them: {"aim", "expected", "found", "reached"}."""
    timed = {name: entry for name, entry in found.items() if "faster_by" in entry}
    made = []
    for alpha, published in PUBLISHED.items():
        entry = timed.get(case_name("budget", alpha))
        if entry and entry["allowed"] >= published:
            value = entry["request_faster_by"]
            made.append((f"budget {alpha}, request faster by", published, value, value >= published))
    for name, entry in timed.items():
        if device == "cuda" and entry["allowed"] > 1:
            value = entry["of_allowed"]
            made.append((f"{name}, of what the operations allow", ALLOWED_AIM, value, value >= ALLOWED_AIM))
    if device != "cuda":
        value = max((entry["selection_share"] for entry in timed.values()), default=1.0)
        made.append(("selection's largest share of the request", SELECTION_AIM, value, value < SELECTION_AIM))
    return [dict(zip(("aim", "expected", "found", "reached"), values, strict=True)) for values in made]


def shape_text(bench: Bench, preset: str) -> str:
    text, vision = bench.config.text_config, bench.config.vision_config
    return (
        f"{preset} (language model {text.num_hidden_layers} layers, {text.hidden_size} wide; vision {vision.depth} "
        f"layers, {vision.embed_dim} wide), {str(bench.model.dtype).removeprefix('torch.')}"
    )


def flat(entry: dict) -> dict:
    """An entry of `Bench.run` with the medians of its phases alone."""
    found = {}
    for key, value in entry.items():
        if key in PHASES:
            found[f"{key}_ms"] = value["ms"]
        elif isinstance(value, dict):
            found[key] = value.get("by_hand", sum(value.values()))
        else:
            found[key] = value
    return found
