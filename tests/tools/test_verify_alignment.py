"""`scripts/verify_architecture_alignment.py`: it holds for what is here, and for nothing that differs from it."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers.dynamic_module_utils
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

import llavavit.conversion
import llavavit.layers
from llava.tools import upload_llava_vit
from llava.tools.vit.outputs import run_folder
from llavavit import LlavaViTConfig
from tests.support.vit.golden import GOLDEN

ROOT = Path(__file__).resolve().parents[2]
REMOTE = "transformers_modules"


def load_script():
    path = ROOT / "scripts" / "verify_architecture_alignment.py"
    spec = importlib.util.spec_from_file_location("verify_architecture_alignment", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()


@pytest.fixture(scope="module", autouse=True)
def remote_code(tmp_path_factory):
    """Code from Hub folders goes to a folder of this module's, and is forgotten after it."""

    def forget():
        for name in [name for name in sys.modules if name.partition(".")[0] == REMOTE]:
            del sys.modules[name]

    forget()
    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", cache)
        patch.setattr(sys, "path", list(sys.path))
        for registry in (AttentionInterface, AttentionMaskInterface):  # its copy of "varlen" registers itself
            patch.setattr(registry, "_global_mapping", dict(registry._global_mapping))
        yield
    forget()


def measure_here(folder, config, layout, pixels):
    """In place of `run_alone`, which starts a Python."""
    return run_folder(folder, layout, pixels)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub folder of the published weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upload_llava_vit, "run_alone", measure_here)
        return Path(script.assemble_hub_folder(str(tmp_path_factory.mktemp("work"))))


@pytest.fixture
def copy(hub, tmp_path):
    return Path(shutil.copytree(hub, tmp_path / "hub"))


def run(capsys, hub, *arguments) -> tuple[int, set[tuple[str, str]], str]:
    """(exit status, (check, side) of those that fail, all that was printed)."""
    status = script.main(["--hub-dir", str(hub), *map(str, arguments)])
    printed = capsys.readouterr().out
    failing = {(line[2:34].strip(), line[34:44].strip()) for line in printed.splitlines() if line.endswith("FAIL")}
    assert (status == 0) == (not failing)
    return status, failing, printed


def only(monkeypatch, *groups: str) -> None:
    """Leave out all groups of checks but these, for time."""
    for group in {"configs", "weights", "golden", "cases", "probes", "hub_folder", "config"} - set(groups):
        monkeypatch.setattr(script, f"check_{group}", lambda *args: None)


def without(monkeypatch, side: str) -> None:
    """Leave out what a side has beside the other, for time."""
    for group in ("configs", "weights", "golden", "cases", "probes"):
        check = getattr(script, f"check_{group}")

        def one_side(report, sides, *args, check=check):
            check(report, [each for each in sides if each.name != side], *args)

        monkeypatch.setattr(script, f"check_{group}", one_side)


# --- what holds -------------------------------------------------------------------------------------------------------


def test_everything_holds(capsys, monkeypatch):
    """Without a folder given, one is assembled."""
    monkeypatch.setattr(upload_llava_vit, "run_alone", measure_here)
    status = script.main(["--verbose"])
    printed = capsys.readouterr()
    assert status == 0 and "FAIL" not in printed.out and printed.err == ""
    assert "checks hold, largest difference" in printed.out.splitlines()[-1]
    for case in ("image", "video", "sparse video", "mixed sizes", "explicit positions", "onevision video"):
        for side in ("formulas", "project", "hub"):
            assert any(line.startswith(f"  {case:<32}{side}") for line in printed.out.splitlines())
    assert "      onevision_encoder against formulas: hidden_states.2: " in printed.out
    assert "      llava_vit_packing hidden_states_in: 0.0e+00" in printed.out


CONFIG = {
    **{"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 3},
    **{"patch_size": 8, "layer_norm_eps": 1e-5, "head_norm_eps": 1e-7, "rope_theta": 500.0},
}


@pytest.mark.parametrize("model_type", ["llava_vit_packing", "onevision_encoder"])
def test_a_config_of_the_callers(hub, tmp_path, capsys, monkeypatch, model_type):
    only(monkeypatch, "config")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG | {"model_type": model_type}))
    status, _, printed = run(capsys, hub, "--config", path)
    assert status == 0 and printed.count("  outputs, random weights ") == 2
    monkeypatch.setattr(script, "MOST_PARAMETERS", 1e5)
    status, _, printed = run(capsys, hub, "--config", path)
    assert status == 0 and "outputs: not compared, 0 M parameters" in printed and "names and shapes" in printed


def test_a_config_under_which_the_models_differ(hub, tmp_path, capsys, monkeypatch):
    only(monkeypatch, "config")
    real = llavavit.layers.rotary_table

    def fixed(positions, config, *args):
        return real(positions, LlavaViTConfig(**CONFIG | {"rope_theta": 10000.0}), *args)

    monkeypatch.setattr(llavavit.layers, "rotary_table", fixed)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG | {"model_type": "llava_vit"}))
    assert run(capsys, hub, "--config", path)[1] == {("outputs, random weights", "project")}


# --- what does not ----------------------------------------------------------------------------------------------------

OUTPUTS = {"image", "video", "sparse video", "mixed sizes", "explicit positions", "onevision image", "onevision video"}
LAYERS, CONFIG_FILE = "layers.py", "configuration_llava_vit.py"
CHANGES = [
    # one default
    (
        CONFIG_FILE,
        "layer_norm_eps: float = 1e-6",
        "layer_norm_eps: float = 2e-6",
        {"published defaults", "default eps"},
    ),
    # one eps, written into the code with the published value: only another config and small values tell
    (LAYERS, "eps=config.layer_norm_eps)", "eps=1e-6)", {"every value another"}),
    (
        LAYERS,
        "nn.RMSNorm(config.hidden_size, eps=eps)",
        "nn.RMSNorm(config.hidden_size)",
        {"eps of every norm", *OUTPUTS},
    ),
    # one eps, past the module that has the right one
    (
        LAYERS,
        "self.mlp(self.layer_norm2(x_ND))",
        "self.mlp(F.layer_norm(x_ND, x_ND.shape[-1:], *self.layer_norm2.parameters(), eps=2e-6))",
        {"default eps", "every value another", "RMSNorm, no head"},
    ),
    # one line of the rotary embedding
    (LAYERS, "(4, 6, 6)", "(6, 4, 6)", OUTPUTS),
    (LAYERS, "config.rope_theta**", "10000.0**", {"every value another"}),
    (LAYERS, "sin[..., ::2] *= -1", "sin[..., 1::2] *= -1", OUTPUTS),
    (LAYERS, ".unflatten(-1, (-1, 2)).flip(-1)", ".unflatten(-1, (2, -1)).flip(-2)", OUTPUTS),
    (LAYERS, "torch.cat([*angles, *angles], dim=-1)", "torch.cat(angles, -1).repeat_interleave(2, -1)", OUTPUTS),
]


def change(folder, file: str, old: str, new: str) -> None:
    text = (folder / file).read_text()
    assert old in text, f"{file} has no {old!r} any more: change another line here"
    (folder / file).write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(("file", "old", "new", "expected"), CHANGES)
def test_one_changed_line_fails(copy, capsys, monkeypatch, file, old, new, expected):
    without(monkeypatch, "project")
    change(copy, file, old, new)
    status, failing, _ = run(capsys, copy)
    assert status == 1 and {(name, "hub") for name in expected} <= failing
    assert {side for _, side in failing} == {"hub"}


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        (CONFIG_FILE, "num_hidden_layers: int = 24", "num_hidden_layers: int = 23", "published defaults"),
        (CONFIG_FILE, "initializer_range: float = 0.02", "initializer_range: float = 0.01", "published defaults"),
        (
            CONFIG_FILE,
            "rope_temporal_size: int | None = 64",
            "rope_temporal_size: int | None = 32",
            "published defaults",
        ),
        (CONFIG_FILE, "14, 1280, 20, 32, 5120", "14, 1280, 16, 32, 5120", "named sizes, constants"),
        (CONFIG_FILE, "0.26130258", "0.26130259", "named sizes, constants"),
        ("conversion.py", '"layer_norm_eps": 1e-5', '"layer_norm_eps": 1e-6', "named sizes, constants"),
        ("conversion.py", "if name in full}", "if name in full and name != 'rope_theta'}", "configs of other types"),
    ],
)
def test_one_changed_fact_fails(copy, capsys, monkeypatch, file, old, new, expected):
    only(monkeypatch, "configs")
    without(monkeypatch, "project")
    change(copy, file, old, new)
    assert (expected, "hub") in run(capsys, copy)[1]


def test_one_changed_line_of_the_projects_own_code_fails(hub, capsys, monkeypatch):
    only(monkeypatch, "weights", "golden", "cases")
    real = llavavit.layers.rotary_table
    monkeypatch.setattr(llavavit.layers, "rotary_table", lambda places, *args: real(places[:, [0, 2, 1]], *args))
    status, failing, printed = run(capsys, hub)
    assert status == 1 and {(name, "project") for name in OUTPUTS} <= failing
    assert ("image", "formulas") not in failing and ("eps of every norm", "project") not in failing
    # the Hub folder's models differ from the project's as well
    assert ("image", "hub") in failing and "llava_vit against project: last_hidden_state: differs by" in printed
    assert re.match(r"\d+ of \d+ checks FAIL: image \(project\), ", printed.splitlines()[-1])


def test_one_changed_default_of_the_projects_own_code_fails(hub, capsys, monkeypatch):
    only(monkeypatch, "configs", "golden")
    without(monkeypatch, "hub")
    real = LlavaViTConfig.__init__

    def changed(self, *args, **kwargs):
        real(self, *args, **{"rope_theta": 20000.0} | kwargs)

    monkeypatch.setattr(LlavaViTConfig, "__init__", changed)
    status, failing, printed = run(capsys, hub)
    assert status == 1 and {("published defaults", "project"), ("image", "project")} <= failing
    assert "llava_vit rope_theta: found 20000.0, expected 10000.0" in printed


def test_one_weight_changed_in_conversion_fails(hub, capsys, monkeypatch):
    only(monkeypatch, "weights")
    real = llavavit.conversion.convert_state_dict

    def changed(state, to):
        state = real(state, to)
        if to == "packed":  # the head's key bias: no output depends on it
            state["head.attention.in_proj_bias"] = state["head.attention.in_proj_bias"].clone()
            state["head.attention.in_proj_bias"][70] += 1e-3
        return state

    monkeypatch.setattr(llavavit.conversion, "convert_state_dict", changed)
    status, failing, printed = run(capsys, hub)
    assert status == 1 and ("llava_vit_tiny", "project") in failing
    assert "llava_vit_packing head.attention.in_proj_bias: differs by 1.0e-03, expected 0" in printed


@pytest.mark.parametrize("name", ["encoder.layers.1.self_attn.q_proj.weight", "head.attention.in_proj_bias"])
def test_one_weight_changed_in_the_hub_folder_fails(copy, capsys, monkeypatch, name):
    only(monkeypatch, "hub_folder")
    state = load_file(copy / "model.safetensors")
    state[name].view(-1)[70] += 1e-3
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    status, failing, _ = run(capsys, copy)
    assert status == 1 and failing == {("the published ones or others", "hub")}


@pytest.mark.parametrize("folder", ["llava_vit_tiny", "onevision_encoder_tiny"])
def test_one_weight_changed_in_the_published_values_fails(hub, tmp_path, capsys, monkeypatch, folder):
    only(monkeypatch, "weights")
    golden = Path(shutil.copytree(GOLDEN, tmp_path / "golden"))
    state = load_file(golden / folder / "model.safetensors")
    state["encoder.layers.0.mlp.fc1.weight"][0, 0] += 1e-3
    save_file(state, golden / folder / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(script.golden, "GOLDEN", golden)
    status, failing, _ = run(capsys, hub)
    assert status == 1 and ("files of published values", "golden") in failing


def test_a_hub_folder_prepared_for_other_pictures_fails(copy, capsys, monkeypatch):
    only(monkeypatch, "hub_folder")
    values = json.loads((copy / "preprocessor_config.json").read_text())
    (copy / "preprocessor_config.json").write_text(json.dumps(values | {"image_mean": [0.5, 0.5, 0.5]}))
    assert run(capsys, copy)[1] == {("config.json", "hub")}


def test_code_that_does_not_run_fails(copy, capsys, monkeypatch):
    only(monkeypatch, "configs")
    (copy / LAYERS).write_text((copy / LAYERS).read_text() + "\nraise RuntimeError('broken')\n")
    _, failing, printed = run(capsys, copy)
    assert ("published defaults", "hub") in failing and "RuntimeError: broken" in printed


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "expected a config.json"),
        ("{}", "model_type: found None, expected one of llava_vit"),
        (json.dumps(CONFIG | {"model_type": "llava_vit", "hidden_act": "relu"}), "hidden_act: found 'relu'"),
        (json.dumps(CONFIG | {"model_type": "llava_vit", "hidden_size": 100}), "hidden_size 100"),
    ],
)
def test_a_config_that_is_none_is_told_in_one_line(hub, tmp_path, capsys, monkeypatch, content, expected):
    only(monkeypatch, "config")
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as stopped:
        script.main(["--hub-dir", str(hub), "--config", str(path)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and expected in error and error.count("\n") == 1


def test_a_difference_that_is_no_number_fails():
    from tests.support.vit.check_table import identical, near

    nan, one = torch.tensor([float("nan")]), torch.ones(1)
    assert all(wrong for _, wrong, _ in near({"a": nan, "b": one}, {"a": one, "b": nan}))
    assert all(wrong for _, wrong, _ in identical({"a": nan}, {"a": nan}))


@pytest.mark.parametrize(
    "flags, status", [(["--help"], 0), (["--hub-dir", "nowhere"], 2), (["--hub-dir", "HUB", "-v"], 1)]
)
def test_the_script_under_its_place_at_the_root(copy, tmp_path, flags, status):
    """Same words and exit status, wherever it is called from and without the project on the path."""
    weights = load_file(copy / "model.safetensors")
    weights["layernorm_pre.weight"] = weights["layernorm_pre.weight"] + 1e-3
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    flags = [str(copy) if flag == "HUB" else flag for flag in flags]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    paths = [ROOT / "verify_architecture_alignment.py", ROOT / "scripts" / "verify_architecture_alignment.py"]
    command = [sys.executable, str(paths[0]), *flags]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    if status == 1:
        assert "FAIL" in done.stdout and "hidden_size" in done.stdout
        return
    script = subprocess.run(
        [sys.executable, str(paths[1]), *flags], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr, status) == (script.stdout, script.stderr, script.returncode)
