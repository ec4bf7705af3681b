"""`llava.tools.towers`: rows against the towers themselves, with weights and pixels."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llava.model.multimodal_encoder.builder import TOWERS, build_vision_tower
from llava.tools.towers import FIELDS, _ask_no_hub_in_vain, describe, main, table
from tests import tiny
from tests.support import encoders

S2 = {"s2_scales": f"{tiny.SIDE},{2 * tiny.SIDE}"}


@pytest.mark.parametrize("kind", [*TOWERS, *encoders.KINDS])
def test_a_row_is_what_the_tower_does(tmp_path, kind):
    settings = {"mm_vision_select_layer": -2, "mm_projector_type": "mlp2x_gelu"}
    if kind in TOWERS:
        settings |= {"vision_tower": tiny.tower(tmp_path / "encoder", kind), "mm_vision_tower_type": kind}
    else:
        settings["vision_tower"] = encoders.folder(tmp_path / "encoder", kind)
    settings |= S2 if kind == "clip_s2" else {}
    (tmp_path / "mine.yaml").write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in settings.items()))
    row = describe(str(tmp_path / "mine.yaml"))
    assert tuple(row) == FIELDS and row["loads"] == "here" and row["reason"] is None and row["name"] == "mine"

    # eager: of the fused attention on CPUs PyTorch counts nothing
    tower = build_vision_tower(settings | {"_attn_implementation": "eager"}).eval()
    pixels = torch.randn(1, 3, tower.image_size, tower.image_size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        features, grids = tower(pixels, return_spatial_dims=True)
    assert features.shape == (1, row["tokens"], row["hidden_size"]) and row["grid"] == list(grids[0])
    assert row["params"] == sum(p.numel() for p in tower.parameters())
    assert row["gflops"] == counter.get_total_flops() / 1e9 > 0
    assert row["class"] == type(tower).__name__ and row["patch"] == tower.grid_pixels[0] // row["grid"][0]
    assert row["export_class"] == ("LlavaNextForConditionalGeneration" if kind in ("clip", "siglip") else None)
    assert (row["any_size"], row["s2"]) == (tower.any_size, [28, 56] if kind == "clip_s2" else None)


def test_text_json_and_faults(tmp_path, capsys, monkeypatch):
    folder = tiny.tower(tmp_path / "encoder")
    (tmp_path / "text").mkdir()
    (tmp_path / "text/config.json").write_text('{"model_type": "qwen2"}')
    (tmp_path / "bad.yaml").write_text("learning_rate: 1\n")
    names = [folder, str(tmp_path / "text"), str(tmp_path / "bad.yaml"), "nobody/clip-there-is-none"]
    main(["--json", *names])
    printed = capsys.readouterr().out
    # what DeepSpeed says when it is imported may go to the test's own stdout; the command's has the rows alone
    rows = json.loads(printed[printed.index("[\n") :])
    assert [row["loads"] for row in rows] == ["here", "refused", "refused", "needs_extra"]
    assert "model_type 'qwen2'" in rows[1]["reason"] and "learning_rate: no key of a tower" in rows[2]["reason"]
    assert all(row["reason"] and row["gflops"] is None and "\n" not in row["reason"] for row in rows[1:])
    monkeypatch.setenv("COLUMNS", "300")
    main(names)
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if not line.startswith("    ")]) == 1 + len(names)
    assert "2x2" in lines[1] and "refused" in lines[2]
    with pytest.raises(SystemExit):
        main([str(tmp_path / "none.yaml")])
    assert "no such config file" in capsys.readouterr().err


def test_a_class_of_ones_own(tmp_path, monkeypatch):
    """By its path, and in a YAML beside its file, from another folder."""
    from tests.model.own_encoders import FILE, IMAGE, TOWER

    (tmp_path / "there").mkdir()
    (tmp_path / "there/mine.py").write_text(FILE)
    (tmp_path / "there/towers.py").write_text(TOWER.replace("self.vision_tower_name, ", "'', "))
    (tmp_path / "there/mine.yaml").write_text(
        f"vision_tower: mine.py:Plain\nvision_tower_image: {json.dumps(IMAGE)}\nmm_projector_type: mlp2x_gelu\n"
    )
    values = {"image_size": 42, "patch_size": 14, "hidden_size": 32, "num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(values))
    monkeypatch.chdir(tmp_path)
    for name in ("there/mine.yaml", "there/towers.py:Restoring"):
        row = describe(name)
        assert row["loads"] == "here", row["reason"]
        assert (row["patch"], row["image_size"], row["tokens"], row["grid"]) == (14, 42, 9, [3, 3]) and row["params"]
    refused = describe("there/mine.py:Plain")
    assert refused["loads"] == "refused" and "vision_tower_image: missing" in refused["reason"]


def test_timm_needs_its_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    row = describe("timm:vit_small_patch14_dinov2")
    assert row["loads"] == "needs_extra" and "needs the package timm" in row["reason"]


def test_a_narrow_terminal():
    row = dict.fromkeys(FIELDS) | {"name": "a" * 30, "model_type": "b" * 20, "loads": "refused", "reason": "c " * 90}
    wide = {columns: table([row], columns).splitlines() for columns in (200, 120, 100, 80)}
    assert "model_type" in wide[200][0] and "model_type" not in wide[100][0]
    for columns, lines in wide.items():
        assert max(map(len, lines)) <= columns and lines[0].startswith("name") and lines[1].endswith("refused")
        assert "".join(lines[2:]).count("c") == 90 and all(line.startswith("    c") for line in lines[2:])
    assert "grid" in wide[100][0] and wide[80][0].split()[:3] == ["name", "pixels", "tokens"]


@pytest.mark.parametrize("reached", [True, False])
def test_a_hub_out_of_reach_is_asked_once(monkeypatch, capsys, reached):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.example:8080")
    asked = []

    def connect(address, timeout):
        asked.append(address)
        if not reached:
            raise OSError("no route")
        return SimpleNamespace(close=lambda: None)

    monkeypatch.setattr("socket.create_connection", connect)
    _ask_no_hub_in_vain()
    assert asked == [("mirror.example", 8080)] and (os.environ.get("HF_HUB_OFFLINE") == "1") != reached
    assert ("mirror.example is out of reach (no route)" in capsys.readouterr().err) != reached
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    _ask_no_hub_in_vain()
    assert len(asked) == 1
