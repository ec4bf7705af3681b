"""Runs whose samples share rows: the curves of the unpacked run, the same samples again after a resume, none lost."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from tests import tiny
from tests.support.families import FamilyKit
from tests.train.test_loss import assert_equal
from tests.train.test_trusted_checkpoints import weights_differ

KINDS = "iittimtiittiimitiitt"
PACKED = {"pack_sequences": True, "attn_implementation": "varlen"}
BUFFER = PACKED | {"pack_scope": "buffer", "pack_length": 200, "pack_buffer": 8, "per_device_train_batch_size": 1}
EPOCHS = {"num_train_epochs": 2, "max_steps": -1}


@pytest.fixture
def rows(monkeypatch):
    """The ids of the records in each forward pass, by step."""
    from llava.train.llava_trainer import LLaVATrainer

    take, seen = LLaVATrainer.training_step, {}

    def watched(self, model, inputs, *args, **kwargs):
        seen.setdefault(self.state.global_step + 1, []).append(list(inputs["host"].record_ids))
        return take(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(LLaVATrainer, "training_step", watched)
    return seen


@pytest.fixture(scope="module")
def plain(kit, tmp_path_factory):
    return kit.run(tmp_path_factory.mktemp("plain") / "out", KINDS, train_sampling_strategy="random", **EPOCHS)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True, "pack_length": 512, "dataloader_num_workers": 2},
    ],
    ids=["one row", "two rows", "workers"],
)
def test_a_step_packed_is_the_step_unpacked(kit, plain, tmp_path, rows, changes):
    out = kit.run(tmp_path / "out", KINDS, train_sampling_strategy="random", **EPOCHS, **PACKED, **changes)
    assert_equal(tiny.history(out), tiny.history(plain))
    accumulated = changes.get("gradient_accumulation_steps", 1)
    assert {len(found) for found in rows.values()} == {accumulated}
    assert {sum(map(len, found)) for found in rows.values()} == {4} and len(rows) == 10


def test_lora_and_a_frozen_tower(kit, tmp_path):
    flags = {"lora_enable": True, "mm_tunable_parts": "mm_mlp_adapter,mm_language_model", "lora_dropout": 0.0}
    plain = kit.run(tmp_path / "plain", KINDS, **flags)
    assert_equal(tiny.history(kit.run(tmp_path / "packed", KINDS, **flags, **PACKED)), tiny.history(plain))


def test_the_last_step_of_an_epoch_has_what_is_left(kit, tmp_path, rows):
    """18 records in steps of 4 x 2: the third has two, of which each row takes one."""
    halves = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_train_epochs": 1}
    out = kit.run(tmp_path / "out", KINDS[:17], max_steps=-1, **PACKED, **{k: v for k, v in halves.items()})
    assert [sorted(map(len, found)) for found in rows.values()] == [[4, 4], [4, 4], [0, 1]]
    assert len(tiny.history(out)) == 3 and all(entry["loss"] > 1 for entry in tiny.history(out))


@pytest.mark.parametrize("keys", [PACKED, BUFFER], ids=["step", "buffer"])
def test_resumed_within_an_epoch(kit, tmp_path, rows, keys):
    flags = {**EPOCHS, **keys, "save_strategy": "steps", "save_steps": 3, "train_sampling_strategy": "random"}
    whole = kit.run(tmp_path / "whole", KINDS, **flags)
    expected = {step: list(found) for step, found in rows.items()}
    rows.clear()
    out = tmp_path / "out"
    shutil.copytree(whole / "checkpoint-3", out / "checkpoint-3")
    kit.run(out, KINDS, **flags)
    assert min(rows) == 4 and rows == {step: found for step, found in expected.items() if step > 3}
    assert not weights_differ(out, whole)


def test_resumed_with_other_batches_it_goes_on_at_the_next_sample(kit, tmp_path, rows):
    """Three steps of four samples, then steps of eight over the rest of the epoch."""
    flags = {**EPOCHS, **PACKED, "save_strategy": "steps", "save_steps": 3, "train_sampling_strategy": "random"}
    whole = kit.run(tmp_path / "whole", KINDS, **flags)
    seen = {name for step in (1, 2, 3) for row in rows[step] for name in row}
    rows.clear()
    out = tmp_path / "out"
    shutil.copytree(whole / "checkpoint-3", out / "checkpoint-3")
    kit.run(out, KINDS, **flags | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2})
    rest = [name for row in rows[4] for name in row]
    assert len(rows[4]) == 2 and len(rest) == 8 and len(seen) == 12 and not seen & set(rest)
    later = [name for step in sorted(rows) if step > 4 for row in rows[step] for name in row]
    assert sorted(later) == sorted(f"r{number}" for number in range(len(KINDS)))


def test_every_sample_once_an_epoch_from_a_buffer(kit, tmp_path, rows):
    out = kit.run(tmp_path / "out", KINDS, **EPOCHS, **BUFFER, train_sampling_strategy="random")
    state = json.loads((out / "trainer_state.json").read_text())
    steps, half = state["max_steps"], state["max_steps"] // 2
    assert len(rows) == steps == 2 * half and half < len(KINDS) / 2  # rows hold more than two samples each
    epochs = [[row for step in part for row in rows[step]] for part in (range(1, half + 1), range(half + 1, steps + 1))]
    names = [f"r{number}" for number in range(len(KINDS))]
    assert all(Counter(name for row in epoch for name in row) == Counter(names) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_a_bad_record_leaves_its_row(kit, tmp_path, rows):
    data = Path(tiny.records(tmp_path / "data", "iiii" * 2))
    records = json.loads(data.read_text())
    Path(data.parent / "images" / records[1]["image"]).write_bytes(b"no picture")
    kit.run(tmp_path / "out", None, data_path=data, max_steps=2, **PACKED)
    assert sorted(name for found in rows.values() for row in found for name in row) == sorted(
        f"r{number}" for number in range(8) if number != 1
    )


def refused(kit, capsys, *args, **flags) -> str:
    with pytest.raises(SystemExit) as stop:
        kit.run(*args, **flags)
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_what_is_refused(kit, tmp_path, capsys):
    line = refused(kit, capsys, tmp_path / "a", KINDS, **PACKED, pack_length=20)
    assert "its sample has" in line and "more than pack_length 20; expected a pack_length of at least" in line
    line = refused(kit, capsys, tmp_path / "b", KINDS, **PACKED, pack_length=100)
    assert "pack_length: found 100, but with pack_scope step a row has 4 samples on average" in line
    line = refused(kit, capsys, tmp_path / "c", KINDS, pack_sequences=True, attn_implementation="eager")
    assert "attn_implementation" in line and "varlen" in line
    dealt = '{"dispatch_batches": true}'
    line = refused(kit, capsys, tmp_path / "c", KINDS, **PACKED, accelerator_config=dealt)
    assert line.startswith("error: accelerator_config: found split_batches False and dispatch_batches True, expected")
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    kit.run(tmp_path / "d", KINDS, **BUFFER, **saving)
    shutil.rmtree(tmp_path / "d/checkpoint-4")
    (tmp_path / "d/trainer_state.json").unlink()
    (tmp_path / "d/run_state.json").unlink()
    line = refused(kit, capsys, tmp_path / "d", KINDS, **BUFFER, **saving, gradient_accumulation_steps=2)
    assert "pack_scope: found buffer" in line and "expected the same number of processes" in line


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_layers_with_a_state_are_refused_before_weights_are_read(family, tmp_path, capsys):
    """Qwen3-Next's and others' linear attention runs on from one sample into the next."""
    kit = FamilyKit(family, tmp_path)
    path = Path(kit.checkpoint) / "config.json"
    config = json.loads(path.read_text())
    text = config.get("text_config", config)
    text["layer_types"] = ["linear_attention", "full_attention"][: text["num_hidden_layers"]]
    path.write_text(json.dumps(config))
    for weights in path.parent.glob("*.safetensors"):
        weights.unlink()
    with pytest.raises(SystemExit):
        kit.run(tmp_path / "out", pack_sequences=True)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "pack_sequences is on, but" in error and "has layers of linear_attention, which do not tell" in error
