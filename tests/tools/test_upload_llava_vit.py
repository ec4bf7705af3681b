"""`python -m llava.tools.upload_llava_vit`: the folder it assembles, alone and measured, and the upload."""

import contextlib
import importlib.metadata
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalTokenNotFoundError
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image
from safetensors.torch import load_file, save_file

import llavavit
from llava.errors import LlavaError
from llava.tools import upload_llava_vit
from llava.tools.upload_llava_vit import main, run_alone
from llava.tools.vit import reload_hub_folder
from llava.tools.vit.outputs import differences, run_folder
from llava.tools.vit.reload_hub_folder import Blocker
from llavavit import SIZES, LlavaViTConfig, LlavaViTModel, LlavaViTPackingModel
from tests.support.vit.golden import TINY, TINY_SIZE, source_state

OWN_FILES = sorted(path.name for path in Path(llavavit.__file__).parent.glob("*.py"))


@pytest.fixture(autouse=True)
def tiny_size(monkeypatch):
    monkeypatch.setitem(SIZES, TINY, (TINY_SIZE | {"num_hidden_layers": 4}, TINY_SIZE))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "last.pth"
    torch.save({"state_dict": {f"module.{name}": value for name, value in source_state().items()}}, path)
    return path


def arguments(weights, **changes) -> list[str]:
    values = {"model_name": TINY, "weight_path": weights, "repo_id": "someone/hevc-vit-tiny", "image_size": 64}
    return [part for key, value in (values | changes).items() for part in (f"--{key}", str(value))]


def measure_here(folder, config, layout, pixels):
    """In place of `run_alone`, which starts a Python."""
    return run_folder(folder, layout, pixels)


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(upload_llava_vit, "run_alone", measure_here)


@pytest.fixture(scope="module")
def hubs(weights, tmp_path_factory):
    """to -> (folder that a dry run leaves, what was printed)."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, TINY, (TINY_SIZE,))
        patch.setattr(huggingface_hub, "HfApi", None)  # a dry run has no use for it
        for to in ("padded", "packing"):
            folder, printed = tmp_path_factory.mktemp("hub") / to, io.StringIO()
            with contextlib.redirect_stdout(printed):
                main([*arguments(weights, to=to, output_dir=folder), "--dry-run"])
            made[to] = folder, printed.getvalue()
            patch.setattr(upload_llava_vit, "run_alone", measure_here)  # once is enough
    return made


def failure(capsys, *args) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(list(args))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


# --- the folder -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("to", "auto_map"),
    [
        (
            "padded",
            {
                "AutoConfig": "configuration_llava_vit.LlavaViTConfig",
                "AutoModel": "modeling_llava_vit.LlavaViTModel",
            },
        ),
        (
            "packing",
            {
                "AutoConfig": "configuration_llava_vit.LlavaViTPackingConfig",
                "AutoModel": "modeling_llava_vit_packing.LlavaViTPackingModel",
            },
        ),
    ],
)
def test_what_the_folder_holds(hubs, to, auto_map):
    folder, printed = hubs[to]
    others = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*others, *OWN_FILES])
    for name in OWN_FILES:
        assert (folder / name).read_bytes() == (Path(llavavit.__file__).parent / name).read_bytes()
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == auto_map and config["image_size"] == 64
    assert json.loads((folder / "preprocessor_config.json").read_text())["size"] == {"shortest_edge": 64}
    assert "dry run: nothing is uploaded" in printed
    for side in ("padded model", "packed model", "this folder"):
        values = re.search(rf"{side} +(\S+) +(\S+) +(\S+)\n", printed).groups()
        assert all(0 < float(value) < 1e-5 for value in values)
        assert f"| {side} | {' | '.join(values)} |" in (folder / "README.md").read_text()


ALONE = """
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel
from transformers.utils import logging
logging.disable_progress_bar()
inputs, outputs = load_file("inputs.safetensors"), {{}}
with torch.no_grad():
    padded = AutoModel.from_pretrained({padded!r}, trust_remote_code=True)
    packed = AutoModel.from_pretrained({packed!r}, trust_remote_code=True)
    for name, out in (
        ("padded", padded(inputs["image"])),
        ("sparse", padded(inputs["video"], visible_indices=inputs["visible_indices"])),
        ("packed", packed(inputs["rows"], inputs["grid_thw"])),
    ):
        outputs[f"{{name}}.last"], outputs[f"{{name}}.pooled"] = out.last_hidden_state, out.pooler_output
save_file(outputs, "outputs.safetensors")
"""


def clean_environment(folder: Path) -> None:
    """Links in `folder` to torch, transformers and pillow and what these need, out of all that is installed here."""
    folder.mkdir()
    wanted, seen = ["torch", "transformers", "pillow"], set()
    while wanted:
        name = wanted.pop()
        if name in seen:
            continue
        seen.add(name)
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files if file.parts[0] not in ("..", "__pycache__")}:
            link = folder / top
            if not link.exists():
                link.symlink_to(distribution.locate_file(top))
        for line in distribution.requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                wanted.append(canonicalize_name(requirement.name))
    assert {"torch", "transformers"} <= seen and not {"llava", "accelerate", "torchvision"} & seen


def test_auto_model_and_the_cards_examples_work_without_the_project(hubs, tmp_path):
    clean_environment(packages := tmp_path / "packages")
    folders = {to: str(folder) for to, (folder, _) in hubs.items()}
    inputs = {
        "image": torch.randn(2, 3, 48, 32),
        "video": torch.randn(1, 3, 3, 32, 16),
        "visible_indices": torch.tensor([[0, 3, 5]]),
        "rows": torch.randn(11, 768),
        "grid_thw": torch.tensor([[1, 1, 3], [2, 2, 2]]),
    }
    save_file(inputs, tmp_path / "inputs.safetensors")
    Image.new("RGB", (90, 70), (200, 40, 10)).save(tmp_path / "picture.jpg")
    program = "import importlib.util\nassert importlib.util.find_spec('llavavit') is None\n"
    program += ALONE.format(padded=folders["padded"], packed=folders["packing"])
    for to, folder in folders.items():
        card = (Path(folder) / "README.md").read_text()
        examples = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        assert len(examples) == 2
        program += f"print({to!r})\n" + "".join(examples).replace("someone/hevc-vit-tiny", folder)
    env = {"PYTHONPATH": str(packages), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    # -S: without what is installed here
    done = subprocess.run([sys.executable, "-S", "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sizes = ["torch.Size([1, 16, 64])", "torch.Size([1, 64])", "torch.Size([10, 64])", "torch.Size([2, 64])"]
    assert done.stdout.splitlines() == ["padded", *sizes, "packing", *sizes]

    found = load_file(tmp_path / "outputs.safetensors")
    # the original: the models of this project with the weights that were given, not those of the folder
    config = {**TINY_SIZE, **llavavit.conversion.SOURCE_EPS}
    with torch.no_grad():
        model = LlavaViTModel(LlavaViTConfig(**config)).eval()
        model.load_state_dict(llavavit.conversion.convert_state_dict(source_state(), "padded"))
        packed = LlavaViTPackingModel(llavavit.LlavaViTPackingConfig(**config)).eval()
        packed.load_state_dict(llavavit.conversion.convert_state_dict(source_state(), "packed"))
        expected = {
            "padded": model(inputs["image"]),
            "sparse": model(inputs["video"], visible_indices=inputs["visible_indices"]),
            "packed": packed(inputs["rows"], inputs["grid_thw"]),
        }
    for name, out in expected.items():
        torch.testing.assert_close(found[f"{name}.last"], out.last_hidden_state, atol=1e-5, rtol=0)
        torch.testing.assert_close(found[f"{name}.pooled"], out.pooler_output, atol=1e-5, rtol=0)


def test_the_project_cannot_be_imported_where_the_folder_is_measured():
    blocker = Blocker()
    for name in ("llavavit", "llavavit.layers", "llava.tools"):
        with pytest.raises(ModuleNotFoundError):
            blocker.find_spec(name)
    assert blocker.find_spec("torch") is None and blocker.find_spec("llava_something") is None


def test_a_folder_that_does_not_load_alone_is_told_in_one_line(monkeypatch, tmp_path):
    program = tmp_path / "program.py"
    program.write_text("import sys\nassert sys.argv[1] == 'hub'\nraise ImportError('no llavavit here')")
    monkeypatch.setattr(reload_hub_folder, "__file__", str(program))
    with pytest.raises(LlavaError, match="fails without this project: ImportError: no llavavit here"):
        run_alone("hub", LlavaViTConfig(**TINY_SIZE), "padded", torch.randn(1, 3, 32, 32))


# --- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_name": "hf_llava_vit_huge_ln"}, "'hidden_size': 1536"),
        ({"model_name": "hf_llava_vit_mid_ln"}, "model name: found 'hf_llava_vit_mid_ln', expected one of"),
        ({"repo_id": "a/b/c"}, "--repo_id: "),
        ({"image_size": 65}, "image_size: found 65, expected a multiple of 16"),
        ({"weight_path": "nowhere.pth"}, "nowhere.pth: nothing there"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_written(weights, tmp_path, capsys, changes, expected):
    output = tmp_path / "hub"
    assert expected in failure(capsys, *arguments(weights, output_dir=output, **changes), "--dry-run")
    assert not list(tmp_path.iterdir())


def test_a_dry_run_needs_a_place(weights, capsys):
    assert "--dry-run: needs --output_dir" in failure(capsys, *arguments(weights), "--dry-run")


def test_a_difference_leaves_no_folder_and_uploads_nothing(weights, tmp_path, capsys, monkeypatch):
    def off(folder, config, layout, pixels):
        outputs = run_folder(folder, layout, pixels)
        return outputs._replace(pooler_output=outputs.pooler_output + 1e-3)

    monkeypatch.setattr(upload_llava_vit, "run_alone", off)
    monkeypatch.setattr(huggingface_hub, "HfApi", None)
    error = failure(capsys, *arguments(weights, output_dir=tmp_path / "hub"))
    assert "this folder: pooler_output differs by 1.0e-03, expected at most 1e-04" in error
    assert not list(tmp_path.iterdir())


# --- the upload -------------------------------------------------------------------------------------------------------


@pytest.fixture
def api(monkeypatch):
    """Records what is asked of the Hub."""
    calls = []

    class Api:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo_id, **options):
            calls.append(("create_repo", repo_id, options))
            return f"https://huggingface.co/{repo_id}"

        def upload_folder(self, *, folder_path, repo_id, commit_message):
            names = sorted(path.name for path in Path(folder_path).iterdir())
            calls.append(("upload_folder", repo_id, folder_path, names))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return calls


@pytest.mark.parametrize("kept", [False, True])
def test_upload(fast, api, weights, tmp_path, capsys, kept):
    options = {"output_dir": tmp_path / "hub", "token": "hf_secret"} if kept else {}
    main([*arguments(weights, **options), *(["--private"] if kept else [])])
    token, create, (_, repo_id, folder, names) = api
    assert token == ("token", "hf_secret" if kept else None)
    assert create == ("create_repo", "someone/hevc-vit-tiny", {"private": True if kept else None, "exist_ok": True})
    assert repo_id == "someone/hevc-vit-tiny" and {"README.md", "model.safetensors", *OWN_FILES} <= set(names)
    assert Path(folder).exists() == kept
    printed = capsys.readouterr()
    assert "uploaded  https://huggingface.co/someone/hevc-vit-tiny" in printed.out
    assert "hf_secret" not in printed.out + printed.err


def test_what_the_hub_says_is_one_line(fast, weights, capsys, monkeypatch):
    class Api:
        def __init__(self, token=None):
            raise LocalTokenNotFoundError("Token is required\nbut no token found.")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert "someone/hevc-vit-tiny: not uploaded: Token is required" in failure(capsys, *arguments(weights))


def test_a_folder_that_is_there_is_left_alone(fast, api, weights, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert "is there already" in failure(capsys, *arguments(weights, output_dir=tmp_path))
    assert (tmp_path / "notes.txt").read_text() == "mine" and not api


# --- differences ------------------------------------------------------------------------------------------------------


def test_differences_of_hidden_states_are_in_units_of_large_values():
    from llava.tools.vit.reference import Outputs

    states = torch.full((1, 2, 4), 200.0), torch.full((1, 2, 4), 0.5)
    expected = Outputs(states[1], torch.zeros(1, 4), states)
    found = Outputs(states[1] + 0.25, torch.full((1, 4), 0.125), (states[0] + 2.0, states[1]))
    result = differences(found, expected)
    assert result == {"last_hidden_state": 0.25, "pooler_output": 0.125, "hidden_states": 0.01}
    gone = found._replace(hidden_states=(states[0], states[1] * float("nan")))
    assert str(differences(gone, expected)["hidden_states"]) == "nan"
