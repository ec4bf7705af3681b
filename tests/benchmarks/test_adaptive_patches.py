"""The benchmark of adaptive patches and its checks in the GPU suite, in tiny shapes; nothing here hangs on a time."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks"
CASES = ["none", "budget 1.0", "budget 0.7", "budget 0.5", "budget 0.3", "budget 0.2", "v1", "v2 1.0", "v2 0.7"]
TINY = ["--device", "cpu", "--preset", "small", "--repeats", "1", "--max-pixels", "12544"]


@pytest.fixture
def bench(monkeypatch):
    """The modules adaptive_patches, gpu_checks.adaptive_bench and gpu_checks.qwen2_vl."""
    monkeypatch.syspath_prepend(str(FOLDER))
    names = ("adaptive_patches", "gpu_checks.adaptive_bench", "gpu_checks.qwen2_vl")
    modules = [importlib.import_module(name) for name in names]
    monkeypatch.setattr(modules[1], "free_memory", lambda device: None)
    return modules


@pytest.fixture
def pictures(tmp_path):
    """Files of two sizes: noise beside one colour."""
    paths = []
    for width, height in ((168, 112), (84, 112)):
        pixels = np.full((height, width, 3), 120, np.uint8)
        pixels[:, : width // 2] = np.random.default_rng(0).integers(0, 256, (height, width // 2, 3))
        paths.append(tmp_path / f"{width}.png")
        Image.fromarray(pixels).save(paths[-1])
    return [str(path) for path in paths]


def run(script, folder, *flags):
    """(exit status, JSON)."""
    output = folder / "deep" / "adaptive.json"
    status = script.main([*TINY, "--output", str(output), *flags])
    return status, json.loads(output.read_text())


def test_report_and_chart(bench, tmp_path, capsys):
    script, module, _ = bench
    quality = [
        {"selection": None, "alpha": None, "exact_match": 0.9, "n": 7, "vision_tokens": 64, "llm_tokens": 16},
        {"selection": "budget", "alpha": 0.3, "exact_match": 0.625, "n": 7, "vision_tokens": 20, "llm_tokens": 9},
        {"selection": "budget", "alpha": 0.25, "exact_match": 0.5, "n": 7, "vision_tokens": 20, "llm_tokens": 9},
    ]
    (tmp_path / "quality.json").write_text(json.dumps({"rows": quality}))
    status, report = run(script, tmp_path, "--quality", str(tmp_path / "quality.json"))
    assert status == 0 and report["passed"] is True
    assert report["hardware"]["device"] == "cpu" and report["versions"]["torch"] and report["commit"]
    assert list(report["figures"]) == ["china.jpg", "flower.jpg", "page of text"]
    for found in report["figures"].values():
        assert list(found) == CASES
        for name, entry in found.items():
            for phase in module.PHASES:
                assert 0 <= entry[phase]["ms_min"] <= entry[phase]["ms"] <= entry[phase]["ms_max"]
            parts = entry["vision"]["ms"] + entry["prefill"]["ms"]
            assert 0 < parts <= entry["model"]["ms"] and entry["selection"]["ms"] <= entry["processing"]["ms"]
            both = entry["processing"]["ms"] + entry["model"]["ms"]
            assert entry["request"]["ms"] == pytest.approx(both, abs=1e-2)
            assert (entry["selection"]["ms"] == 0) == (name == "none")
            slower = entry["model"]["ms"] + entry["selection"]["ms"]
            assert entry["faster_by"] == pytest.approx(found["none"]["model"]["ms"] / slower, rel=1e-2, abs=1e-3)
            of_allowed = pytest.approx(entry["faster_by"] / entry["allowed"], rel=1e-2, abs=1e-3)  # stored to 3 places
            assert entry["of_allowed"] == of_allowed
        tokens = [found[case]["vision_tokens"]["by_hand"] for case in CASES[1:6]]
        base, budgets = found["none"]["base_patches"], (1.0, 0.7, 0.5, 0.3)
        assert tokens[0] == base and tokens == sorted(tokens, reverse=True)
        assert all(0 <= round(alpha * base) - count <= 2 for alpha, count in zip(budgets, tokens, strict=False))
        assert found["none"]["allowed"] == found["budget 1.0"]["allowed"] == 1 < found["budget 0.3"]["allowed"]
        assert found["budget 1.0"]["difference_from_none"] <= 1e-5
        assert [case for case in CASES if "quality" in found[case]] == ["none", "budget 0.3"]
        assert found["budget 0.3"]["quality"]["exact_match"] == 0.625
    printed = capsys.readouterr().out
    for line in ("page of text (476x616; 27 text tokens)", "0.625", "selection's largest share", "PASS china.jpg, "):
        assert line in printed
    with Image.open(tmp_path / "deep" / "adaptive.png") as chart:
        colours = {colour for _, colour in chart.getcolors(1 << 20)}
    assert set(importlib.import_module("gpu_checks.chart").COLOURS) <= colours


def test_own_pictures_in_a_batch(bench, pictures, tmp_path):
    script, _, _ = bench
    status, report = run(script, tmp_path, "--images", *pictures, "--rows", "2", "--plot", str(tmp_path / "x.png"))
    assert status == 0 and (tmp_path / "x.png").is_file()
    assert list(report["figures"]) == ["168.png, 2 in a batch", "84.png, 2 in a batch"]
    assert report["options"]["images"] == pictures


def test_batches_count_twice(bench, pictures):
    _, module, parts = bench
    made = module.Bench("cpu", "small", None, torch.float32)
    entry = made.counts(parts.load_pictures([Path(pictures[0])])["168.png"], ("budget", 0.3))
    one, two = made.flops(entry, 1), made.flops(entry, 2)
    assert two == {name: 2 * value for name, value in one.items()}


def test_operations_are_those_of_the_products(bench, pictures, monkeypatch):
    """Every product of a forward pass, seen as it is made; the output layer at one position."""
    _, module, parts = bench
    made = module.Bench("cpu", "small", None, torch.float32)
    picture = parts.load_pictures([Path(pictures[0])])["168.png"]
    inputs, counted = made.inputs(picture, ("budget", 0.5)), {"vision": 0, "llm": 0}

    def product(part):
        def seen(layer, args, out):
            each = layer.weight[0].numel()
            counted[part] += 2 * each * out.numel()

        return seen

    attention = torch.nn.functional.scaled_dot_product_attention

    def attend(q, k, v, *args, is_causal=False, **options):
        *_, queries, width = q.shape
        heads = q.shape[0] * q.shape[1]
        counted["llm" if is_causal else "vision"] += 4 * heads * width * queries**2 // (2 if is_causal else 1)
        return attention(q, k, v, *args, is_causal=is_causal, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    for name, layer in made.model.named_modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv3d)):
            layer.register_forward_hook(product("vision" if "visual" in name else "llm"))
    with torch.no_grad():
        made.model(**inputs, logits_to_keep=1)
    patches, tokens = len(inputs["pixel_values"]), inputs["input_ids"].shape[1]
    merged = int((inputs["input_ids"] == made.config.image_token_id).sum())
    assert 0 < merged < 24 and patches < 96  # something was merged
    assert parts.vision_flops(made.config, [patches], merged) == counted["vision"]
    assert parts.llm_flops(made.config, [tokens]) == counted["llm"]


def test_operations_by_hand(bench):
    """One layer each: two images of 4 and 8 patches, 3 merged tokens; rows of 5 and 7 tokens."""
    _, _, parts = bench
    config = parts.make_config("small", layers=1)
    config.vision_config.depth = 1
    patches = 2 * (3 * 2 * 14 * 14) * 64 * 12
    blocks = (2 * 64 * 192 + 2 * 64 * 64 + 2 * 2 * 64 * 128) * 12 + 4 * 64 * (4 * 4 + 8 * 8)
    assert parts.vision_flops(config, [4, 8], 3) == patches + blocks + (2 * 256 * 256 + 2 * 256 * 64) * 3
    weights = 2 * 64 * 64 + 2 * 64 * 64 + 2 * 2 * 64 * 32 + 3 * 2 * 64 * 128  # q, output, k and v, MLP
    expected = weights * 12 + 2 * 64 * (25 + 49) + 2 * (2 * 512 * 64)
    assert parts.llm_flops(config, [5, 7]) == expected


def test_published_shape(bench):
    _, _, parts = bench
    config = parts.make_config("qwen2-vl-7b")
    with torch.device("meta"):
        model = importlib.import_module("llava.model.qwen2_vl").AdaptiveQwen2VLForConditionalGeneration(config)
    assert sum(value.numel() for value in model.parameters()) == 8_291_375_616  # as the published checkpoint says
    assert config.text_config.rope_parameters["mrope_section"] == [16, 24, 24]


def test_tokens_by_hand(bench, pictures):
    """A picture of 8x12 base patches, its right half one colour."""
    _, module, parts = bench
    made = module.Bench("cpu", "small", None, torch.float32)
    picture = parts.load_pictures([Path(pictures[0])])["168.png"]
    none, v1 = (made.counts(picture, case) for case in ((None, None), ("v1", None)))
    assert none["vision_tokens"] == dict.fromkeys(("processor", "model", "by_hand"), 96)
    assert none["image_tokens"] == dict.fromkeys(("processor", "model", "by_hand"), 24)
    # 6 columns of noise are 48 base patches in 12 cells; of the other 6, 2 are in 28-pixel and 4 in 56-pixel patches
    assert v1["vision_tokens"] == dict.fromkeys(("processor", "model", "by_hand"), 48 + 4 + 2)
    assert v1["image_tokens"] == dict.fromkeys(("processor", "model", "by_hand"), 12 + 4 + 2)
    assert v1["llm_tokens"] == 18 + 27


def entries(bench, **changes):
    counts = dict.fromkeys(("processor", "model", "by_hand"), 16)
    entry = {
        "vision_tokens": counts,
        "image_tokens": dict(counts),
        "difference_from_none": 0.0,
        "levels_unequal_on_device": 0,
    }
    return {"budget 1.0": entry | changes}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [True, True]),
        ({"vision_tokens": {"processor": 16, "model": 15, "by_hand": 16}}, [False, True]),
        ({"image_tokens": {"processor": 16, "model": 16, "by_hand": 4}}, [False, True]),
        ({"levels_unequal_on_device": 1}, [False, True]),
        ({"difference_from_none": 1e-4}, [True, False]),
        ({"difference_from_none": math.nan}, [True, False]),
    ],
)
def test_verdicts(bench, changes, expected):
    _, module, _ = bench
    found = module.verdicts(entries(bench, **changes), torch.float32)
    assert [holds for _, holds, _ in found] == expected


def rounds(*ms, selection=0.0):
    return [{"model": each / 1000, "request": each / 1000, "selection": selection / 1000} for each in ms]


def test_ratios_and_aims(bench):
    """Each request against the one of its round: in the second the machine is half as fast, in the third busy once."""
    _, module, _ = bench
    found = {case: {"flops": {"vision": 60.0, "llm": 40.0}} for case in module.CASES}  # as if out of memory
    for case, allowed in ((("budget", 0.5), 2.0), (("budget", 0.3), 2.5), (("budget", 0.2), 2.4)):
        found[case]["flops"] = {"vision": 60.0 / allowed, "llm": 40.0 / allowed}
    seconds = {
        (None, None): rounds(100, 200, 100),
        ("budget", 0.5): rounds(60, 120, 500, selection=2),
        ("budget", 0.3): rounds(40, 80, 40, selection=10),
        ("budget", 0.2): rounds(39, 78, 39),
    }
    module.add_ratios(found, seconds)
    named = {module.case_name(*case): entry for case, entry in found.items()}
    entry = named["budget 0.3"]
    assert entry["model_faster_by"] == 2.5 and entry["faster_by"] == 2.0 and entry["of_allowed"] == 0.8
    assert entry["request_faster_by"] == 2.5 and entry["selection_share"] == 0.25 and entry["allowed"] == 2.5
    assert "faster_by" not in named["v1"]
    on_cpu = {aim["aim"]: (aim["expected"], aim["found"], aim["reached"]) for aim in module.aims(named, "cpu")}
    assert on_cpu == {  # at 0.2 the operations do not allow what is published
        "budget 0.5, request faster by": (1.3, 1.6667, True),
        "budget 0.3, request faster by": (2.0, 2.5, True),
        "selection's largest share of the request": (0.03, 0.25, False),
    }
    on_cuda = {aim["aim"]: aim["reached"] for aim in module.aims(named, "cuda")}
    assert on_cuda["budget 0.3, of what the operations allow"] is False
    assert on_cuda["budget 0.2, of what the operations allow"] is True


def test_different_outputs_are_an_error(bench, pictures, tmp_path, monkeypatch, capsys):
    from llava.model.qwen2_vl.layout import PatchLayout

    plain = PatchLayout.from_levels.__func__

    def shifted(cls, levels, grids):
        layout = plain(cls, levels, grids)
        layout.centres += torch.arange(len(layout.centres))[:, None] % 3
        return layout

    monkeypatch.setattr(PatchLayout, "from_levels", classmethod(shifted))
    script, module, _ = bench
    monkeypatch.setattr(module, "SAME", 1e-7)  # weights this small hardly show it in the logits
    status, report = run(script, tmp_path, "--images", pictures[0])
    assert status == 1 and [verdict["passed"] for verdict in report["verdicts"]] == [True, False]
    assert "error: a verdict failed" in capsys.readouterr().err


def test_what_does_not_fit_is_said(bench, pictures, tmp_path, monkeypatch, capsys):
    script, module, _ = bench
    plain = module.Bench.request

    def request(self, picture, case, rows):
        if case == ("v1", None):
            raise torch.OutOfMemoryError("out of memory. Tried to allocate 9 GiB.")
        return plain(self, picture, case, rows)

    monkeypatch.setattr(module.Bench, "request", request)
    status, report = run(script, tmp_path, "--images", pictures[0])
    assert status == 0 and report["figures"]["168.png"]["v1"]["out_of_memory"] == "out of memory"
    assert report["figures"]["168.png"]["v2 1.0"]["request"]["ms"] > 0
    assert "out of memory" in capsys.readouterr().out


def test_options_refused(bench, tmp_path):
    script, _, _ = bench
    (tmp_path / "list.json").write_text('[{"selection": "v1"}]')
    (tmp_path / "text.json").write_text("no JSON")
    for flags, message in (
        (["--repeats", "0"], "--repeats 0"),
        (["--clock", "cpu", "--device", "cuda"], "--clock cpu"),
        (["--rows", "1", "0"], r"--rows \[1, 0\]: expected at least 1"),
        (["--max-pixels", "3000"], "--max-pixels 3000: expected at least 3136"),
        (["--preset", "giant"], "size 'giant': expected one of small"),
        (["--images", str(tmp_path / "none.png")], "none.png: not read as a picture"),
        (["--quality", str(tmp_path / "none.json")], "none.json"),
        (["--quality", str(tmp_path / "text.json")], "text.json"),
        (["--quality", str(tmp_path / "list.json")], "list.json: expected a list of rows with alpha, exact_match"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(script, tmp_path, *flags)


def test_page_of_text_is_always_the_same(bench):
    _, _, parts = bench
    page = np.asarray(parts.text_page())
    assert page.shape == (616, 476, 3) and np.array_equal(page, parts.text_page())
    dark = (page[..., 0] < 128).mean()
    assert 0.03 < dark < 0.3 and (page[:28] == 255).all()


def test_bars_are_as_high_as_their_values(bench, tmp_path):
    chart = importlib.import_module("gpu_checks.chart")
    panels = [chart.Panel("one", ["a", "b", "c"], {"x": [1.0, 2.0, None], "y": [4.0, None, 2.0]})]
    chart.draw(panels, "title", tmp_path / "a" / "chart.png")
    with Image.open(tmp_path / "a" / "chart.png") as image:
        pixels = np.asarray(image)
    bars = []
    for colour in chart.COLOURS[:2]:
        columns = (pixels[100:] == colour).all(-1).sum(0)  # below the legend
        runs = np.split(columns, np.flatnonzero(columns == 0))
        bars.append([run.max() for run in runs if run.any()])
    (one, two), (four, other) = bars
    assert two == other and two / one == pytest.approx(2, rel=0.05) and four / two == pytest.approx(2, rel=0.05)


def test_help_loads_nothing_heavy():
    code = "import sys, adaptive_patches as a; a.build_parser().format_help(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=FOLDER).returncode == 0


# --- the checks of the GPU suite --------------------------------------------------------------------------------------

CHECKS = ["adaptive_selection", "adaptive_equals_stock", "adaptive_speed"]


def run_suite(folder, *names):
    suite = importlib.import_module("gpu_suite")
    output = folder / "out.json"
    status = suite.main(["--device", "cpu", "--output", str(output), "--workdir", str(folder), "--only", *names])
    return status, {entry["name"]: entry for entry in json.loads(output.read_text())["checks"]}


def test_checks_pass(bench, tmp_path):
    status, found = run_suite(tmp_path, *CHECKS)
    assert status == 0 and list(found) == CHECKS
    assert [len(found[name]["tests"]) for name in CHECKS] == [6, 7, 2]
    assert "24 selections of two pictures; different: none" in found["adaptive_selection"]["tests"][1]["text"]
    figures = found["adaptive_speed"]["figures"]
    assert len(figures) == 1 + len(CASES)
    none = next(entry for name, entry in figures.items() if name.endswith("; none"))
    assert none["vision_tokens"] == 256 and none["image_tokens"] == 64 and none["request_ms"] > 0


def test_selection_check_fails_where_sides_differ(bench, tmp_path, monkeypatch):
    """An entropy that depends on how the work is cut."""
    importance = importlib.import_module("llava.model.adaptive_patches.importance")
    tokenizer = importlib.import_module("llava.model.adaptive_patches.tokenizer")
    plain = importance.patch_entropy

    def drifting(*args, **options):
        shift = 1e-3 * (importance.CPU_ENTRIES == 1 << 14)
        return {size: values * (1 - shift) for size, values in plain(*args, **options).items()}

    monkeypatch.setitem(tokenizer.IMPORTANCES, "entropy", drifting)
    status, found = run_suite(tmp_path, "adaptive_selection")
    assert status == 1
    assert [test["passed"] for test in found["adaptive_selection"]["tests"]][:1] == [False]
    assert all(test["passed"] for test in found["adaptive_selection"]["tests"][2:])


def test_stock_check_fails_on_other_places(bench, tmp_path, monkeypatch):
    from llava.model.qwen2_vl.layout import PatchLayout

    plain = PatchLayout.from_levels.__func__

    def turned(cls, levels, grids):
        layout = plain(cls, levels, grids)
        layout.centres = layout.centres.flip(0)
        return layout

    monkeypatch.setattr(PatchLayout, "from_levels", classmethod(turned))
    status, found = run_suite(tmp_path, "adaptive_equals_stock")
    tests = {test["label"]: test["passed"] for test in found["adaptive_equals_stock"]["tests"]}
    assert status == 1 and tests["none against transformers, float32"]
    assert not tests["budget 1.0 against transformers, float32"]
