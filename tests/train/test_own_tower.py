"""docs/your_encoder.md is true: its two encoders learn from the demo's data, and load where only their file is."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.train.test_demo_towers import demo  # noqa: F401

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs/train/demo_pretrain.yaml")
TOWER = "model.vision_tower.vision_tower."


def write_page(folder: Path) -> Path:
    """The page's files."""
    text = (ROOT / "docs/your_encoder.md").read_text()
    module, tower = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (yaml,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    folder.mkdir()
    (folder / "my_vit.py").write_text(module)
    (folder / "my_tower.py").write_text(tower)
    (folder / "my_tower.yaml").write_text(yaml)
    assert len(module.splitlines()) <= 40
    return folder


@pytest.fixture
def page(tmp_path, monkeypatch):
    folder = write_page(tmp_path / "page")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.delitem(sys.modules, "my_vit", raising=False)
    yield folder
    sys.modules.pop("my_vit", None)


def run(demo, out, **changes):  # noqa: F811
    from llava.train.train import train

    flags = {
        "model_name_or_path": demo / "llm",
        "data_path": demo / "pretrain.json",
        "image_folder": demo / "images",
        "output_dir": out,
        "max_steps": 15,
        "per_device_train_batch_size": 32,
        "logging_steps": 5,
        "save_strategy": "no",
        "disable_tqdm": True,
        **changes,
    }
    train([CONFIG, *(str(part) for key, value in flags.items() for part in (f"--{key}", value))])
    state = json.loads((out / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def weights(folder) -> dict:
    return {name: value for path in folder.glob("model*.safetensors") for name, value in load_file(path).items()}


def test_a_plain_module(demo, page, tmp_path, capsys):  # noqa: F811
    """Named beside its YAML; trained, evaluated and trained on in another folder, after the first one has gone."""
    from llava.eval.exact_match import main

    losses = run(demo, tmp_path / "out", tower=page / "my_tower.yaml")
    assert losses[-1] < 0.75 * losses[0]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["mm_vision_tower_type"] == f"{page}/my_vit.py:MyViT" and config["tower_args"]["depth"] == 3
    evaluate = ["--model-path", tmp_path / "out", "--data-path", demo / "heldout.json", "--image-folder"]
    evaluate = [str(word) for word in (*evaluate, demo / "images", "--limit", 4, "--conv-mode", "qwen_1_5")]
    page.rename(tmp_path / "gone")
    named = ["--vision_tower", "my_vit.py:MyViT"]
    for words, fault in (([], "only the checkpoint"), (named, "my_vit.py:MyViT: found no file")):
        with pytest.raises(SystemExit):
            main(evaluate + words)
        assert fault in capsys.readouterr().err
    shutil.copy(tmp_path / "gone" / "my_vit.py", ".")
    main(evaluate + named)
    assert json.loads((tmp_path / "out" / "eval.json").read_text())["n"] == 4
    capsys.readouterr()
    shutil.copy(tmp_path / "gone" / "my_tower.yaml", ".")
    stage2 = {"tower": "my_tower.yaml", "model_name_or_path": tmp_path / "out", "mm_tunable_parts": "mm_mlp_adapter"}
    run(demo, tmp_path / "stage2", max_steps=1, **stage2)
    told = capsys.readouterr().out  # the trained weights, not what the constructor makes
    assert f"mm_vision_tower: {tmp_path}/out (frozen)" in told and "with the weights that it is made with" not in told


def test_a_vision_tower(demo, page, tmp_path, capsys, monkeypatch):  # noqa: F811
    """Its own weights, and the block and the norm behind the selected layer neither trained nor counted."""
    from llava.model.builder import load_pretrained_model

    monkeypatch.syspath_prepend(str(page))
    from my_vit import MyViT

    save_file(MyViT().state_dict(), page / "w.safetensors")
    keys = {
        "vision_tower": f"{page}/my_tower.py:MyTower",
        "tower_args": json.dumps({"weights": f"{page}/w.safetensors"}),
    }
    losses = run(demo, tmp_path / "out", mm_vision_select_layer=-2, mm_projector_type="mlp2x_gelu", **keys)
    assert losses[-1] < 0.8 * losses[0]
    found, before = weights(tmp_path / "out"), load_file(page / "w.safetensors")
    still = {name for name, value in before.items() if found[TOWER + name].equal(value)}
    assert still == {name for name in before if name.startswith(("blocks.2.", "norm.", "extra"))}
    trained = sum(value.numel() for name, value in before.items() if name not in still)
    assert f"trained: mm_vision_tower {trained / 1e6:.2f}M" in capsys.readouterr().out
    (page / "w.safetensors").unlink()  # the checkpoint has them
    path = str(tmp_path / "out")
    named = {"vision_tower": keys["vision_tower"], "device_map": "cpu", "torch_dtype": "float32"}
    model = load_pretrained_model(path, None, "llava_qwen", **named)[1]
    tower, images = model.get_vision_tower(), torch.randn(2, 3, 56, 56)
    assert tower(images).shape == (2, 16, 96)
    assert tower.vision_tower.blocks[2].mlp[0].weight.equal(before["blocks.2.mlp.0.weight"])


def test_a_fault_is_told_before_training(demo, page, tmp_path, capsys):  # noqa: F811
    text = (page / "my_vit.py").read_text()
    (page / "my_vit.py").write_text(text.replace("self.norm(x)[:, 1 + self.registers :]", "self.norm(x)"))
    with pytest.raises(SystemExit) as ended:
        run(demo, tmp_path / "out", tower=page / "my_tower.yaml")
    told = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and len(told) == 1
    assert "it returned [1, 19, 96]" in told[0] and "(no class token)" in told[0]


def test_any_size(demo, page, tmp_path, capsys):  # noqa: F811
    """The page's tower made one of any size, on pictures at their own size and aspect: trained, loaded, asked."""
    from llava.eval.exact_match import main

    text = (page / "my_tower.py").read_text()
    changed = text.replace("class MyTower(VisionTower):", "class MyTower(VisionTower):\n    any_size = True\n")
    rows = "x + vit.positions[torch.arange(x.shape[1]) % len(vit.positions)]"  # as many as there are tokens
    changed = changed.replace(" + vit.positions", f"\n        x = {rows}")
    changed = changed.replace("import torch.nn", "import torch\nimport torch.nn", 1)
    assert changed.count("any_size") == changed.count(rows) == 1
    (page / "my_tower.py").write_text(changed)
    named = f"{page}/my_tower.py:MyTower"
    keys = {"image_aspect_ratio": "native", "min_pixels": 28 * 28, "max_pixels": 84 * 84, "vision_tower": named}
    keys |= {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_patch_merge_type": "spatial_unpad"}
    keys |= {"logging_steps": 1, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 4}
    assert len(run(demo, tmp_path / "out", max_steps=1, **keys)) == 1
    assert len(run(demo, tmp_path / "out", max_steps=2, **keys)) == 2  # from checkpoint-1, whose class the run names
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["image_aspect_ratio"] == "native" and config["mm_vision_tower"] == named
    words = ["--model-path", tmp_path / "out", "--data-path", demo / "heldout.json", "--image-folder", demo / "images"]
    main([str(word) for word in (*words, "--limit", 2, "--conv-mode", "qwen_1_5", "--vision_tower", named)])
    assert json.loads((tmp_path / "out" / "eval.json").read_text())["n"] == 2
