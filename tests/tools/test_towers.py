"""`llava.tools.towers`: rows against the towers themselves, with weights and pixels."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llava.model.multimodal_encoder.builder import TOWERS, build_vision_tower
from llava.tools.towers import FIELDS, describe, main
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
    pixels_of_a_token = (16 if kind == "cvt" else 32) if kind in encoders.MAPS else tiny.PATCH  # cvt has three stages
    assert features.shape == (1, row["tokens"], row["hidden_size"]) and row["grid"] == list(grids[0])
    assert row["params"] == sum(p.numel() for p in tower.parameters())
    assert row["gflops"] == counter.get_total_flops() / 1e9 > 0
    assert row["class"] == type(tower).__name__ and row["patch"] == pixels_of_a_token
    assert row["export_class"] == ("LlavaNextForConditionalGeneration" if kind in ("clip", "siglip") else None)
    assert (row["any_size"], row["s2"]) == (tower.any_size, [28, 56] if kind == "clip_s2" else None)


def test_text_json_and_faults(tmp_path, capsys):
    folder = tiny.tower(tmp_path / "encoder")
    (tmp_path / "text").mkdir()
    (tmp_path / "text/config.json").write_text('{"model_type": "qwen2"}')
    (tmp_path / "bad.yaml").write_text("learning_rate: 1\n")
    names = [folder, str(tmp_path / "text"), str(tmp_path / "bad.yaml"), "nobody/clip-there-is-none"]
    main(["--json", *names])
    rows = json.loads(capsys.readouterr().out)
    assert [row["loads"] for row in rows] == ["here", "refused", "refused", "needs_extra"]
    assert "model_type 'qwen2'" in rows[1]["reason"] and "learning_rate: no key of a tower" in rows[2]["reason"]
    assert all(row["reason"] and row["gflops"] is None and "\n" not in row["reason"] for row in rows[1:])
    main(names)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(names) + 3 and "2x2" in lines[1] and "refused" in lines[2]
    with pytest.raises(SystemExit):
        main([str(tmp_path / "none.yaml")])
    assert "no such config file" in capsys.readouterr().err
