"""One HEVC-ViT, three ways through a batch of images of mixed sizes: packed, one by one, padded to the largest.

Shapes: S images, N tokens of all of them, L tokens of the longest, D width, H heads, E channels of a head.
"""

import random
import statistics

import torch
import torch.nn.functional as F

from gpu_checks.measure import PeakMemory, free_memory, spread, step_seconds
from llavavit import LlavaViTPackingConfig, LlavaViTPackingModel, named_config
from llavavit.layers import frames_to_patches, grid_positions, rotary_table
from llavavit.varlen_attention import pack_lengths

DEMO = dict(
    hidden_size=96,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=3,
    patch_size=14,
    initializer_range=0.1,  # weights large enough that the blocks tell in the output
)
INPUT_SETS = 2
# largest difference of outputs of about 1 (float32), difference of norms over the norm (bf16)
SAME = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def make_model(preset: str, device: str, dtype: torch.dtype, **changes) -> LlavaViTPackingModel:
    """A packed encoder with random weights; preset is "demo" or "vit-l", `changes` go into its config."""
    if preset == "demo":
        config = LlavaViTPackingConfig(**DEMO | changes)
    else:
        config = named_config("hf_llava_vit_large_ln", LlavaViTPackingConfig, **changes)
    torch.manual_seed(0)
    with torch.device(device):
        return LlavaViTPackingModel._from_config(config, dtype=dtype).eval()


def draw_sizes(count: int, least: int, most: int, patch: int, seed: int) -> list[tuple[int, int]]:
    """(height, width) of each image in pixels: each drawn by itself, evenly, among the patch's multiples in range."""
    draw = random.Random(seed)
    steps = range(-(-least // patch), most // patch + 1)
    return [(draw.choice(steps) * patch, draw.choice(steps) * patch) for _ in range(count)]


def draw_images(sizes: list[tuple[int, int]], device: str, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    """Random pixels [3, height, width] of these sizes, mean 0 and deviation 1."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, *size, generator=generator).to(device, dtype) for size in sizes]


# --- the three sides: images -> (last_hidden_state [N, D], pooler_output [S, D]) --------------------------------------


def pack(images: list[torch.Tensor], patch: int) -> tuple[torch.Tensor, list[tuple[int, int, int]]]:
    """Rows of patches [N, C*p*p] of all images, and their grids."""
    rows = torch.cat([frames_to_patches(image[None], patch) for image in images])
    return rows, [(1, image.shape[1] // patch, image.shape[2] // patch) for image in images]


def packed(model, images):
    rows, grid = pack(images, model.config.patch_size)
    out = model(rows, torch.tensor(grid))
    return out.last_hidden_state, out.pooler_output


def one_by_one(model, images):
    states, pooled = zip(*(packed(model, [image]) for image in images), strict=True)
    return torch.cat(states), torch.cat(pooled)


def padded(model, images):
    """What a batch with a mask would be: every block sees L tokens of every image, attention masks the keys.

    Pooling is the packed one, which is in this side's favour.
    """
    rows, grid = pack(images, model.config.patch_size)
    lengths = [t * h * w for t, h, w in grid]
    samples, longest, device = len(lengths), max(lengths), rows.device
    # place of each token in the batch, and which keys are none; made on the host, so that no one waits for the device
    places = torch.cat([i * longest + torch.arange(length) for i, length in enumerate(lengths)])
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None])[:, None, None]  # [S, 1, 1, L]
    places, mask = places.to(device, non_blocking=True), mask.to(device, non_blocking=True)

    x_ND = model.layernorm_pre(model.embed(rows))
    rotary = rotary_table(grid_positions(grid, device), model.config, x_ND.dtype)
    rotary = [_scatter(part, places, samples * longest) for part in rotary]
    x_BD = _scatter(x_ND, places, samples * longest)  # B = S * L
    for block in model.encoder.layers:
        q, k, v = block.self_attn.project(block.layer_norm1(x_BD), rotary)
        q, k, v = (part.unflatten(0, (samples, longest)).transpose(1, 2) for part in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(0, 1).flatten(1)
        x_BD = x_BD + block.self_attn.output(out)
        x_BD = x_BD + block.mlp(block.layer_norm2(x_BD))
    x_ND = model.layernorm_post(x_BD[places])
    return x_ND, model.head(x_ND, *pack_lengths(lengths, device))


def _scatter(x_N, places, rows: int):
    """[N, ...] -> [rows, ...], zero where there is no token."""
    return x_N.new_zeros(rows, *x_N.shape[1:]).index_copy(0, places, x_N)


SIDES = {"packed": packed, "one_by_one": one_by_one, "padded": padded}


# --- what is measured -------------------------------------------------------------------------------------------------


def forward_flops(config, lengths: list[int]) -> float:
    """Floating-point operations that the forward pass must do, padding not counted.

    With N tokens in all and n_i of image i, D = hidden_size, I = intermediate_size, K layers, C channels, p patch:
        patch embedding          2 C p^2 D N
        blocks' weights          K (8 D^2 + 4 D I) N
        attention products       K 4 D sum(n_i^2)
        pooling's keys, values   4 D^2 N
    Norms, activations, rotary embedding and the pooled vectors' own MLP are left out. The backward pass counts twice
    this much.
    """
    tokens, width = sum(lengths), config.hidden_size
    embedding = 2 * config.num_channels * config.patch_size**2 * width * tokens
    weights = config.num_hidden_layers * (8 * width**2 + 4 * width * config.intermediate_size) * tokens
    attention = config.num_hidden_layers * 4 * width * sum(length**2 for length in lengths)
    return float(embedding + weights + attention + 4 * width**2 * tokens)


@torch.no_grad()
def compare(model, images) -> dict[str, tuple[float, float]]:
    """{side: (difference from the packed side, tolerance)}: absolute in float32, relative in bf16."""
    expected = packed(model, images)
    limit = SAME[model.dtype]
    found = {}
    for name in ("one_by_one", "padded"):
        pairs = zip(SIDES[name](model, images), expected, strict=True)
        if model.dtype == torch.float32:
            apart = [(a - b).abs().amax() for a, b in pairs]
        else:
            apart = [(a - b).float().norm() / b.float().norm() for a, b in pairs]
        found[name] = torch.stack(apart).amax().item(), limit  # which unlike Python's max keeps a NaN
    return found


def make_step(side, model, input_sets, backward: bool):
    """step(i) of one side on input set i: forward, or forward and backward with all weights trained."""

    def step(i: int):
        images = input_sets[i % len(input_sets)]
        with torch.set_grad_enabled(backward):
            states, pooled = side(model, images)
            if backward:
                model.zero_grad(set_to_none=True)
                (states.float().square().mean() + pooled.float().square().mean()).backward()

    return step


def time_sides(model, input_sets, device: str, backward: bool, repeats: int) -> dict[str, dict]:
    """{side: seconds and peak_gib, or out_of_memory}; the sides take turns, so that what else runs meets all alike."""
    steps = {name: make_step(side, model, input_sets, backward) for name, side in SIDES.items()}
    found: dict[str, dict] = {name: {"seconds": []} for name in steps}
    for name, step in steps.items():
        free_memory(device)
        try:
            for i in range(len(input_sets)):
                step(i)
            with PeakMemory(device) as peak:
                step(0)
            found[name]["peak_gib"] = peak.gib
        except torch.OutOfMemoryError as error:
            found[name] = {"out_of_memory": str(error).split(".")[0]}
        model.zero_grad(set_to_none=True)
    free_memory(device)
    for i in range(repeats):
        for name, step in steps.items():
            if "seconds" in found[name]:
                found[name]["seconds"] += step_seconds(lambda _, step=step, i=i: step(i), device, 0, 1)
    model.zero_grad(set_to_none=True)
    return found


def figures(timed: dict[str, dict], flops: float, images: int, matmul_tflops: float) -> dict[str, dict]:
    """Figures of every side from its seconds: time, images/s, FLOP/s that count, packed's speed over it."""
    packed_median = statistics.median(timed["packed"]["seconds"])
    found = {}
    for name, entry in timed.items():
        if "out_of_memory" in entry:
            found[name] = entry
            continue
        median = statistics.median(entry["seconds"])
        found[name] = {
            **spread(entry["seconds"]),
            "images_per_s": images / median,
            "tflops": flops / median / 1e12,
            "share_of_matmul_rate": flops / median / 1e12 / matmul_tflops,
            "packed_is_faster_by": median / packed_median,
            "peak_gib": entry["peak_gib"],
        }
    return found
