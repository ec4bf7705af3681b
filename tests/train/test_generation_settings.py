"""Generation settings that do not go together: a model that has them is trained, saved, merged, and says so once."""

import json
import shutil
from pathlib import Path

import pytest

from tests import tiny

VICUNA = {"do_sample": False, "temperature": 0.9, "top_p": 0.6}
CASES = [  # (as published, as saved)
    ({}, {}),
    ({"do_sample": True, "temperature": 0.7}, {"do_sample": True, "temperature": 0.7}),
    (VICUNA, VICUNA | {"do_sample": True}),
    ({"top_k": 20, "min_p": 0.1, "eta_cutoff": 0.1}, {"top_k": 20, "min_p": 0.1, "eta_cutoff": 0.1, "do_sample": True}),
    ({"temperature": 0.0, "top_p": 0.5}, {"do_sample": False}),
    ({"top_k": -1, "temperature": 0.5}, {"temperature": 0.5, "do_sample": True}),
    ({"num_return_sequences": 2}, {"num_return_sequences": 2, "do_sample": True}),
    ({"num_return_sequences": 3, "num_beams": 2}, {"num_beams": 2}),
    ({"early_stopping": True, "length_penalty": 2.0, "pad_token_id": -1, "eos_token_id": 3}, {"eos_token_id": 3}),
    ({"max_new_tokens": 0, "output_scores": True, "streamer": 1, "cache_implementation": "none"}, {}),
    ({"suppress_tokens": [3], "forced_eos_token_id": 3}, {"suppress_tokens": [3]}),
    ({"max_new_tokens": "many", "temperature": "0.5", "bos_token_id": 1}, {"bos_token_id": 1}),
]


def write(folder, name="generation_config.json", **settings):
    path = Path(folder) / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | settings))


def saved(folder):
    return json.loads((Path(folder) / "generation_config.json").read_text())


@pytest.mark.parametrize("before, after", CASES)
def test_what_is_saved(tmp_path, capsys, before, after):
    from llava.model.generation import generation_settings

    write(tmp_path, **before)
    settings = generation_settings(str(tmp_path))
    said = capsys.readouterr().out
    changed = {key for key in before.keys() | after if before.get(key) != after.get(key)} - {"do_sample"}
    assert all(f"{key} " in said for key in changed) and said.count("\n") == (before != after)
    settings.validate(strict=True)
    settings.save_pretrained(tmp_path / "out")
    found = saved(tmp_path / "out")
    del found["transformers_version"]
    assert {"do_sample": False} | found == {"do_sample": False} | after


def test_a_llava_model_is_saved_at_every_checkpoint(kit, tmp_path, capsys):
    llm = shutil.copytree(kit.llm, tmp_path / "llm")
    write(llm, **VICUNA)
    out = kit.run(tmp_path / "out", "iiii", max_steps=1, model_name_or_path=llm, save_strategy="steps", save_steps=1)
    said = capsys.readouterr().out
    assert said.count("generation settings") == 1 and f"{llm}" in said and "do_sample False -> True" in said
    for folder in (out, out / "checkpoint-1"):
        assert saved(folder).items() >= (VICUNA | {"do_sample": True}).items()
    (llm / "generation_config.json").unlink()
    write(llm, "config.json", **VICUNA)  # as older models have it
    out = kit.run(tmp_path / "older", "iiii", max_steps=1, model_name_or_path=llm)
    assert saved(out)["do_sample"] is True and "temperature" not in json.loads((out / "config.json").read_text())


def test_an_adapter_is_saved_and_merged(kit, tmp_path, capsys):
    from llava.tools.merge_lora import main

    llm = shutil.copytree(kit.llm, tmp_path / "llm")
    write(llm, **VICUNA)
    lora = dict(lora_enable=True, lora_r=4, save_strategy="steps", save_steps=1)
    out = kit.run(tmp_path / "lora", "iiii", max_steps=1, model_name_or_path=llm, **lora)
    capsys.readouterr()
    main(["--model-path", str(out), "--save-model-path", str(tmp_path / "merged")])
    assert "do_sample False -> True" in capsys.readouterr().out
    assert saved(tmp_path / "merged").items() >= (VICUNA | {"do_sample": True}).items()


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_vision_language_model_is_saved(kit, tmp_path, kind):
    from llava.train.train import train

    model = tiny.qwen2_vl(tmp_path / "model", kind)
    write(model, **VICUNA, early_stopping=True)
    data = kit.records("iiii")
    flags = dict(
        model_name_or_path=model,
        data_path=data,
        image_folder=Path(data).parent / "images",
        output_dir=tmp_path / "out",
        max_steps=1,
        per_device_train_batch_size=2,
        save_strategy="steps",
        save_steps=1,
        gradient_checkpointing=False,
    )
    train([word for key, value in flags.items() for word in (f"--{key}", str(value))])
    for folder in (tmp_path / "out", tmp_path / "out/checkpoint-1"):
        assert saved(folder)["do_sample"] is True and "early_stopping" not in saved(folder)
