"""Metrics are reported where a run asks for it, and nowhere else."""

import importlib.util

import pytest

from tests import tiny


def test_nothing_is_reported_by_default(kit, tmp_path, monkeypatch, spy):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    kit.run(tmp_path / "out", max_steps=1)
    names = {type(callback).__name__ for callback in spy.trainer.callback_handler.callbacks}
    assert names and not any(name.endswith(("WandbCallback", "TensorBoardCallback")) for name in names)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_dir()]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_offline(kit, tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    try:
        out = kit.run(tmp_path / "out", max_steps=2, report_to="wandb", run_name="tiny-run")
    finally:
        wandb.finish()
        wandb.teardown()  # waits for the process that writes the file
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = file.read_bytes()
    assert b"train/loss" in content and b"tiny-run" in content
    losses = [str(entry["loss"]).encode() for entry in tiny.history(out)]
    assert len(losses) == 2 and all(loss in content for loss in losses)
