"""Memory, time and communication of a training step on many devices. Bytes, seconds; one rank's unless said."""

import functools
from dataclasses import dataclass, field

from costs.facts import MEASURED, Gpu
from llava.model.shapes import ModelShape, VisionShape, shape_of
from llava.train.flops import peak_tflops, step_flops

GIB = 2**30
NODE = 8  # devices
USABLE = 0.95  # of a device's memory: the rest is CUDA's own, and lost between allocations
BUS = 0.8  # of a link's rate that collectives reach
HIDDEN = 0.5  # of the computing time that communication may run beside
HOP = 10e-6  # seconds that a collective takes for each node, and once within one
LIVE = 1e9  # parameters that ZeRO-3 holds gathered at most (stage3_max_live_parameters)
BUCKETS = 1e9  # bytes of DeepSpeed's buckets

ASSUMPTIONS = (
    f"nodes of {NODE} devices; ring collectives at {BUS:.0%} of what a device sends within a node, or of what all "
    f"network cards of a node send; {HOP * 1e6:.0f} us for each node and collective; communication runs beside at most "
    f"{HIDDEN:.0%} of the computing",
    f"utilisation of the arithmetic, padding included, as measured on one {MEASURED.device}: {MEASURED.utilisation} "
    f"without gradient checkpointing, {MEASURED.utilisation_checkpointing} with; the same on every device and size",
    "no rank waits for data or for a rank with longer samples; saving and evaluation take no time",
    f"memory: weights, gradients, optimizer, activations and logits at once, {1 - USABLE:.0%} of the device left "
    f"free; ZeRO-3 holds {LIVE / 1e9:.0f}e9 gathered weights, DeepSpeed {BUCKETS / 1e9:.0f}e9 bytes of buckets",
    "AdamW: two float32 moments, under DeepSpeed float32 weights beside the bf16 ones",
)


def parameters(config) -> dict[str, int]:
    """Weights by part, without norms, biases and positions (less than 0.1% of them)."""
    shape = shape_of(config)
    text, language = config.get_text_config(), shape.language
    words = language.vocabulary * language.hidden
    tied = 1 if getattr(text, "tie_word_embeddings", False) else 2
    found = {"mm_language_model": len(language.windows) * language.layer_weights + tied * words}
    if shape.vision is not None:
        vision, projector = shape.vision, shape.projector
        found["mm_vision_tower"] = vision.patch_values * vision.hidden + vision.layers * vision.layer_weights
        found["mm_mlp_adapter"] = projector.first + projector.rest
        if projector.compressor:
            found["mm_token_compressor"] = projector.compressor
    return found


@dataclass(frozen=True)
class Plan:
    """How a run is spread and held.

    Attributes:
        gpu: one of `facts.GPUS`.
        devices: how many of them.
        zero: stage of DeepSpeed's ZeRO; None: no DeepSpeed.
        offload: whether ZeRO keeps weights and optimizer in the host's memory.
        checkpointing: gradient checkpointing.
        parts: what is trained (see `llava.constants.TUNABLE_PARTS`).
        lora_rank: of the adapters in place of the language model's weights; 0: none.
        accumulation: micro-batches of a step.
    """

    gpu: Gpu
    devices: int
    parts: frozenset[str]
    zero: int | None = 3
    offload: bool = False
    checkpointing: bool = True
    lora_rank: int = 0
    accumulation: int = 1


@dataclass(frozen=True)
class Batch:
    """A rank's micro-batch: tokens of each sample, patches of each vision sequence, tokens that the projector makes of
    them (None: by their lengths), positions with a label."""

    tokens: list[int]
    patches: list = field(default_factory=list)
    projected: int | None = None
    supervised: int = 0


def trained_weights(config, plan: Plan) -> int:
    """How many weights learn."""
    found = parameters(config)
    if plan.lora_rank and "mm_language_model" in plan.parts:
        language = shape_of(config).language
        found["mm_language_model"] = plan.lora_rank * sum(map(sum, language.matrices)) * len(language.windows)
    return sum(count for part, count in found.items() if part in plan.parts)


def all_weights(config, plan: Plan) -> int:
    """Weights that a forward pass reads, adapters included."""
    adapters = plan.lora_rank and "mm_language_model" in plan.parts
    extra = trained_weights(config, plan) if adapters else 0
    others = sum(count for part, count in parameters(config).items() if part in plan.parts - {"mm_language_model"})
    return sum(parameters(config).values()) + (extra - others if adapters else 0)


# --- memory ---


def state_bytes(weights: int, trained: int, plan: Plan) -> dict[str, float]:
    """Weights, gradients and optimizer (moments and float32 weights) of one device."""
    if plan.zero is None:  # float32 where it learns, bf16 where not
        found = {"weights": 4.0 * trained + 2.0 * (weights - trained), "gradients": 4.0 * trained}
        return found | {"optimizer": 8.0 * trained, "buffers": 0.0}
    shares = [plan.devices if plan.zero >= stage else 1 for stage in (3, 2, 1)]
    found = {"weights": 2.0 * weights / shares[0], "gradients": 2.0 * trained / shares[1]}
    found |= {"optimizer": 12.0 * trained / shares[2], "buffers": BUCKETS}
    if plan.offload:
        found |= {"weights": 0.0, "optimizer": 0.0}
    if plan.zero == 3:
        found["buffers"] += 2.0 * min(weights, LIVE)
    return found


def language_values(language) -> int:
    """Numbers that a layer keeps of a token for its backward pass: two norms' inputs and outputs; queries, keys and
    values, the first two once more with their positions in; what attention gives; the MLP's four."""
    attention = 3 * language.queries + 3 * language.keys
    return 4 * language.hidden + attention + 4 * language.intermediate


def vision_values(vision: VisionShape) -> int:
    """As `language_values`, of an encoder, whose positions are not rotated."""
    return 8 * vision.hidden + (4 if vision.gated else 2) * vision.intermediate


def activation_bytes(shape: ModelShape, batch: Batch, plan: Plan, factor: float) -> float:
    """What the forward pass leaves for the backward pass; two bytes a number, times the measured `factor`.

    With gradient checkpointing each layer's input, and the largest layer whole while it is recomputed. A frozen tower
    leaves nothing.
    """
    language, vision = shape.language, shape.vision
    stacks = [(len(language.windows), language.hidden, language_values(language), sum(batch.tokens))]
    if vision is not None and "mm_vision_tower" in plan.parts:
        lengths = [n if isinstance(n, int) else n[0] * n[1] * n[2] for n in batch.patches]
        count = sum(lengths) + vision.extra * len(lengths)
        stacks.append((vision.layers, vision.hidden, vision_values(vision), count))
    if not plan.checkpointing:
        return sum(2.0 * layers * values * tokens * factor for layers, _, values, tokens in stacks)
    kept = 4.0 if plan.zero is None else 2.0  # autocast keeps the stream between layers in float32
    inputs = sum(kept * layers * hidden * tokens for layers, hidden, _, tokens in stacks)
    return inputs + max(2.0 * values * tokens * factor for _, _, values, tokens in stacks)


def logit_bytes(vocabulary: int, supervised: int) -> float:
    """Logits of the supervised positions: bf16, float32, and their gradient."""
    return 10.0 * vocabulary * supervised


@functools.cache
def activation_factor(clip_patches: int = 576) -> float:
    """What the measured step kept, over what is counted: norms in float32, padding, copies."""
    from costs.recipes import measured_config

    config = measured_config()
    shape, plan = shape_of(config), Plan(None, 1, frozenset(parameters(config)), zero=None, checkpointing=False)
    batch = Batch([MEASURED.tokens // 4] * 4, [clip_patches] * MEASURED.crops)
    counted = activation_bytes(shape, batch, plan, 1.0)
    states = sum(state_bytes(int(MEASURED.parameters), int(MEASURED.parameters), plan).values())
    kept = MEASURED.gib * GIB - states - logit_bytes(shape.language.vocabulary, MEASURED.supervised)
    return kept / counted


def memory(config, batch: Batch, plan: Plan) -> dict[str, float]:
    """Bytes of one device by what they hold, and "total"."""
    shape, trained = shape_of(config), trained_weights(config, plan)
    found = state_bytes(all_weights(config, plan), trained, plan)
    found["activations"] = activation_bytes(shape, batch, plan, activation_factor())
    found["logits"] = logit_bytes(shape.language.vocabulary, batch.supervised)
    return found | {"total": sum(found.values())}


# --- time ---


def communication(config, plan: Plan) -> tuple[float, float]:
    """(bytes that pass a device in a step, seconds they take) of gradients and gathered weights."""
    trained, weights, ranks = trained_weights(config, plan), all_weights(config, plan), plan.devices
    if ranks == 1:
        return 0.0, 0.0
    shape = shape_of(config)
    layers = len(shape.language.windows) + (shape.vision.layers if shape.vision else 0)
    if plan.zero is None:
        sent, calls = 2 * 4.0 * trained, layers  # all-reduce of float32
    elif plan.zero == 3:  # gathered for forward and backward, gradients reduced, of every micro-batch
        sent, calls = plan.accumulation * (2 * 2.0 * weights + 2.0 * trained), plan.accumulation * 3 * layers
    else:  # stage 2 reduces the gradients of every micro-batch, then gathers the new weights
        times = plan.accumulation if plan.zero == 2 else 1
        sent, calls = times * 2.0 * trained + 2.0 * trained, (times + 1) * layers
    sent *= (ranks - 1) / ranks
    nodes = -(-ranks // NODE)
    rate = plan.gpu.link if nodes == 1 else min(plan.gpu.link, NODE * plan.gpu.net)
    return sent, sent / (rate * 1e9 * BUS) + calls * HOP * (1 + (nodes if nodes > 1 else 0))


def step(config, batch: Batch, plan: Plan) -> dict[str, float]:
    """Of one optimizer step: operations and bytes of a device, seconds computing, communicating and in all."""
    flops = plan.accumulation * step_flops(
        config,
        batch.tokens,
        batch.patches,
        set(plan.parts),
        supervised=batch.supervised,
        projected=batch.projected,
        lora_rank=plan.lora_rank,
    )
    utilisation = MEASURED.utilisation_checkpointing if plan.checkpointing else MEASURED.utilisation
    computing = flops / (peak_tflops(plan.gpu.name) * 1e12 * utilisation)
    sent, communicating = communication(config, plan)
    seconds = computing + max(0.0, communicating - HIDDEN * computing)
    samples = len(batch.tokens) * plan.accumulation * plan.devices
    return {
        "flops": flops,
        "bytes_sent": sent,
        "computing_s": computing,
        "communicating_s": communicating,
        "step_s": seconds,
        "samples_per_s": samples / seconds,
        "efficiency": computing / seconds,
    }
