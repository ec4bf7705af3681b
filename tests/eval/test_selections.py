"""Exact match of a Qwen2-VL with several selections: what is asked, counted and written, and what is refused."""

import json
import re
import subprocess
import sys

import pytest
import torch

from llava.errors import LlavaError
from llava.eval.exact_match import main
from llava.model.adaptive_patches import PatchChoice
from tests import tiny
from tests.model.qwen2_vl.parts import load, picture

RECORDS = [
    {"id": "a", "image": "0.png", "kind": "what", "conversations": ["<image>\nWhat is it?", "A temple."]},
    {"id": "b", "image": ["0.png", "1.png"], "kind": "pair", "conversations": ["<image>\n<image>\nSame?", "no"]},
    {"id": "c", "kind": "text", "conversations": ["Say yes.", "yes", "Again.", "yes"]},
    {"id": "d", "image": "1.png", "kind": "what", "system": "Be brief.", "conversations": ["<image>\nWhat?", "A."]},
]
SIZES = [(150, 120), (112, 112)]
GRIDS = [(10, 8), (8, 8)]  # columns and rows of 14 pixels, after rounding to 28


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    tiny.qwen2_vl(folder / "model")
    for number, size in enumerate(SIZES):
        picture(*size, number).save(folder / f"{number}.png")
    records = []
    for record in RECORDS:
        speakers = ("human", "gpt") * 2
        turns = [{"from": s, "value": t} for s, t in zip(speakers, record["conversations"], strict=False)]
        system = [{"from": "system", "value": record["system"]}] if "system" in record else []
        records.append({**record, "conversations": system + turns})
    (folder / "questions.json").write_text(json.dumps(records))
    return folder


def run(folder, *flags) -> dict:
    out = folder / "eval.json"
    words = ["--model-path", folder / "model", "--data-path", folder / "questions.json", "--image-folder", folder]
    main([str(word) for word in (*words, "--output", out, "--max-new-tokens", 4, *flags)])
    return json.loads(out.read_text())


def answers(folder, **selection) -> list[str]:
    """One question at a time, with the model's own generate."""
    from PIL import Image

    model, processor = load(folder / "model")
    found = []
    for record in json.loads((folder / "questions.json").read_text()):
        names = record.get("image", [])
        names = [names] if isinstance(names, str) else names
        images = {"images": [Image.open(folder / name) for name in names], "images_kwargs": selection} if names else {}
        messages = []
        for turn in record["conversations"]:
            text = turn["value"].replace("<image>\n", "")
            parts = [{"type": "image"}] * turn["value"].count("<image>") + [{"type": "text", "text": text}]
            if turn["from"] == "gpt":
                prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
                inputs = processor(text=[prompt], return_tensors="pt", **images)
                with torch.no_grad():
                    ids = model.generate(
                        **inputs, max_new_tokens=4, do_sample=False, eos_token_id=processor.tokenizer.eos_token_id
                    )
                new = ids[0, inputs["input_ids"].shape[1] :]
                found.append(processor.tokenizer.decode(new, skip_special_tokens=True).strip())
            messages.append(
                {"role": {"gpt": "assistant", "human": "user"}.get(turn["from"], "system"), "content": parts}
            )
    return found


def test_predictions_and_counts(folder, capsys):
    result = run(folder, "--selections", "budget:0.3", "none", "v2:2", "--batch-size", 3, "--blank-images")
    assert [q["prediction"] for q in result["questions"]] == answers(folder, patch_selection_method="budget", alpha=0.3)
    assert [(q["id"], q["answer"]) for q in result["questions"]] == [
        ("a", "A temple."),
        ("b", "no"),
        ("c", "yes"),
        ("c", "yes"),
        ("d", "A."),
    ]
    assert set(result) >= {"exact_match", "n", "by_kind", "questions", "blank_images", "image_folder", "selections"}
    rows = result["selections"]
    assert list(rows) == ["budget:0.3", "none", "v2:2"]
    first = rows["budget:0.3"]
    assert {key: first[key] for key in ("exact_match", "n", "by_kind")} == {
        key: result[key] for key in ("exact_match", "n", "by_kind")
    }
    patches = [columns * rows for columns, rows in GRIDS]
    shown = [patches[0], patches[0], patches[1], patches[1]]  # four pictures, of two sizes
    assert rows["none"]["vision_tokens"] == sum(shown) / 4 and rows["none"]["llm_tokens"] == sum(shown) / 16
    budgets = [round(0.3 * count) for count in shown]
    assert sum(budgets) / 4 - 2 <= first["vision_tokens"] <= sum(budgets) / 4
    assert first["llm_tokens"] < rows["none"]["llm_tokens"]
    printed = capsys.readouterr().out
    assert "selection" in printed and printed.rstrip().splitlines()[-1].startswith("held-out exact match: ")


def test_blank_pictures_are_not_counted(folder):
    """They are one patch or a few where the selection looks at the content."""
    plain, blank = run(folder, "--selections", "v1"), run(folder, "--selections", "v1", "--blank-images")
    assert "blank_images" in blank and plain["selections"]["v1"]["vision_tokens"] > 20
    for key in ("vision_tokens", "llm_tokens"):
        assert blank["selections"]["v1"][key] == plain["selections"]["v1"][key]


def test_the_folders_own_selection(folder):
    from llava.families import get_family

    chosen = get_family("qwen2_vl").load_processor(str(folder / "model"), patch_selection_method="v2", alpha=0.8)
    chosen.save_pretrained(folder / "model")
    result = run(folder, "--limit", "2")
    assert "selections" not in result and result["n"] == 2
    assert [q["prediction"] for q in result["questions"]] == answers(folder)[:2]


def test_selections():
    assert PatchChoice.parse("none") is None and PatchChoice.parse("budget:0.25") == PatchChoice("budget", 0.25)
    assert PatchChoice.parse("v2").alpha == 1.0 and PatchChoice.parse("v2:1.5").alpha == 1.5
    for wrong in ("budget", "v1:0.5", "none:1", "budget:x", "budget:-1", "v3", ""):
        with pytest.raises(LlavaError, match="expected none, v1, v2"):
            PatchChoice.parse(wrong)


def test_refusals(folder, tmp_path, capsys):
    llm = tiny.llm(tmp_path / "llm")
    for path, expected in [
        (llm, "no vision tower"),
        (tmp_path, "no config.json"),
    ]:
        with pytest.raises(SystemExit):
            main(
                [
                    "--model-path",
                    str(path),
                    "--data-path",
                    str(folder / "questions.json"),
                    "--image-folder",
                    str(folder),
                ]
            )
        assert expected in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(folder, "--model-base", llm)
    assert "is no LoRA adapter" in capsys.readouterr().err


def test_help_is_quick_to_say():
    words = [sys.executable, "-X", "importtime", "-m", "llava.eval.exact_match", "--help"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0 and "--selections" in done.stdout
    assert "argparse" in done.stderr and not re.search(r"\| +(torch|transformers)$", done.stderr, re.MULTILINE)
