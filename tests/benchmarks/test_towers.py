"""The encoder's speed benchmark and its checks in the GPU suite, in their CPU mode; nothing here hangs on a time."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks"
TINY = ["--device", "cpu", "--images", "4", "--sizes", "28", "56", "--repeats", "2"]


@pytest.fixture
def bench(monkeypatch):
    """The modules towers and gpu_checks.sides."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("towers"), importlib.import_module("gpu_checks.sides")


@pytest.fixture
def batch(bench):
    """Demo encoder and images of mixed sizes."""
    _, sides = bench
    model = sides.make_model("demo", "cpu", torch.float32)
    return model, sides.draw_images([(28, 42), (56, 14), (14, 14), (28, 42)], "cpu", torch.float32, seed=1)


def test_report(bench, tmp_path, capsys):
    towers, _ = bench
    output = tmp_path / "deep" / "towers.json"
    assert towers.main([*TINY, "--output", str(output)]) == 0
    report, printed = json.loads(output.read_text()), capsys.readouterr().out
    assert report["equal"] is True and set(report["differences"]) == {"one_by_one", "padded"}
    assert all(0 <= value <= limit == 1e-4 for value, limit in report["differences"].values())
    assert report["hardware"]["device"] == "cpu" and report["versions"]["torch"] and report["commit"]
    assert report["options"]["images"] == 4 and report["options"]["sizes"] == [28, 56]
    tokens = report["shapes"]["tokens"]
    assert 4 * 4 <= tokens <= report["shapes"]["tokens_padded"] <= 4 * 16
    assert set(report["figures"]) == {"forward", "forward_backward"}
    for entries in report["figures"].values():
        assert list(entries) == ["packed", "one_by_one", "padded"]
        for entry in entries.values():
            assert entry["ms_min"] <= entry["ms"] <= entry["ms_max"] and entry["images_per_s"] > 0
            assert entry["images_per_s"] == pytest.approx(4000 / entry["ms"], rel=1e-3)
        assert entries["packed"]["packed_is_faster_by"] == 1
        ratio = entries["padded"]["ms"] / entries["packed"]["ms"]
        assert entries["padded"]["packed_is_faster_by"] == pytest.approx(ratio, rel=1e-3)
        # the same useful work for every side
        work = [entry["tflops"] * entry["ms"] for entry in entries.values()]
        assert work == pytest.approx([work[0]] * 3, rel=1e-3)
    times = [report["figures"][mode]["packed"] for mode in report["figures"]]
    assert times[1]["tflops"] * times[1]["ms"] == pytest.approx(3 * times[0]["tflops"] * times[0]["ms"], rel=1e-3)
    for line in ("one by one against packed", "padded, mask against packed", "forward + backward", "of matmul"):
        assert line in printed


def test_padded_side_hides_the_padding(bench, batch):
    """Equal to the packed one, gradients too; without the mask it would not be."""
    _, sides = bench
    model, images = batch
    found = {}
    for name, side in sides.SIDES.items():
        states, pooled = side(model, images)
        assert states.shape == (6 + 4 + 1 + 6, 96) and pooled.shape == (4, 96)
        model.zero_grad()
        (states.square().sum() + pooled.sum()).backward()
        found[name] = [states, pooled, *(parameter.grad for parameter in model.parameters())]
    for name in ("one_by_one", "padded"):
        for a, b in zip(found[name], found["packed"], strict=True):
            assert (a - b).abs().max() <= 1e-5 * b.abs().max().clamp(min=1), name


@pytest.mark.parametrize("fault", ["no mask", "NaN"])
def test_unequal_sides_are_an_error(bench, tmp_path, monkeypatch, capsys, fault):
    towers, sides = bench
    if fault == "no mask":
        attention = torch.nn.functional.scaled_dot_product_attention
        monkeypatch.setattr(
            sides.F, "scaled_dot_product_attention", lambda q, k, v, mask=None, *rest, **kw: attention(q, k, v, **kw)
        )
    else:
        plain = sides.padded

        def one_not_a_number(model, images):
            states, pooled = plain(model, images)
            return states, pooled * float("nan")

        monkeypatch.setitem(sides.SIDES, "padded", one_not_a_number)
    output = tmp_path / "towers.json"
    assert towers.main([*TINY, "--output", str(output)]) == 1
    assert json.loads(output.read_text())["equal"] is False
    assert "error: the sides' outputs differ" in capsys.readouterr().err


def test_what_does_not_fit_is_said(bench, tmp_path, monkeypatch, capsys):
    towers, sides = bench
    plain = sides.padded

    def padded(model, images):
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("out of memory. Tried to allocate 9 GiB.")
        return plain(model, images)

    monkeypatch.setitem(sides.SIDES, "padded", padded)
    output = tmp_path / "towers.json"
    assert towers.main([*TINY, "--output", str(output)]) == 0
    figures = json.loads(output.read_text())["figures"]
    assert figures["forward"]["padded"]["ms"] > 0
    assert figures["forward_backward"]["padded"] == {"out_of_memory": "out of memory"}
    assert figures["forward_backward"]["packed"]["ms"] > 0
    assert "out of memory" in capsys.readouterr().out


def test_flops_are_those_of_the_matrix_products(bench, batch, monkeypatch):
    """Every product of a forward pass, seen as it is made, without those of the pooled vectors."""
    _, sides = bench
    model, images = batch
    counted = []

    def linear(module, inputs, output):
        counted.append(2 * inputs[0].numel() * output.shape[-1])

    for name, module in model.named_modules():
        if name == "patch_embed.proj" or (isinstance(module, torch.nn.Linear) and not name.startswith("head")):
            module.register_forward_hook(linear)
    layers = importlib.import_module("llavavit.layers")
    plain = layers.varlen_attention

    def attention(q, k, v, cu_seqlens, *args, cu_seqlens_k=None, **options):
        if cu_seqlens_k is None:  # not the pooling
            counted.append(4 * q.shape[1] * q.shape[2] * int(cu_seqlens.diff().square().sum()))
        return plain(q, k, v, cu_seqlens, *args, cu_seqlens_k=cu_seqlens_k, **options)

    monkeypatch.setattr(layers, "varlen_attention", attention)
    sides.packed(model, images)
    keys_and_values = 2 * 17 * 96 * 2 * 96
    assert sides.forward_flops(model.config, [6, 4, 1, 6]) == sum(counted) + keys_and_values
    assert len(counted) == 1 + 4 * 5


def test_sizes_are_drawn_among_multiples(bench):
    _, sides = bench
    sizes = sides.draw_sizes(500, 50, 115, 14, seed=0)
    assert {value for size in sizes for value in size} == {56, 70, 84, 98, 112}
    assert any(height != width for height, width in sizes)
    assert sizes == sides.draw_sizes(500, 50, 115, 14, seed=0) != sides.draw_sizes(500, 50, 115, 14, seed=1)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--images", "0"], "--images 0"),
        (["--repeats", "0"], "--repeats 0"),
        (["--sizes", "15", "27"], "--sizes 15 27: no multiple of the patch, 14"),
        (["--sizes", "112", "56"], "--sizes 112 56"),
    ],
)
def test_options_refused(bench, tmp_path, flags, message):
    towers, _ = bench
    with pytest.raises(SystemExit, match=message):
        towers.main([*TINY, *flags, "--output", str(tmp_path / "x.json")])


def test_help_loads_nothing_heavy():
    code = "import sys, towers; towers.build_parser().format_help(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=FOLDER).returncode == 0


# --- the checks of the GPU suite --------------------------------------------------------------------------------------

CHECKS = ["varlen_attention", "encoder_golden", "encoder_speed"]


def run_suite(folder, *names):
    suite = importlib.import_module("gpu_suite")
    output = folder / "out.json"
    status = suite.main(["--device", "cpu", "--output", str(output), "--workdir", str(folder), "--only", *names])
    return status, {entry["name"]: entry for entry in json.loads(output.read_text())["checks"]}


def test_checks_pass(bench, tmp_path):
    status, found = run_suite(tmp_path, *CHECKS)
    assert status == 0 and list(found) == CHECKS
    labels = {name: [test["label"] for test in entry["tests"]] for name, entry in found.items()}
    assert {"causal, more keys, float16, sdpa", "grouped, causal, window, soft cap, float32, sdpa"} < set(
        labels["varlen_attention"]
    )
    assert len(labels["varlen_attention"]) == 28
    assert "llava_vit_tiny, eager, 10 tensors" in labels["encoder_golden"] and len(labels["encoder_golden"]) == 9
    (speed,) = labels["encoder_speed"]
    assert speed.startswith("demo, 8 images of 56 to 112 px") and speed.endswith("outputs against packed")
    assert len(found["encoder_speed"]["figures"]) == 2 + 1 + 6  # device, aims, outputs, two modes of three sides


@pytest.mark.parametrize("fault", [1.01, float("nan")])
def test_checks_fail_on_wrong_attention(bench, tmp_path, monkeypatch, fault):
    backends = importlib.import_module("llavavit.varlen_attention").BACKENDS
    plain = backends["sdpa"]
    monkeypatch.setitem(backends, "sdpa", lambda *args: plain(*args) * fault)
    status, found = run_suite(tmp_path, "varlen_attention", "encoder_golden")
    assert status == 1 and not found["varlen_attention"]["passed"] and not found["encoder_golden"]["passed"]
    failed = [test["label"] for test in found["encoder_golden"]["tests"] if not test["passed"]]
    assert [label.split(",")[0] for label in failed if ", sdpa, " in label] == [
        "llava_vit_packing_tiny",
        "llava_vit_tiny",
        "onevision_encoder_tiny",
    ]
    assert not [label for label in failed if ", eager, " in label]
