"""The HEVC-ViT encoder and its variable-length attention on this device."""

import itertools

import torch

from gpu_checks import sides
from gpu_checks.measure import ceilings, waits_of
from gpu_checks.numerics import relative
from gpu_checks.registry import Context, Result, check

# relative, of a tensor as a whole: (output, gradients), against float32 (for float32 against float64)
TOLERANCE = {torch.bfloat16: (1e-2, 2e-2), torch.float16: (2e-3, 4e-3), torch.float32: (1e-5, 1e-5)}
GOLDEN, PACKED, BF16 = 1e-5, 1e-5, 3e-2
AIMS = {"one_by_one": 5.0, "padded": 1.8}  # on an H200
MATMUL_SHARE_AIM = 0.5


# --- attention --------------------------------------------------------------------------------------------------------


def attention_cases(small: bool) -> dict[str, dict]:
    """Lengths, heads and options of every case."""
    lengths = [1, 17, 64, 33, 64, 200] if small else [1, 17, 256, 1023, 256, 4097, 576]
    more = [length + 5 * (i % 3) for i, length in enumerate(lengths)]
    return {
        "self": dict(lengths=lengths),
        "grouped": dict(lengths=lengths, kv_heads=2),
        "one key head, causal": dict(lengths=lengths, kv_heads=1, causal=True),
        "causal": dict(lengths=lengths, causal=True),
        "causal, more keys": dict(lengths=lengths, keys=more, causal=True),
        "causal, more keys, window": dict(lengths=lengths, keys=more, causal=True, window=64),
        "grouped, causal, window, soft cap": dict(lengths=lengths, kv_heads=2, causal=True, window=64, softcap=2.0),
        "probes": dict(lengths=[1] * len(lengths), keys=lengths),
        "one length": dict(lengths=[lengths[2]] * 8),
    }


def attention_inputs(device: str, lengths, keys=None, heads=8, kv_heads=8, channels=64):
    """q, k, v and the output's gradient in float64, of values that bf16 and fp16 hold exactly."""
    generator = torch.Generator().manual_seed(len(lengths) + kv_heads)
    rows = sum(lengths), sum(keys or lengths), sum(keys or lengths), sum(lengths)
    shapes = [(n, h, channels) for n, h in zip(rows, (heads, kv_heads, kv_heads, heads), strict=True)]
    return [(torch.randn(shape, generator=generator) * 32).round().to(device).double() / 32 for shape in shapes]


def run_attention(backend: str, dtype, inputs, lengths, keys=None, **rule):
    """(output, gradients of q, k, v); `rule` is causal, window and softcap."""
    from llavavit.varlen_attention import pack_lengths, varlen_attention

    q, k, v, gradient = (x.to(dtype) for x in inputs)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    options = {"backend": backend, **rule}
    if keys is not None:
        options["cu_seqlens_k"], options["max_seqlen_k"] = pack_lengths(keys, q.device)
    out = varlen_attention(q, k, v, *pack_lengths(lengths, q.device), **options)
    return out.detach(), torch.autograd.grad(out, (q, k, v), gradient)


@check("varlen_attention")
def varlen_attention(context: Context, result: Result):
    """Every backend and dtype against the reference, forward and backward, and the backends against each other."""
    from llavavit.varlen_attention import usable_backends

    for name, case in attention_cases(context.small).items():
        rule = {key: case[key] for key in ("window", "softcap") if key in case}
        inputs = attention_inputs(context.device, **{key: case[key] for key in case if key not in ("causal", *rule)})
        case = {key: value for key, value in case.items() if key != "kv_heads"}
        for dtype, (output_limit, gradient_limit) in TOLERANCE.items():
            high = torch.float64 if dtype == torch.float32 else torch.float32
            expected, wanted = run_attention("reference", high, inputs, **case)
            backends = [backend for backend in usable_backends(inputs[0].to(dtype), **rule) if backend != "reference"]
            outs = {}
            for backend in backends:
                outs[backend], gradients = run_attention(backend, dtype, inputs, **case)
                # against the norm of v's: one key's weight is 1, and q's gradient 0
                worst = torch.stack([(a - b).norm() for a, b in zip(gradients, wanted, strict=True)]).amax()
                result.below(
                    f"{name}, {str(dtype).removeprefix('torch.')}, {backend}",
                    output=(relative(outs[backend].to(high), expected), output_limit),
                    gradients=((worst / wanted[2].norm()).item(), gradient_limit),
                )
            for a, b in itertools.combinations(backends, 2):
                difference = relative(outs[a].float(), outs[b].float())
                result.below(f"{name}, {str(dtype).removeprefix('torch.')}", **{f"{a}_{b}": (difference, output_limit)})
    half = usable_backends(torch.empty(1, 1, 64, dtype=torch.bfloat16, device=context.device))
    kernels = [backend for backend in half if backend not in ("sdpa", "reference")]
    expected = "torch_varlen among them" if context.device == "cuda" else "none on a CPU"
    holds = "torch_varlen" in kernels if context.device == "cuda" else not kernels
    result.test("kernels for bf16", holds, f"{', '.join(kernels) or 'none'}; expected {expected}")


# --- numbers ----------------------------------------------------------------------------------------------------------


def golden_differences(folder, device: str, attention: str) -> dict[str, float]:
    """{tensor of io.safetensors: largest difference} of one published encoder."""
    from safetensors.torch import load_file
    from transformers import AutoModel

    import llavavit  # noqa: F401  makes the model types known

    io = {name: value.to(device) for name, value in load_file(folder / "io.safetensors").items()}
    model = AutoModel.from_pretrained(folder, attn_implementation=attention).to(device).eval()
    found = {}
    for case in sorted({name.split(".")[0] for name in io}):
        inputs = {
            "pixel_values": io.get("video.pixel_values" if case.startswith("video") else f"{case}.pixel_values"),
            "visible_indices": io.get(f"{case}.visible_indices"),
            "patch_positions": io.get(f"{case}.patch_positions"),
            "hidden_states": io.get(f"{case}.hidden_states_in"),
            "grid_thw": torch.tensor([[4, 2, 3]]) if case == "packed_positions" else io.get(f"{case}.grid_thw"),
        }
        with torch.no_grad():
            out = model(**{name: x for name, x in inputs.items() if x is not None}, output_hidden_states=True)
        values = {"last_hidden_state": out.last_hidden_state, "pooler_output": out.pooler_output}
        for i, state in enumerate(out.hidden_states):
            values |= {f"hidden_states.{i}": state, f"hidden_states.{i - len(out.hidden_states)}": state}
        for leaf, value in values.items():
            if f"{case}.{leaf}" in io:
                found[f"{case}.{leaf}"] = (value - io[f"{case}.{leaf}"]).abs().max().item()
    return found


def sample_outputs(model, images, device: str):
    """Outputs of a small batch of mixed sizes: (last_hidden_state [N, D], pooler_output [S, D]) in float32."""
    with torch.no_grad():
        return [value.float() for value in sides.packed(model, [image.to(device, model.dtype) for image in images])]


@check("encoder_golden")
def encoder_golden(context: Context, result: Result):
    """The published encoders' values in float32; packed is padded image by image; bf16 against float32."""
    from llavavit import LlavaViTConfig, LlavaViTModel
    from llavavit.conversion import convert_config, convert_state_dict

    folders = sorted(path.parent for path in (context.root / "tests/golden/hevc_vit").glob("*/io.safetensors"))
    result.test("cases", len(folders) == 3, f"{len(folders)} published encoders, expected 3")
    for folder in folders:
        for attention in ("eager", "sdpa"):
            differences = golden_differences(folder, context.device, attention)
            worst = list(differences)[torch.tensor(list(differences.values())).argmax()]  # NaN counts as the largest
            label = f"{folder.name}, {attention}, {len(differences)} tensors"
            result.below(label, **{worst: (differences[worst], GOLDEN)})

    packed = sides.make_model("demo", context.device, torch.float32)
    padded = LlavaViTModel(convert_config(packed.config.to_dict(), LlavaViTConfig)).to(context.device).eval()
    padded.load_state_dict(convert_state_dict(packed.state_dict(), "padded"))
    sizes = sides.draw_sizes(8, 28, 140 if context.small else 448, packed.config.patch_size, seed=1)
    images = sides.draw_images(sizes, context.device, torch.float32, seed=2)
    states, pooled = sample_outputs(packed, images, context.device)
    with torch.no_grad():
        alone = [padded(image[None]) for image in images]
    expected_states = torch.cat([out.last_hidden_state[0] for out in alone])
    expected_pooled = torch.cat([out.pooler_output for out in alone])
    result.below(
        f"packed against padded, image by image, {len(sizes)} sizes",
        states=((states - expected_states).abs().max().item(), PACKED),
        pooled=((pooled - expected_pooled).abs().max().item(), PACKED),
    )
    low_states, low_pooled = sample_outputs(packed.to(torch.bfloat16), images, context.device)
    result.below(
        "bf16 against float32, relative",
        states=(relative(low_states, states), BF16),
        pooled=(relative(low_pooled, pooled), BF16),
    )
    if context.device == "cuda":
        result.test("no wait for the device", *runs_without_waiting(packed, images))


def runs_without_waiting(model, images) -> tuple[bool, str]:
    """Whether a forward and backward pass, its grid on the host, runs without the host ever waiting."""
    images = [image.to(model.dtype) for image in images]
    step = sides.make_step(sides.packed, model, [images], backward=True)
    waited = waits_of(lambda: step(0))
    return not waited, waited or "forward and backward of the packed model"


# --- speed ------------------------------------------------------------------------------------------------------------


@check("encoder_speed")
def encoder_speed(context: Context, result: Result):
    """Packed against one by one and padded: outputs equal; times, FLOP/s and memory, forward and forward + backward."""
    # (preset, images, least and most pixels, repeats)
    cases = [("demo", 8, 56, 112, 2)] if context.small else [("vit-l", 16, 224, 1008, 8), ("vit-l", 64, 224, 336, 8)]
    dtype = torch.float32 if context.device == "cpu" else torch.bfloat16
    rates = ceilings(context.device, context.small)
    matmul = next(rate for name, rate in rates.items() if name.startswith("matmul"))
    result.figure("device", **rates)
    result.figure("aims, on an H200", **AIMS, share_of_matmul_rate=MATMUL_SHARE_AIM)
    for preset, count, least, most, repeats in cases:
        model = sides.make_model(preset, context.device, dtype)
        sizes = sides.draw_sizes(count, least, most, model.config.patch_size, seed=0)
        lengths = [h * w // model.config.patch_size**2 for h, w in sizes]
        input_sets = [
            sides.draw_images(sizes, context.device, dtype, seed=1 + i) for i in range(1 if context.small else 2)
        ]
        shape = f"{preset}, {count} images of {least} to {most} px, {sum(lengths)} tokens"
        result.below(f"{shape}, outputs against packed", **sides.compare(model, input_sets[0]))
        flops = sides.forward_flops(model.config, lengths)
        for mode, backward in (("forward", False), ("forward + backward", True)):
            timed = sides.time_sides(model, input_sets, context.device, backward, repeats)
            for name, values in sides.figures(timed, flops * (3 if backward else 1), count, matmul).items():
                result.figure(f"{shape}, {mode}, {name}", **values)
