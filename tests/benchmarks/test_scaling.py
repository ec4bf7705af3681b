"""The cost model's arithmetic, by hand, against published sizes and against the step that it is calibrated by."""

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks"
ALL = frozenset({"mm_vision_tower", "mm_mlp_adapter", "mm_language_model"})
CLIP = "openai/clip-vit-large-patch14-336"


@pytest.fixture
def costs(monkeypatch):
    """The modules facts, model and recipes."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return [importlib.import_module(f"costs.{name}") for name in ("facts", "model", "recipes")]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("scaling")


@pytest.fixture
def small(costs):
    """A LLaVA of a few weights: hidden 8, MLP 16, 2 layers, 10 words; CLIP's encoder as published."""
    values = dict(model_type="qwen2", hidden_size=8, intermediate_size=16, num_hidden_layers=2, vocab_size=10)
    values |= dict(num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False)
    vision = {"mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_projector_type": "mlp2x_gelu"}
    return costs[2].llava_model(values, CLIP, **vision)[0]


LANGUAGE = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16) + 2 * 10 * 8
TOWER = 588 * 1024 + 23 * (4 * 1024**2 + 2 * 1024 * 4096)
PROJECTOR = 1024 * 8 + 8 * 8


def test_weights_by_hand(costs, small):
    _, model, _ = costs
    expected = {"mm_language_model": LANGUAGE, "mm_vision_tower": TOWER, "mm_mlp_adapter": PROJECTOR}
    assert model.parameters(small) == expected
    plan = model.Plan(None, 8, frozenset({"mm_mlp_adapter"}))
    assert model.trained_weights(small, plan) == PROJECTOR
    assert model.all_weights(small, plan) == LANGUAGE + TOWER + PROJECTOR
    lora = model.Plan(None, 8, frozenset({"mm_mlp_adapter", "mm_language_model"}), lora_rank=3)
    adapters = 2 * 3 * (2 * 16 + 2 * 12 + 3 * 24)
    assert model.trained_weights(small, lora) == PROJECTOR + adapters
    assert model.all_weights(small, lora) == LANGUAGE + TOWER + PROJECTOR + adapters


def test_weights_of_published_models(costs):
    """Within a thousandth: biases and norms are left out."""
    from transformers import AutoConfig

    facts, model, _ = costs
    assert len(facts.MODELS) >= 7
    for name, published in facts.MODELS.items():
        found = sum(model.parameters(AutoConfig.for_model(**published.values)).values())
        assert found == pytest.approx(published.parameters, rel=1e-3), name


@pytest.mark.parametrize(
    ("zero", "offload", "weights", "gradients", "optimizer", "buffers"),
    [
        (None, False, 4 * 6e9 + 2 * 2e9, 4 * 6e9, 8 * 6e9, 0),
        (0, False, 16e9, 12e9, 72e9, 1e9),
        (1, False, 16e9, 12e9, 18e9, 1e9),
        (2, False, 16e9, 3e9, 18e9, 1e9),
        (3, False, 4e9, 3e9, 18e9, 1e9 + 2e9),
        (3, True, 0, 3e9, 0, 1e9 + 2e9),
    ],
)
def test_states_by_hand(costs, zero, offload, weights, gradients, optimizer, buffers):
    """8e9 weights of which 6e9 learn, on four devices."""
    plan = costs[1].Plan(None, 4, ALL, zero=zero, offload=offload)
    expected = {"weights": weights, "gradients": gradients, "optimizer": optimizer, "buffers": buffers}
    assert costs[1].state_bytes(8 * 10**9, 6 * 10**9, plan) == expected


def test_activations_by_hand(costs, small):
    _, model, _ = costs
    shape = model.shape_of(small)
    text, picture = 4 * 8 + 3 * 8 + 3 * 4 + 4 * 16, 8 * 1024 + 2 * 4096
    assert model.language_values(shape.language) == text and model.vision_values(shape.vision) == picture
    batch, plan = model.Batch([30, 20], [576] * 3), model.Plan(None, 8, ALL, checkpointing=False)
    assert model.activation_bytes(shape, batch, plan, 1.5) == 3 * (2 * text * 50 + 23 * picture * 3 * 577)
    frozen = replace(plan, parts=ALL - {"mm_vision_tower"})
    assert model.activation_bytes(shape, batch, frozen, 1.5) == 3 * 2 * text * 50
    again = replace(plan, checkpointing=True)
    inputs = 2 * (2 * 8 * 50 + 23 * 1024 * 3 * 577)
    assert model.activation_bytes(shape, batch, again, 1.5) == inputs + 3 * picture * 3 * 577
    assert model.activation_bytes(shape, batch, replace(again, zero=None), 1.5) == 2 * inputs + 3 * picture * 3 * 577
    assert model.logit_bytes(1000, 12) == 120_000


def test_the_measured_step(costs):
    """Without checkpointing exactly, which the factor is from; with it the sum of all is a little above the peak."""
    facts, model, recipes = costs
    config, measured = recipes.measured_config(), facts.MEASURED
    assert sum(model.parameters(config).values()) == pytest.approx(measured.parameters, rel=0.01)
    assert 1 < model.activation_factor() < 2
    batch = model.Batch([measured.tokens // 4] * 4, [576] * measured.crops, supervised=measured.supervised)
    plan = model.Plan(facts.GPUS["h100-80"], 1, ALL, zero=None, checkpointing=False)
    assert model.memory(config, batch, plan)["total"] / 2**30 == pytest.approx(measured.gib, rel=0.01)
    again = replace(plan, checkpointing=True)
    found = model.memory(config, batch, again)["total"] / 2**30
    assert measured.gib_checkpointing <= found <= 1.2 * measured.gib_checkpointing
    # 423 and 525 ms were measured
    assert model.step(config, batch, plan)["step_s"] == pytest.approx(0.423, rel=0.05)
    assert model.step(config, batch, again)["step_s"] == pytest.approx(0.525, rel=0.05)


def test_communication_by_hand(costs, small):
    facts, model, _ = costs
    gpu, weights, layers = facts.GPUS["a100-80"], LANGUAGE + TOWER + PROJECTOR, 2 + 23
    plan = model.Plan(gpu, 8, ALL, zero=3, accumulation=2)
    sent, seconds = model.communication(small, plan)
    assert sent == pytest.approx(2 * 6 * weights * 7 / 8)  # gathered twice, reduced once, of two micro-batches
    assert seconds == pytest.approx(sent / 240e9 + 2 * 3 * layers * 10e-6)
    sent, seconds = model.communication(small, replace(plan, devices=16))
    assert sent == pytest.approx(2 * 6 * weights * 15 / 16)
    assert seconds == pytest.approx(sent / 160e9 + 2 * 3 * layers * 30e-6)  # eight cards of 25 GB/s, 80% of them
    projector = replace(plan, parts=frozenset({"mm_mlp_adapter"}), zero=2)
    assert model.communication(small, projector)[0] == pytest.approx((2 * 2 + 2) * PROJECTOR * 7 / 8)
    plain = replace(plan, zero=None)
    assert model.communication(small, plain)[0] == pytest.approx(8 * weights * 7 / 8)
    assert model.communication(small, replace(plan, devices=1)) == (0, 0)


def test_a_step_by_hand(costs, small, monkeypatch):
    """Communication costs what does not fit beside half of the computing."""
    facts, model, _ = costs
    monkeypatch.setattr(model, "step_flops", lambda *args, **more: 312e12 * 0.21)  # a second
    monkeypatch.setattr(model, "communication", lambda *args: (5.0, 2.5))
    plan = model.Plan(facts.GPUS["a100-80"], 16, ALL, accumulation=2)
    found = model.step(small, model.Batch([5, 6, 7]), plan)
    assert found["computing_s"] == pytest.approx(2) and found["step_s"] == pytest.approx(3.5)
    assert found["samples_per_s"] == pytest.approx(3 * 2 * 16 / 3.5) and found["efficiency"] == pytest.approx(2 / 3.5)
    monkeypatch.setattr(model, "communication", lambda *args: (5.0, 0.9))
    assert model.step(small, model.Batch([5]), plan)["step_s"] == pytest.approx(2)


@pytest.mark.parametrize(
    ("name", "visual", "patches"),
    [
        ("finetune_next", 576 + 36 * 49, [576] * 5),  # 672 x 504 of 2 x 2 crops
        ("pretrain_blip558k", 576, [576]),
        ("finetune_native", 17 * (23 + 1), [34 * 46]),  # 644 x 476, a newline after each row
    ],
)
def test_recipes(costs, monkeypatch, name, visual, patches):
    monkeypatch.chdir(ROOT)
    facts, _, recipes = costs
    recipe = recipes.read_recipe(f"configs/train/{name}.yaml", facts.GPUS["a100-80"], 8)
    rows = {"pretrain_blip558k": 16}.get(name, 4)
    text = 30 if rows == 16 else 300
    assert recipe.usual.tokens == [visual + text] * rows and recipe.usual.patches == patches * rows
    assert recipe.plan.zero == 3 and recipe.plan.checkpointing and not recipe.plan.offload
    assert recipe.plan.parts == (frozenset({"mm_mlp_adapter"}) if rows == 16 else ALL)
    assert recipe.plan.accumulation * rows * 8 == recipe.global_batch == (512 if rows == 16 else 128)
    assert sum(recipe.largest.tokens) > sum(recipe.usual.tokens)


def test_towers_of_the_table(costs, monkeypatch):
    """DINOv2 at 336 has the tokens of CLIP at 336; SigLIP 2 sees 640 x 480 in patches of 16, or shrinks it to fit."""
    monkeypatch.chdir(ROOT)
    facts, model, recipes = costs

    def read(tower, *flags):
        argv = ["configs/train/finetune_next.yaml", "--tower", f"configs/towers/{tower}.yaml", *flags]
        return recipes.read_run(argv, tower, facts.GPUS["a100-80"], 8)

    clip, dino = read("clip_l336"), read("dinov2_l")
    assert dino.usual == clip.usual and dino.largest == clip.largest
    # hub: 304.4M with 1.4M positions and a layer more than the 23 that are used, of 4 C^2 + 8 C^2 each
    assert model.parameters(dino.config)["mm_vision_tower"] == 588 * 1024 + 23 * 12 * 1024**2
    native = "--image_aspect_ratio", "native", "--max_pixels"
    assert read("siglip2_so400m_naflex", *native, "564480").usual.patches == [40 * 30] * 4
    assert max(read("siglip2_so400m_naflex", *native, "65536").usual.patches) <= 256


def test_what_breaks(costs, monkeypatch):
    monkeypatch.chdir(ROOT)
    facts, _, recipes = costs
    recipe = recipes.read_recipe("configs/train/finetune_next.yaml", facts.GPUS["a100-80"], 8)
    held = recipes.fit(recipe, 1e6, 0.95)
    assert held["breaks"] == []
    assert held["hours"] == pytest.approx(779_289 / held["step"]["samples_per_s"] / 3600)
    assert recipes.fit(recipe, held["hours"] * 0.99, 0.95)["breaks"] == ["time"]
    share = held["memory"]["total"] / 85e9
    assert recipes.fit(recipe, 1e6, share * 0.99)["breaks"] == ["memory"]
    assert recipes.fit(recipe, 0.1, share * 1.01)["breaks"] == ["time"]
    assert recipes.least_devices(recipe, held["hours"] * 1.01, 0.95) == 8
    assert recipes.least_devices(recipe, held["hours"] / 3, 0.95) == 32
    assert recipes.least_devices(recipe, 0.01, 0.95) is None


def test_table(script, tmp_path, capsys):
    output = tmp_path / "deep" / "scaling.json"
    assert script.main(["--gpus", "8", "1024", "--stages", "3", "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    assert [row["gpus"] for row in report["rows"]] == [8, 1024] and len(report["assumptions"]) == 6
    few, many = report["rows"]
    assert few["memory"]["optimizer"] == 128 * many["memory"]["optimizer"]
    printed = capsys.readouterr().out
    assert all(line in printed for line in report["assumptions"]) and report["schema"] == 1


def test_every_shipped_recipe_is_judged(script, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    output = tmp_path / "fits.json"
    assert script.main(["--fits", "--gpu", "a100-80", "--hours", "48", "--output", str(output)]) == 0
    found = {row["recipe"]: row for row in json.loads(output.read_text())["recipes"]}
    assert found.keys() == {path.stem for path in (ROOT / "configs/train").glob("*.yaml") if path.stem[:4] != "demo"}
    assert not [row for row in found.values() if "error" in row]
    assert found["finetune_onevision"]["breaks"] == ["time"] and found["pretrain_blip558k"]["breaks"] == []
    printed = capsys.readouterr().out
    assert "utilisation of the arithmetic" in printed and "8 x a100-80" in printed


def test_options_refused(script, tmp_path):
    (tmp_path / "bad.json").write_text('[{"name": "one"}]')
    for flags, message in (
        (["--rows", "0"], "--rows 0"),
        (["--fits", "--hours", "-1"], "--hours -1"),
        (["--tower", "nobody/knows"], "--tower 'nobody/knows': expected one of"),
        (["--runs", str(tmp_path / "bad.json")], "--runs .*expected a list of runs with name and argv"),
        (["--runs", str(tmp_path / "none.json")], "--runs .*No such file"),
    ):
        with pytest.raises(SystemExit, match=message):
            script.main(flags)


def test_help_loads_nothing_heavy():
    code = "import sys, scaling; scaling.build_parser().format_help(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=FOLDER).returncode == 0
