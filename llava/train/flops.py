"""Floating-point operations that a training step must do, and what devices can do at most."""

from collections.abc import Iterable

from llava.model.shapes import ModelShape, VisionShape, shape_of

# Dense bf16 TFLOP/s without sparsity, from the makers' data sheets; the first name found in the device's name counts.
PEAK_BF16_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "GH200": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H800": 989.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A40": 150.0,
    "A10": 125.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}


def peak_tflops(name: str) -> float | None:
    """bf16 peak in TFLOP/s of a device of this name, as PyTorch has it; None: it is not in the table."""
    return next((peak for part, peak in PEAK_BF16_TFLOPS.items() if part in name), None)


def step_flops(
    config,
    tokens: Iterable[int],
    patches: Iterable[int | tuple[int, int, int]],
    trained_parts: set[str],
    *,
    supervised: int | None = None,
    projected: int | None = None,
    lora_rank: int = 0,
    tower_blocks: int | None = None,
) -> float:
    """Operations of one optimizer step: what the loss and the gradients of `trained_parts` take, and no more.

    A weight that a token is multiplied with counts 2, again 2 where it learns, and again 2 where something before it
    does. The two products of attention count 4 per channel, layer and pair of tokens that see each other, three times
    that where anything up to there learns. Not counted: padding, recomputation under gradient checkpointing, whatever
    is no matrix product (norms, softmax, look-ups, rotations), and the optimizer.

    Args:
        config: the model's, of any family.
        tokens: of each sample's sequence in the language model. Of S tokens, S^2 / 2 pairs see each other.
        patches: of each vision sequence (a crop, an image, a clip), without class token; or its grid (t, h, w), which
            windows of attention are exact with: of a number alone they are taken to be whole, and a clip of Qwen-VL to
            be one frame.
        trained_parts: see `llava.constants.TUNABLE_PARTS`.
        supervised: positions that have a label; None: all of `tokens`.
        projected: tokens that the projector makes of `patches`; None: as their lengths say, of encoders that choose no
            patches.
        lora_rank: of the adapters that learn in place of the language model's weights; 0: the weights do.
        tower_blocks: how many blocks of the vision encoder learn where it does, the last ones; None: all of it. Of
            blocks with windows of attention and without, as many of each are taken to learn as their shares are.
    """
    tokens, patches = list(tokens), list(patches)
    shape, learns = shape_of(config), _Learning(set(trained_parts), lora_rank, tower_blocks)
    total = 0.0
    if shape.vision is not None and patches:
        total += _vision_flops(shape, patches, learns, projected)
    return total + _language_flops(shape, tokens, sum(tokens) if supervised is None else supervised, learns)


class _Learning:
    """What learns in a run."""

    def __init__(self, parts: set[str], lora_rank: int, tower_blocks: int | None = None):
        self.tower_blocks = tower_blocks
        self.tower, self.compressor = "mm_vision_tower" in parts, "mm_token_compressor" in parts
        self.projector, self.language = "mm_mlp_adapter" in parts, "mm_language_model" in parts
        self.lora_rank = lora_rank if self.language else 0
        self.features = self.tower or self.compressor  # what the projector is given
        self.anything = self.features or self.projector or self.language


def _product(weights: float, tokens: float, learns: bool, before: bool) -> float:
    """A matrix product: forward, gradient of the weights, gradient of the inputs."""
    return 2.0 * weights * tokens * (1 + learns + before)


def encoder_flops(config, patches: Iterable[int | tuple[int, int, int]]) -> float:
    """Operations of the vision encoder alone, forward, as `step_flops` counts them; 0 without one.

    Args:
        config, patches: as there.
    """
    vision = shape_of(config).vision
    return 0.0 if vision is None else _encoder_flops(vision, list(patches), _Learning(set(), 0))


def _lengths(patches: list) -> list[int]:
    return [length if isinstance(length, int) else length[0] * length[1] * length[2] for length in patches]


def _encoder_flops(vision: VisionShape, patches: list, learns: _Learning) -> float:
    lengths = _lengths(patches)
    count = sum(lengths) + vision.extra * len(lengths)
    whole = learns.tower and learns.tower_blocks is None
    total = _product(vision.patch_values * vision.hidden, sum(lengths), whole, False)  # pixels learn nothing
    last = 0 if not learns.tower else vision.layers if whole else learns.tower_blocks
    total += _product((vision.layers - last) * vision.layer_weights, count, False, False)
    total += _product(last * vision.layer_weights, count, learns.tower, learns.tower)
    return total + 4.0 * vision.hidden * _vision_pairs(vision, patches) * (1 + 2 * last / vision.layers)


def _vision_flops(shape: ModelShape, patches: list, learns: _Learning, projected: int | None) -> float:
    vision, projector, lengths = shape.vision, shape.projector, _lengths(patches)
    total = _encoder_flops(vision, patches, learns)
    made = projector.tokens(lengths, vision.extra) if projected is None else projected
    if projector.compressor:
        cells = len(lengths) * projector.sides[1] ** 2
        total += _product(projector.compressor, cells, learns.compressor, learns.tower)
    before = learns.features or (projector.normed and learns.projector)
    total += _product(projector.first, made, learns.projector, before)
    return total + _product(projector.rest, made, learns.projector, learns.projector or learns.features)


def _vision_pairs(vision: VisionShape, patches: list) -> float:
    """Pairs of tokens that see each other, over all layers."""
    whole = windowed = 0
    for length in patches:
        t, h, w = (1, 1, length) if isinstance(length, int) else length
        frames, size = (t, h * w) if vision.frames_apart else (1, t * h * w)
        whole += frames * (size + vision.extra) ** 2
        if vision.windowed:
            windowed += frames * sum(window**2 for window in _windows(vision.window, length, size))
    return (vision.layers - vision.windowed) * whole + vision.windowed * windowed


def _windows(side: int, length, size: int) -> list[int]:
    """Patches of each window of one frame."""
    if isinstance(length, int):
        full, left = divmod(size, side**2)
        return [side**2] * full + [left] * (left > 0)
    parts = [[min(side, edge - at) for at in range(0, edge, side)] for edge in length[1:]]
    return [rows * columns for rows in parts[0] for columns in parts[1]]


def _language_flops(shape: ModelShape, tokens: list[int], supervised: int, learns: _Learning) -> float:
    language, count = shape.language, sum(tokens)
    whole = learns.language and not learns.lora_rank
    pairs = sum(_causal_pairs(length, window) for window in language.windows for length in tokens)
    total = 4.0 * language.queries * pairs * (3 if learns.anything else 1)
    layers = len(language.windows)
    total += _product(layers * language.layer_weights, count, whole, learns.anything)
    if learns.lora_rank:
        adapters = learns.lora_rank * sum(map(sum, language.matrices))
        total += _product(layers * adapters, count, True, True)
    return total + _product(language.vocabulary * language.hidden, supervised, whole, learns.anything)


def _causal_pairs(length: int, window: int | None) -> float:
    """Pairs of S tokens that see those up to themselves: half of all; within a window of W, S * W - W^2 / 2."""
    if window is None or length <= window:
        return length**2 / 2
    return length * window - window**2 / 2
