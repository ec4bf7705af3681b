"""Batch prediction: rows, order, resuming, faults, several processes."""

import hashlib
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.errors import LlavaError
from llava.eval import answer_file
from llava.eval.model_vqa import build_parser, chunk, main, read_question_file, run
from llava.eval.score import main as score
from llava.eval.weights_hash import is_here, weights_hash
from llava.inference.engine import Inference
from tests.eval import common

QUESTIONS = [
    ("What is shown?", 1),
    ("Describe the picture in detail, please, with all its colours.", 1),
    ("Say yes.", 0),
    ("Are they alike?", 2),
    ("<image>\nIs this <image>?", 2),
    ("What?", 1),
    ("Who was it that painted this picture, and when?", 1),
]


def jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def question_rows(rounds: int = 2) -> list[dict]:
    rows, at = [], 0
    for number in range(rounds * len(QUESTIONS)):
        text, images = QUESTIONS[number % len(QUESTIONS)]
        names = [f"{(at + i) % 5}.png" for i in range(images)]
        at += images
        row = {"question_id": number, "text": text, "category": "c"}
        rows.append(row | ({"image": names[0] if images == 1 else names} if images else {}))
    return rows


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kit")
    common.pictures(folder, 5)
    jsonl(folder / "q.jsonl", question_rows())
    common.checkpoint(folder)
    return folder


def flags(kit, answers, **changes) -> list[str]:
    values = {
        "model-path": kit / "llava-tiny",
        "image-folder": kit,
        "question-file": kit / "q.jsonl",
        "answers-file": answers,
        "max_new_tokens": 6,
        "batch-size": 4,
    }
    return [part for key, value in (values | changes).items() for part in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def whole(kit):
    """The rows of an undisturbed run that asks one at a time."""
    main(flags(kit, kit / "whole.jsonl", **{"batch-size": 1}))
    return read(kit / "whole.jsonl")


def test_rows_are_llavas_in_the_order_of_the_questions(kit, whole):
    assert [(row["question_id"], row["prompt"]) for row in whole] == [
        (row["question_id"], row["text"]) for row in question_rows()
    ]
    assert list(whole[0]) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert {row["model_id"] for row in whole} == {"llava-tiny"}
    assert len({row["answer_id"] for row in whole}) == len(whole)
    assert len({row["text"] for row in whole}) > len(whole) // 2  # the model looks at its question


def test_answers_are_those_of_a_prompt_written_out(kit, whole):
    inference = Inference.load(str(kit / "llava-tiny"))
    from PIL import Image

    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    for number, user in ((3, "<image> <image>\nAre they alike?"), (4, QUESTIONS[4][0]), (2, "Say yes.")):
        prompt = f"{system}<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
        names = question_rows()[number].get("image", [])
        images = [Image.open(kit / name).convert("RGB") for name in names]
        expected = inference.generate([inference.tokens(prompt)], [images], max_new_tokens=6)
        assert whole[number]["text"] == expected[0]


@pytest.mark.parametrize("batch_size", [3, 64])
def test_the_batch_size_changes_nothing(kit, whole, tmp_path, batch_size):
    main(flags(kit, tmp_path / "a.jsonl", **{"batch-size": batch_size}))
    assert read(tmp_path / "a.jsonl") == whole


def test_chunks_make_up_the_whole(kit, whole, tmp_path):
    for index in range(3):
        main(flags(kit, tmp_path / f"{index}.jsonl", **{"num-chunks": 3, "chunk-idx": index}))
    assert [row for index in range(3) for row in read(tmp_path / f"{index}.jsonl")] == whole
    assert [chunk(list(range(4)), 3, index) for index in range(3)] == [[0, 1], [2, 3], []]
    with pytest.raises(LlavaError, match="found 3, expected 0 to 2"):
        chunk([], 3, 3)


def beside(kit, answers) -> None:
    """What says that a file's rows are of the kit's model."""
    meta = read(f"{kit}/whole.jsonl.meta.json")
    jsonl(Path(f"{answers}.meta.json"), meta)


def test_only_what_is_not_answered_is_asked(kit, whole, tmp_path, monkeypatch, capsys):
    path = tmp_path / "a.jsonl"
    beside(kit, path)
    marked = [row | {"text": "from before"} for row in whole[:9:2]]
    jsonl(path, marked)
    with open(path, "a") as file:
        file.write(json.dumps(whole[1])[:50])  # torn
    asked = []
    generate = Inference.generate
    monkeypatch.setattr(Inference, "generate", lambda self, p, *a, **k: asked.extend(p) or generate(self, p, *a, **k))
    main(flags(kit, path))
    assert len(asked) == len(whole) - len(marked)
    kept = {row["question_id"]: row for row in marked}
    assert read(path) == [kept.get(row["question_id"], row) for row in whole]
    assert f"{len(marked)} of {len(whole)} questions were answered before" in capsys.readouterr().out
    before = path.stat().st_mtime_ns
    main(flags(kit, path))
    assert len(asked) == len(whole) - len(marked) and path.stat().st_mtime_ns == before


def test_a_bad_picture_is_named_and_asked_again(kit, whole, tmp_path, capsys):
    for name in os.listdir(kit):
        if name.endswith(".png") and name != "2.png":
            (tmp_path / name).write_bytes((kit / name).read_bytes())
    (tmp_path / "2.png").write_bytes((kit / "2.png").read_bytes()[:90])
    bad = {row["question_id"] for row in question_rows() if "2.png" in row.get("image", [])}
    assert len(bad) > 1
    with pytest.raises(SystemExit) as caught:
        main(flags(kit, tmp_path / "a.jsonl", **{"image-folder": tmp_path}))
    assert caught.value.code == 1
    assert read(tmp_path / "a.jsonl") == [row for row in whole if row["question_id"] not in bad]
    errors = capsys.readouterr().err
    for number in bad:
        assert f"error: question {number}: image {tmp_path / '2.png'}" in errors
    assert f"error: {len(bad)} questions have no answer" in errors
    (tmp_path / "2.png").write_bytes((kit / "2.png").read_bytes())
    main(flags(kit, tmp_path / "a.jsonl", **{"image-folder": tmp_path}))
    assert read(tmp_path / "a.jsonl") == whole


def test_a_fault_that_is_no_pictures_is_not_swallowed(kit, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("top_p must be between")

    monkeypatch.setattr(Inference, "generate", broken)
    with pytest.raises(ValueError, match="top_p"):
        run(build_parser().parse_args(flags(kit, tmp_path / "a.jsonl")))


@pytest.mark.parametrize(
    ("change", "said"),
    [({"model_id": "other"}, "found answers of 'other'"), ({"answer_id": "x"}, "question 0: found an answer that is")],
)
def test_a_file_of_other_answers_is_left_alone(kit, whole, tmp_path, change, said):
    path = jsonl(tmp_path / "a.jsonl", [whole[0] | change])
    beside(kit, path)
    before = read(path)
    with pytest.raises(LlavaError, match=said):
        run(build_parser().parse_args(flags(kit, path)))
    assert read(path) == before


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "x"}, "row 1: question_id: found None"),
        ({"question_id": 1}, r"row 1 \(question 1\): text: found None"),
        ({"question_id": 1, "text": "x", "image": "../0.png"}, "leaves the folder"),
        ({"question_id": 1, "text": "<image>", "image": ["0.png"] * 2}, "found 1 <image> for 2 images"),
        ({"question_id": 1, "text": "x", "video": "v.mp4"}, "video: found a video"),
    ],
)
def test_a_bad_question_is_named(kit, tmp_path, row, said):
    path = jsonl(tmp_path / "q.jsonl", [row])
    inference = Inference.load(str(kit / "llava-tiny"))
    with pytest.raises(LlavaError, match=said):
        read_question_file(path, str(kit), inference)


def test_llava_records_and_shared_ids(kit, tmp_path):
    inference = Inference.load(str(kit / "llava-tiny"))
    turns = [("human", "<image>\nA?"), ("gpt", "yes"), ("human", "B?"), ("gpt", "no")]
    record = {"id": "r", "image": "0.png", "conversations": [{"from": who, "value": text} for who, text in turns]}
    rows = [record, *[{"question_id": "p", "text": text} for text in ("A?", "B?", "A?")]]
    asked = read_question_file(jsonl(tmp_path / "q.jsonl", rows), str(kit), inference)
    assert [question.key for question in asked] == [
        ("r#1", "A?", 0),
        ("r#2", "B?", 0),
        ("p", "A?", 0),
        ("p", "B?", 0),
        ("p", "A?", 1),
    ]
    assert asked[1].turns == turns[:3] and asked[1].paths == [str(kit / "0.png")]


def test_question_files_in_other_forms(kit, tmp_path):
    inference = Inference.load(str(kit / "llava-tiny"))
    parts = [{"type": "image_url", "image_url": "0.png"}, {"type": "text", "text": "A?"}]
    rows = [
        {"question_id": 1, "text": "What is <image>\nin RSS?"},
        {"question_id": 2, "text": "Alike?", "images": ["0.png", "1.png"]},
        {"id": 3, "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "yes"}]},
    ]
    path = jsonl(tmp_path / "q.jsonl", rows)
    with open(path, encoding="utf-8-sig") as file:
        text = file.read()
    (tmp_path / "q.jsonl").write_text(text, encoding="utf-8-sig")
    asked = read_question_file(path, str(kit), inference)
    assert [question.key for question in asked] == [(1, rows[0]["text"], 0), (2, "Alike?", 0), (3, "A?", 0)]
    assert [len(question.paths) for question in asked] == [0, 2, 1]
    assert [question.prompt(inference).count(-200) for question in asked] == [0, 2, 1]
    assert "<image>\nin RSS" in inference.tokenizer.decode(asked[0].prompt(inference))
    with pytest.raises(LlavaError, match=r"row 1 \(question 1\): unknown key 'img': did you mean 'image'"):
        read_question_file(
            jsonl(tmp_path / "b.jsonl", [{"question_id": 1, "text": "x", "img": "0.png"}]), None, inference
        )


def test_answer_files_are_read_whole(tmp_path):
    path = str(tmp_path / "a[1].jsonl")  # a name that is also a pattern
    answer_file.append(path, [{"a": "é"}])
    answer_file.append(answer_file.rank_path(path, 1), [{"b": 1}, {"b": 2}])
    answer_file.append(answer_file.rank_path(path, 10), [{"c": 1}])
    assert answer_file.collect(path) == [{"a": "é"}, {"b": 1}, {"b": 2}, {"c": 1}]
    answer_file.write_in_order(path, [{"c": 1}])
    assert os.listdir(tmp_path) == ["a[1].jsonl"] and answer_file.collect(path) == [{"c": 1}]
    with open(path, "ab") as file:
        file.write('{"d": "é'.encode()[:-1])  # torn inside a character
    assert answer_file.read_rows(path) == [{"c": 1}] and os.path.getsize(path) == len('{"c": 1}\n')
    with open(path, "ab") as file:
        file.write(b'{"d": \n{"e": 1}\n')
    with pytest.raises(LlavaError, match="line 2"):
        answer_file.read_rows(path)


# --- what the answers are of ---


def retrained(folder) -> None:
    """Other weights of the same names and sizes."""
    weights = load_file(f"{folder}/model.safetensors")
    weights["lm_head.weight"] = torch.randn(weights["lm_head.weight"].shape, generator=torch.Generator().manual_seed(1))
    save_file(weights, f"{folder}/model.safetensors", metadata={"format": "pt"})


def refused(capsys, argv) -> str:
    """The one line that a run is refused with."""
    with pytest.raises(SystemExit) as caught:
        main(argv)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert caught.value.code == 2 and len(errors) == 1
    return errors[0]


def test_what_is_beside_the_answers(kit, whole):
    (meta,) = read(kit / "whole.jsonl.meta.json")
    assert list(meta) == ["schema", "model", "weights_hash", "template", "settings", "questions_hash"]
    assert (meta["schema"], meta["model"], meta["template"]) == (1, str(kit / "llava-tiny"), "qwen_1_5")
    assert meta["questions_hash"] == hashlib.sha256((kit / "q.jsonl").read_bytes()).hexdigest()
    settings = {"max_new_tokens": 6, "num_beams": 1, "temperature": 0.0, "model_base": None, "vision_tower": None}
    assert meta["settings"] == settings | {"dtype": "float32"}


def test_answers_of_other_weights_are_refused_until_overwritten(kit, whole, tmp_path, capsys):
    model, path = tmp_path / "llava-tiny", tmp_path / "a.jsonl"
    shutil.copytree(kit / "llava-tiny", model)
    jsonl(path, whole[:3])  # cut short
    beside(kit, path)
    words = {"model-path": model}
    main(flags(kit, path, **words))  # a copy of the folder is the same model
    assert read(path) == whole
    retrained(model)
    assert "weights_hash" in refused(capsys, flags(kit, path, **words)) and read(path) == whole
    main([*flags(kit, path, **words), "--overwrite"])
    fresh = read(path)
    assert [row["text"] for row in fresh] != [row["text"] for row in whole]
    main(flags(kit, path, **words))  # its own by now
    assert read(path) == fresh


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"max_new_tokens": 9}, "max_new_tokens 6, now 9"),
        ({"temperature": 0.5}, "temperature 0.0, now 0.5; seed None, now 0"),
        ({"num_beams": 2}, "num_beams 1, now 2"),
        ({"conv-mode": "v1"}, "template qwen_1_5, now v1"),
        ({"dtype": "bfloat16"}, "dtype float32, now bfloat16"),
        ({"question-file": "other"}, "questions_hash"),
    ],
)
def test_what_differs_is_named(kit, whole, tmp_path, capsys, change, said):
    path = jsonl(tmp_path / "a.jsonl", whole[:2])
    beside(kit, path)
    if "question-file" in change:
        change = {"question-file": jsonl(tmp_path / "q.jsonl", question_rows()[:9])}
    line = refused(capsys, flags(kit, path, **change))
    assert said in line and "--overwrite" in line and line.count(", now ") == max(said.count(", now "), 1)
    assert read(path) == whole[:2]


@pytest.mark.parametrize(
    ("meta", "said"),
    [
        (None, "found answers without"),
        ("{", "cannot be read"),
        ("[]", "found list, expected"),
        ('{"schema": 1}', r"found \['schema'\], expected model"),
        ("2", "found schema 2, expected 1"),
    ],
)
def test_answers_of_unknown_origin_are_refused(kit, whole, tmp_path, capsys, meta, said):
    path, about = tmp_path / "a.jsonl", tmp_path / "a.jsonl.meta.json"
    if meta:
        about.write_text(json.dumps(read(kit / "whole.jsonl.meta.json")[0] | {"schema": 2}) if meta == "2" else meta)
    main(flags(kit, path))  # without an answer it says nothing
    assert read(path) == whole
    if meta is None:
        about.unlink()
    else:
        about.write_text(json.dumps(read(about)[0] | {"schema": 2}) if meta == "2" else meta)
    assert re.search(said, refused(capsys, flags(kit, path)))
    main([*flags(kit, path), "--overwrite"])
    assert read(path) == whole and read(about) == read(kit / "whole.jsonl.meta.json")


def test_every_file_of_a_model_counts(kit, tmp_path):
    base, adapter, tower = tmp_path / "base", tmp_path / "adapter", tmp_path / "tower"
    shutil.copytree(kit / "llava-tiny", base)
    shutil.copytree(kit / "clip", tower)
    adapter.mkdir()
    save_file({"base_model.model.a.lora_A.weight": torch.zeros(2, 2)}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(base)})
    )
    whole, over = weights_hash(str(base)), weights_hash(str(adapter))
    assert len({whole, over}) == 2 and over == weights_hash(str(adapter), str(kit / "llava-tiny"))
    (base / "trainer_state.json").write_text("{}")
    os.utime(base / "model.safetensors", (1, 1))
    assert weights_hash(str(base)) == whole
    for name in ("config.json", "model.safetensors"):
        before = weights_hash(str(base)), weights_hash(str(adapter))
        content = bytearray((base / name).read_bytes())
        content[-2] ^= 1 if name == "model.safetensors" else 0
        (base / name).write_bytes(content + (b"\n" if name == "config.json" else b""))
        assert not {weights_hash(str(base)), weights_hash(str(adapter))} & set(before)
    # of a checkpoint without its tower's weights, where those come from
    weights = load_file(base / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "vision_tower" not in k}, base / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"mm_vision_tower": str(tower)}))
    before = weights_hash(str(base))
    content = bytearray((tower / "model.safetensors").read_bytes())
    content[-2] ^= 1
    (tower / "model.safetensors").write_bytes(content)
    assert weights_hash(str(base)) != before and is_here(str(base))
    assert weights_hash("no/such-model") is None and not is_here("no/such-model")


def scored(capsys, *flags) -> tuple[int, str, str]:
    """(exit status, output, errors) of `score`."""
    try:
        score(list(map(str, flags)))
        status = 0
    except SystemExit as end:
        status = end.code
    said = capsys.readouterr()
    return status, said.out, said.err


def test_score_says_where_the_answers_do_not_match(kit, whole, tmp_path, capsys):
    model, path, references = tmp_path / "llava-tiny", tmp_path / "a.jsonl", tmp_path / "r.jsonl"
    shutil.copytree(kit / "llava-tiny", model)
    main(flags(kit, path, **{"model-path": model}))
    capsys.readouterr()
    jsonl(references, [row | {"answer": "x"} for row in question_rows()])
    given = ["--answers", path, "--references", references, "--metric", "exact"]
    assert scored(capsys, *given, "--question-file", kit / "q.jsonl")[::2] == (0, "")
    status, _, errors = scored(capsys, *given, "--question-file", references)
    assert status == 2 and "answers to another question file" in errors
    os.utime(model / "model.safetensors")  # touched, the same weights
    assert scored(capsys, *given)[::2] == (0, "")
    retrained(model)
    status, out, errors = scored(capsys, *given)
    assert status == 2 and not out and errors.count("\n") == 1 and "has changed since it answered" in errors
    assert scored(capsys, *given, "--allow_changed_model")[::2] == (0, "")
    shutil.rmtree(model)  # gone: nothing can be said of it
    assert scored(capsys, *given)[::2] == (0, "")
    rows = read(path)
    jsonl(path, [row | {"model_id": "other"} for row in rows])
    assert "found answers of 'other', but of 'llava-tiny'" in scored(capsys, *given)[2]
    jsonl(path, [rows[0] | {"model_id": "other"}, *rows[1:]])
    assert "found answers of 'llava-tiny' and of 'other'" in scored(capsys, *given)[2]
    jsonl(path, rows[:3])
    status, out, errors = scored(capsys, *given)
    assert status == 1 and "11 without an answer" in out and "11 of 14 references have no answer" in errors
    Path(f"{path}.meta.json").unlink()
    jsonl(path, [{"question_id": row["question_id"], "text": row["text"]} for row in rows])  # another program's
    status, _, errors = scored(capsys, *given)
    assert status == 0 and errors.startswith("note: ") and errors.count("\n") == 1


PROGRAM = "llava.eval.model_vqa:main"


def test_two_processes_are_refused_together(kit, whole, forks, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", whole[:3])
    beside(kit, path)
    for change, said in (({"num_beams": 2}, "num_beams 1, now 2"), ({"conv-mode": "v1"}, "template qwen_1_5, now v1")):
        status, output = forks.ranks(2, flags(kit, path, **change), tmp_path / "log", PROGRAM)
        assert status == 2 and output.count("error:") == 1 and said in output and "Traceback" not in output
    assert read(path) == whole[:3]
    status, output = forks.ranks(2, [*flags(kit, path), "--overwrite"], tmp_path / "log", PROGRAM)
    assert status == 0 and "answered before" not in output and read(path) == whole


def test_two_processes_killed_and_resumed_answer_as_one(kit, forks, tmp_path):
    jsonl(kit / "many.jsonl", question_rows(rounds=30))
    words = {"question-file": kit / "many.jsonl", "batch-size": 2}
    path = tmp_path / "a.jsonl"
    parts = [path, tmp_path / "a.jsonl.rank1"]
    ranks = forks.start_ranks(2, flags(kit, path, **words), kit / "log", PROGRAM)
    deadline = time.monotonic() + 120
    while not all(part.exists() and part.read_text().count("\n") >= 6 for part in parts):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for rank in ranks:
        os.kill(rank, signal.SIGKILL)
    assert [forks.end(rank) for rank in ranks] == [-signal.SIGKILL] * 2, "it ended before it could be killed"
    before = sum(part.read_text().count("\n") for part in parts)
    with open(parts[1], "a") as file:
        file.write('{"question_id": 5, "prom')
    status, output = forks.ranks(2, flags(kit, path, **words), kit / "log", PROGRAM)
    assert status == 0, output
    assert f"{before} of 210 questions were answered before" in output and 12 <= before < 210
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "a.jsonl.meta.json"]
    main(flags(kit, tmp_path / "one.jsonl", **words | {"batch-size": 32}))
    assert read(path) == read(tmp_path / "one.jsonl")
