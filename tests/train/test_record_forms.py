"""Runs on records in other forms, and what becomes of a record's own system turn from training to a prompt."""

import json
from pathlib import Path

import pytest

from llava.families import family_of
from tests import tiny
from tests.support.families import FamilyKit

SYSTEM = {"from": "system", "value": "Be brief."}
DEFAULT = "You are a helpful assistant."


def with_system(data: str) -> Path:
    """A file beside `data`, whose records have a system turn of their own."""
    records = json.loads(Path(data).read_text())
    for record in records:
        record["conversations"].insert(0, SYSTEM)
    path = Path(data).with_name("system.json")
    path.write_text(json.dumps(records))
    return path


def as_messages(record: dict) -> dict:
    """The record as chat data writes it: typed parts, pictures in `images`."""
    names = record.pop("image", [])
    question, answer = (turn["value"] for turn in record.pop("conversations"))
    parts = [{"type": "image"} for _ in range(question.count("<image>"))]
    parts.append({"type": "text", "text": question.replace("<image>\n", "")})
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    return {**record, "images": [names] if isinstance(names, str) else names, "messages": turns}


def test_a_run_on_messages_is_that_on_llavas_records(kit, tmp_path, capsys):
    data = Path(kit.records("imt"))
    other = data.with_name("messages.jsonl")
    records = [as_messages(record) for record in json.loads(data.read_text())]
    # the pictures of these two are never used, so they may be anything
    records += [{**records[2], "id": f"unused{at}", "images": ["broken.png"]} for at in range(2)]
    other.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8-sig")
    (data.parent / "images/broken.png").write_bytes(b"no picture")
    longer = json.loads(data.read_text())
    longer += [{**longer[2], "id": f"text{at}"} for at in range(2)]
    data = data.with_name("longer.json")
    data.write_text(json.dumps(longer))
    losses = []
    for path in (data, other):
        out = kit.run(tmp_path / path.stem, None, data_path=path, per_device_train_batch_size=5, max_steps=1)
        losses.append(tiny.history(out)[0]["loss"])
    assert losses[0] == losses[1]
    printed = capsys.readouterr().out
    assert (
        f"note: 2 of 5 records name an image but have no <image> (first: {other}: record 4 (id 'unused0'))" in printed
    )
    assert "left out" not in printed


def test_the_choice_of_system_turn_is_saved_and_asked_with(kit, tmp_path, capsys):
    """In the model's config; a run that starts from it goes on with it."""
    data = with_system(kit.records("it"))
    turns = [("system", "Be brief."), ("human", "Hi")]
    shape = dict(data_path=data, per_device_train_batch_size=2, max_steps=1)
    for setting, own, noted in (("template", DEFAULT, True), ("record", "Be brief.", False)):
        out = kit.run(tmp_path / setting, None, system_turn=setting, **shape)
        assert ("have a system turn of their own" in capsys.readouterr().out) == noted
        assert json.loads((out / "config.json").read_text())["system_turn"] == setting
        family = family_of(str(out))
        loaded = family.load(str(out), device="cpu")
        assert family.prompt_text(turns, loaded).startswith(
            f"<|im_start|>system\n{own}<|im_end|>\n<|im_start|>user\nHi"
        )
        text = family.load_text(str(out))
        assert family.prompt_text(turns, text) == family.prompt_text(turns, loaded)
    kit.run(tmp_path / "again", None, model_name_or_path=tmp_path / "record", **shape)
    assert json.loads((tmp_path / "again/config.json").read_text())["system_turn"] == "record"
    assert "have a system turn" not in capsys.readouterr().out


def test_a_template_without_a_place_for_it_is_refused_before_weights(kit, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        kit.run(tmp_path / "out", "ii", version="plain", system_turn="record", model_name_or_path=tmp_path)
    assert stop.value.code == 2
    said = "error: system_turn: found record, but template 'plain' has no place for a system text; expected template"
    assert said in capsys.readouterr().err


def test_qwen2_vl_has_the_same_rule(tmp_path, capsys):
    kit = FamilyKit("qwen2_vl", tmp_path)
    data = with_system(kit.records)
    firsts = {}
    lora = {"lora_enable": True, "lora_r": 2, "mm_tunable_parts": "mm_mlp_adapter,mm_language_model"}
    for setting, own, adapter in (("template", DEFAULT, lora), ("record", "Be brief.", {})):
        run = kit.run(tmp_path / setting, data_path=data, system_turn=setting, max_steps=1, **adapter)
        ids = run.trainer.train_dataset[0]["input_ids"]
        firsts[setting] = run.trainer.processing_class.tokenizer.decode(ids)
        assert firsts[setting].startswith(f"<|im_start|>system\n{own}<|im_end|>\n<|im_start|>user\n")
        assert ("have a system turn of their own" in capsys.readouterr().out) == (setting == "template")
        loaded = kit.family.load(str(run.out), device="cpu")
        prompt = kit.family.prompt_text([("system", "Be brief."), ("human", "Hi")], loaded)
        assert prompt.startswith(f"<|im_start|>system\n{own}<|im_end|>\n")
    stock = kit.family.load(kit.checkpoint, device="cpu")  # of its makers: as its chat template
    prompt = kit.family.prompt_text([("system", "Be brief."), ("human", "Hi")], stock)
    assert prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
