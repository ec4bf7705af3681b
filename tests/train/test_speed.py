"""Keys for speed and memory: refused or turned off where they cannot be, and without influence on the numbers."""

from types import SimpleNamespace

import pytest
import torch

from llava.errors import LlavaError
from llava.train import speed
from llava.train.arguments import parse_args
from llava.train.trial import try_settings
from tests import tiny


def parsed(tmp_path, *words):
    return parse_args(["--output_dir", str(tmp_path), *words])[2]


def test_liger_on_a_cpu(tmp_path):
    with pytest.raises(LlavaError, match="command line: use_liger_kernel needs a CUDA device, expected one"):
        parsed(tmp_path, "--use_liger_kernel", "true")


def test_liger_that_is_not_installed(tmp_path, monkeypatch):
    args = parsed(tmp_path)
    args.use_liger_kernel = True
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(LlavaError, match=r"needs the package liger_kernel, .*: pip install -e '\.\[liger\]'"):
        try_settings(args, args.run_config)


def test_a_compiled_tower_on_a_cpu(tmp_path):
    args = parsed(tmp_path, "--torch_compile_tower", "true")
    assert args.torch_compile_tower is False
    assert "torch_compile_tower needs a CUDA device; the tower runs uncompiled" in args.run_config.notices


def test_a_micro_batch_of_none(tmp_path):
    with pytest.raises(LlavaError, match="vision_micro_batch is 0, expected"):
        parsed(tmp_path, "--vision_micro_batch", "0")
    assert parsed(tmp_path).vision_micro_batch is None


def test_what_is_set_up(monkeypatch, capsys):
    """transformers must not patch the model once more."""
    model, seen = torch.nn.Linear(1, 1), []
    for name in ("set_micro_batch", "compile_blocks", "apply_liger"):
        monkeypatch.setattr(speed, name, lambda model, *given, name=name, **how: seen.append((name, *given, how)))
    args = dict(vision_micro_batch=3, torch_compile_tower=True, liger_kernel_config={"rope": False})
    args |= dict.fromkeys(("torch_compile_backend", "torch_compile_mode"))
    args = SimpleNamespace(**args, use_liger_kernel=True, torch_compile=False)
    speed.speed_up(model, args)
    tower = ("compile_blocks", {"tower_alone": True, "backend": "inductor", "mode": None})
    assert seen == [("set_micro_batch", 3, {}), tower, ("apply_liger", {"rope": False}, {})]
    assert args.use_liger_kernel is False
    for liger in (False, True):  # whose kernels cannot be compiled
        args.torch_compile, args.torch_compile_backend, args.torch_compile_mode = True, "eager", "default"
        args.use_liger_kernel = liger
        del seen[1:]
        speed.speed_up(model, args)
        assert seen[2] == ("compile_blocks", {"tower_alone": liger, "backend": "eager", "mode": "default"})
        assert (args.torch_compile, args.torch_compile_backend, args.torch_compile_mode) == (False, None, None)
        assert ("only the vision encoder's blocks are compiled" in capsys.readouterr().out) == liger


def test_a_run_in_chunks_takes_the_same_steps(kit, tmp_path, monkeypatch):
    """Of images and of logits; one micro-batch has no image."""
    from llava.model import chunked_loss
    from llava.model.image_encoding import ImageEncoding

    expected = tiny.history(kit.run(tmp_path / "plain", "tttmimtiimti", per_device_train_batch_size=3))
    calls, encode = [], ImageEncoding._encode_together
    monkeypatch.setattr(ImageEncoding, "_encode_together", lambda *given: calls.append(1) or encode(*given))
    monkeypatch.setattr(chunked_loss, "LOGITS_BYTES", 4 * 703 * 4)
    changes = dict(per_device_train_batch_size=3, vision_micro_batch=2)
    found = tiny.history(kit.run(tmp_path / "chunks", "tttmimtiimti", **changes))
    assert len(calls) > 6
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
