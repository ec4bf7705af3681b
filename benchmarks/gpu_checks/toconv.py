"""Token compression (ToConv) on this device: its values, and what it costs and saves in a LLaVA model."""

from contextlib import nullcontext
from dataclasses import dataclass, field

import torch

from gpu_checks.measure import PeakMemory, ceilings, free_memory, spread, step_seconds
from gpu_checks.models import left_padded, make_batch, make_config, make_model, merged_inputs, parameters
from gpu_checks.numerics import relative
from gpu_checks.registry import Context, Result, check
from llava.constants import TUNABLE_PARTS

# tokens per side: (of the encoder, left by the compressor or None), each "none" before what it is held against
CASES = ((24, None), (24, 12), (24, 8), (16, None), (16, 12), (16, 8))
IMAGE = (1100, 808)  # width, height: 2x2 crops and the whole image, with padding that spatial_unpad cuts off
PROMPT, ANSWER = 30, 16  # text tokens, the image's place included; supervised ones, in training
PATCH = 14
INPUT_SETS = 2
PARTS = {"adapter": {"mm_mlp_adapter", "mm_token_compressor"}, "all": None}  # None: all there are
TIMED = ("tower", "llm_prefill", "first_token", "train_step")
PREFILL_AIM = 5.0  # 24 -> 8 against none, Qwen2-7B shape with CLIP-L/336
GOLDEN, BF16 = 1e-5, 3e-2  # absolute in float32; relative in bf16


def case_name(before: int, after: int | None) -> str:
    return f"none, {before}x{before}" if after is None else f"{before} -> {after}"


def tokens_by_formula(side: int) -> int:
    """Visual tokens of `IMAGE` as five anyres crops with spatial_unpad, each crop side x side tokens.

    The whole image side^2; the 2x2 crops' map without the rows that are padding, and a newline token behind each row.
    """
    across, (width, height) = 2 * side, IMAGE
    padding = (across - int(height * across / width)) // 2
    return side**2 + (across - 2 * padding) * (across + 1)


@dataclass
class Case:
    """One tower with its inputs; `use` puts it into the model."""

    before: int
    after: int | None
    pinpoints: list
    tower: torch.nn.Module
    prompts: list[dict] = field(default_factory=list)
    batches: list[dict] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)

    @property
    def name(self) -> str:
        return case_name(self.before, self.after)

    @property
    def side(self) -> int:
        return self.after or self.before


class Bench:
    """One language model and projector, and a tower per case: the cases take turns with the same weights.

    Cases of one grid share their encoder. Weights are bf16 on CUDA, and float32 under bf16 autocast in training, as
    `llava.train` has them without DeepSpeed; float32 on a CPU.
    """

    def __init__(self, device: str, llm: str, tower: str, layers: int | None = None):
        from llava.model.multimodal_encoder.builder import build_vision_tower

        self.device = device
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.model = make_model(make_config(llm, tower, layers, CASES[0][0] * PATCH), device, dtype)
        self.model.generation_config.eos_token_id = None
        encoders = {CASES[0][0]: self.model.get_vision_tower().vision_tower}
        self.cases = []
        for before, after in CASES:
            compression = dict(
                use_token_compression=after is not None, compression_input_size=before, compression_output_size=after
            )
            config = make_config(llm, tower, layers, before * PATCH, **compression)
            with torch.device(device):
                built = build_vision_tower(config, delay_load=True)
            built.vision_tower, built.is_loaded = encoders.setdefault(before, built.vision_tower), True
            case = Case(before, after, config.image_grid_pinpoints, built.to(dtype).eval())
            self.use(case)
            for i in range(INPUT_SETS):
                prompt = make_batch(self.model, 1, [(2, 2)], (PROMPT, PROMPT), (0, 0), seed=10 * i)
                case.prompts.append(left_padded(prompt) | {"image_sizes": [IMAGE]})
                batch = make_batch(self.model, 1, [(2, 2)], (PROMPT, PROMPT), (ANSWER, ANSWER), seed=10 * i)
                case.batches.append(batch | {"image_sizes": [IMAGE]})
            self.cases.append(case)

    def use(self, case: Case) -> None:
        self.model.get_model().vision_tower = case.tower
        self.model.config.image_grid_pinpoints = case.pinpoints

    # --- steps, for `step_seconds` ---

    def tower(self, case: Case):
        """Five crops through encoder and compressor."""

        def step(i: int):
            with torch.inference_mode():
                case.tower(case.prompts[i % INPUT_SETS]["images"][0])

        return step

    def llm_prefill(self, case: Case):
        """The language model alone over the merged prompt, with its cache and the last position's logits."""
        from transformers import Qwen2ForCausalLM

        with torch.no_grad():
            merged = [merged_inputs(self.model, prompt)[0] for prompt in case.prompts]

        def step(i: int):
            with torch.inference_mode():
                embeds = merged[i % INPUT_SETS]
                Qwen2ForCausalLM.forward(self.model, inputs_embeds=embeds, use_cache=True, logits_to_keep=1)

        return step

    def first_token(self, case: Case):
        """A `generate` of one token: tower, projector, merge and prefill."""

        def step(i: int):
            with torch.inference_mode():
                self.model.generate(**case.prompts[i % INPUT_SETS], do_sample=False, max_new_tokens=1, pad_token_id=0)

        return step

    def train_step(self, case: Case):
        """Forward, backward, gradient clipping and AdamW; keeps the loss. After `start_training`."""
        low = torch.autocast("cuda", torch.bfloat16) if self.device == "cuda" else nullcontext()

        def step(i: int):
            with low:
                loss = self.model(**case.batches[i % INPUT_SETS]).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            case.losses.append(loss.detach())

        return step

    def start_training(self, parts: set[str] | None) -> None:
        from llava.train import parts as training

        self.model.float().train()
        trained = {}
        for case in self.cases:
            case.tower.float().train()
            self.use(case)
            training.set_trainable(self.model, set(TUNABLE_PARTS) if parts is None else parts)
            trained |= {id(p): p for p in self.model.parameters() if p.requires_grad}
        # one for all cases: what has no gradient in a case's step is left alone
        self.optimizer = torch.optim.AdamW(trained.values(), lr=1e-5, fused=self.device == "cuda")

    # --- what is measured ---

    def tokens(self, case: Case) -> dict[str, int]:
        """What the model really makes of the first prompt, beside the formula."""
        self.use(case)
        prompt = case.prompts[0]
        (crops,) = prompt["images"]
        with torch.no_grad():
            per_crop = case.tower(crops).shape[1]
            merged = merged_inputs(self.model, prompt)[0].shape[1]
        return {
            "crops": len(crops),
            "per_crop": per_crop,
            "per_crop_by_formula": case.side**2,
            "per_image": merged - (PROMPT - 1),
            "per_image_by_formula": tokens_by_formula(case.side),
            "per_image_counted_ahead": self.model.visual_token_counter()(crops.shape, IMAGE),
        }

    def time(self, name: str, repeats: int) -> dict[str, dict]:
        """{case: times in ms and peak_gib, or out_of_memory}; the cases take turns: what else runs meets all alike."""
        steps, seconds, found = {}, {}, {}
        for case in self.cases:
            self.use(case)
            free_memory(self.device)
            try:
                step = getattr(self, name)(case)
                for i in range(INPUT_SETS):
                    step(i)
                with PeakMemory(self.device) as peak:
                    step(0)
            except torch.OutOfMemoryError as error:
                self.model.zero_grad(set_to_none=True)
                found[case.name] = {"out_of_memory": str(error).split(".")[0]}
                continue
            steps[case.name], seconds[case.name], found[case.name] = step, [], {"peak_gib": peak.gib}
        for i in range(repeats):
            for case in self.cases:
                if case.name in steps:
                    self.use(case)
                    seconds[case.name] += step_seconds(lambda _, s=steps[case.name], i=i: s(i), self.device, 0, 1)
        for case_name, values in seconds.items():
            found[case_name] = spread(values) | found[case_name]
        return found

    def run(self, parts: str, repeats: int) -> dict[str, dict]:
        """{case: {"tokens", "parameters", "losses" and an entry for each of `TIMED`}}."""
        found = {case.name: {"tokens": self.tokens(case), "parameters": self.parameters(case)} for case in self.cases}
        for name in TIMED:
            if name == "train_step":
                self.start_training(PARTS[parts])
            for case, values in self.time(name, repeats).items():
                found[case][name] = values
        for case in self.cases:
            found[case.name]["losses"] = [loss.item() for loss in case.losses]
        _add_ratios(found)
        return found

    def parameters(self, case: Case) -> dict[str, int]:
        compressor = case.tower.token_compressor
        return {
            "tower": parameters(case.tower.vision_tower),
            "compressor": 0 if compressor is None else parameters(compressor),
        }


def _add_ratios(found: dict[str, dict]) -> None:
    """How many times faster than no compression of the same grid, by medians."""
    for before, after in CASES:
        plain, entry = found[case_name(before, None)], found[case_name(before, after)]
        for name in TIMED:
            if "ms" in plain[name] and "ms" in entry[name]:
                entry[name]["faster_by"] = round(plain[name]["ms"] / entry[name]["ms"], 3)


def verdicts(found: dict[str, dict]) -> list[tuple[str, bool, str]]:
    """(label, whether it holds, text) of every case: token counts and finite losses; no time decides."""
    made = []
    for name, entry in found.items():
        count, losses = entry["tokens"], torch.tensor(entry["losses"])
        text = (
            f"{count['per_crop']} per crop (formula {count['per_crop_by_formula']}); {count['crops']} crops "
            f"{count['per_image']} (formula {count['per_image_by_formula']}, counted ahead "
            f"{count['per_image_counted_ahead']})"
        )
        holds = count["per_crop"] == count["per_crop_by_formula"] and count["crops"] == 5
        images = {count["per_image"], count["per_image_by_formula"], count["per_image_counted_ahead"]}
        made.append((f"{name}, visual tokens", holds and len(images) == 1, text))
        trained = len(losses) > 0 and bool(losses.isfinite().all())
        shown = f"{losses[0]:.4f} to {losses[-1]:.4f} in {len(losses)} steps" if len(losses) else "no step was made"
        made.append((f"{name}, losses finite", trained, entry["train_step"].get("out_of_memory") or shown))
    return made


def shape_text(bench: Bench, llm: str, tower: str, parts: str) -> str:
    config, precision = bench.model.config, "bf16" if bench.device == "cuda" else "float32"
    return (
        f"{llm} ({config.num_hidden_layers} layers, {config.hidden_size} wide) with {tower} at 336 and 224 px, "
        f"{precision}; one image of {IMAGE[0]}x{IMAGE[1]} in 5 crops, {PROMPT - 1} text tokens; trained: {parts}, "
        f"{ANSWER} supervised tokens"
    )


# --- checks -----------------------------------------------------------------------------------------------------------


def golden_outputs(path, device: str, dtype: torch.dtype) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """{geometry: (compressed tokens, published ones)}, both in float32."""
    from safetensors.torch import load_file

    from llava.model.multimodal_encoder.token_compressor import PUBLISHED_GEOMETRIES, TokenCompressor

    io, found = load_file(path), {}
    for before, after in PUBLISHED_GEOMETRIES:
        prefix = f"{before}to{after}."
        values = {name.removeprefix(prefix): value for name, value in io.items() if name.startswith(prefix)}
        compressor = TokenCompressor(before, after, values["tokens"].shape[-1])
        compressor.load_state_dict({name: values[name] for name in compressor.state_dict()})
        with torch.no_grad():
            out = compressor.to(device, dtype)(values["tokens"].to(device, dtype))
        found[f"{before} -> {after}"] = out.float(), values["compressed"].to(device)
    return found


@check("toconv_golden")
def toconv_golden(context: Context, result: Result):
    """The published token compressors' values in float32; bf16 against float32."""
    path = context.root / "tests/golden/toconv/io.safetensors"
    exact = golden_outputs(path, context.device, torch.float32)
    low = golden_outputs(path, context.device, torch.bfloat16)
    result.test("cases", len(exact) == 4, f"{len(exact)} geometries, expected 4")
    for name, (out, expected) in exact.items():
        result.below(
            name,
            float32=((out - expected).abs().max().item(), GOLDEN),
            bf16_relative=(relative(low[name][0], out), BF16),
        )


@check("toconv_speed")
def toconv_speed(context: Context, result: Result):
    """With and without token compression: token counts, tower, prefill and training-step time, memory, parameters."""
    options = context.options
    llm = options.generate_preset or ("demo" if context.small else "qwen2-7b")
    tower = options.tower_preset or ("demo" if context.small else "clip-l336")
    bench = Bench(context.device, llm, tower, options.generate_layers)
    shape = shape_text(bench, llm, tower, "adapter")
    result.figure("device", **ceilings(context.device, context.small))
    found = bench.run("adapter", 1 if context.small else options.generate_repeats)
    result.figure("aim: prefill with 24 -> 8, Qwen2-7B shape", faster_by=PREFILL_AIM)
    for name, entry in found.items():
        result.figure(f"{shape}; {name}", **entry["tokens"], **entry["parameters"])
        for timed in TIMED:
            result.figure(f"{shape}; {name}, {timed}", **entry[timed])
    for verdict in verdicts(found):
        result.test(*verdict)
