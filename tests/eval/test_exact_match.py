"""Exact match: questions from records, scoring, batching, and what bad input says."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image

from llava.conversation import conv_templates
from llava.errors import LlavaError
from llava.eval.exact_match import Answerer, evaluate, main
from llava.eval.questions import chance, read_questions, score
from llava.families import get_family
from llava.families.base import Loaded
from llava.inference.engine import Inference

TEMPLATE = conv_templates["qwen_1_5"]


def turn(speaker: str, text: str) -> dict:
    return {"from": speaker, "value": text}


def record(name: str, *texts: str, **fields) -> dict:
    speakers = ("human", "gpt") * len(texts)
    return {"id": name, "conversations": [turn(*pair) for pair in zip(speakers, texts, strict=False)], **fields}


@pytest.fixture
def folder(tmp_path):
    for name, colour in (("light.png", (240, 240, 240)), ("dark.png", (10, 10, 10))):
        Image.new("RGB", (30, 20), colour).save(tmp_path / name)
    return tmp_path


RECORDS = [
    record("one", "<image>\nIs it light?", "yes", image="light.png", kind="light"),
    record("two", "Is it dark?\n<image>", "yes", "Is it light?", "no", image="dark.png", kind="dialogue"),
    record("pair", "<image> and <image>: are both light?", "no", image=["light.png", "dark.png"], kind="pair"),
    record("words", "Say yes.", "yes"),
]


def questions_of(folder, records=RECORDS):
    return read_questions(records, "F.json", str(folder), TEMPLATE)


class CharTokenizer:
    """A character is a token; 0 pads and 1 ends."""

    pad_token_id, eos_token_id, bos_token_id = 0, 1, None

    def __call__(self, text):
        return type("Encoding", (), {"input_ids": [ord(character) for character in text]})()

    def batch_decode(self, rows, skip_special_tokens):
        assert skip_special_tokens
        return ["".join(chr(token) for token in row if token > 1) for row in rows.tolist()]


class LightMeter:
    """Stands for a model: says yes where the question's last word suits the last picture's brightness."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self):
        self.config = type("Config", (), {"image_aspect_ratio": "pad"})()
        self.batches = []

    def get_vision_tower(self):
        return None

    def generate(self, input_ids, attention_mask, images=(), image_sizes=(), modalities=(), **options):
        assert not options["do_sample"] and options["eos_token_id"] == [1]
        assert len(images) == len(image_sizes) == len(modalities) == int((input_ids == -200).sum())
        self.batches.append(len(input_ids))
        answers, at = [], 0
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            assert mask.tolist() == sorted(mask.tolist()) and not ids[mask == 0].any()  # padding on the left
            count = int((ids == -200).sum())
            light = bool(count) and images[at + count - 1].mean() > 0
            at += count
            question = "".join(chr(token) for token in ids[mask == 1].tolist() if token > 1).rsplit("user\n", 1)[1]
            answers.append("yes" if ("dark" in question) != light else "no")
        width = max(map(len, answers))
        return torch.tensor([[*map(ord, text), 1, 0, 0][: width + 1] for text in answers])


class Processor:
    """Pixels between -1 and 1, brightness kept."""

    image_mean = (0.3, 0.3, 0.3)

    def preprocess(self, image, return_tensors):
        value = image.getpixel((image.width // 2, image.height // 2))[0] / 127.5 - 1
        return {"pixel_values": torch.full((1, 3, 4, 4), value)}


def answerer(**options) -> Answerer:
    tokenizer = CharTokenizer()
    loaded = Loaded(LightMeter(), tokenizer, tokenizer, Processor(), 4096, "qwen_1_5")
    return Answerer(Inference(get_family("llava"), loaded), **options)


def test_every_answer_is_a_question_after_the_true_turns(folder):
    questions = questions_of(folder)
    assert [(q.id, q.kind, q.answer) for q in questions] == [
        ("one", "light", "yes"),
        ("two", "dialogue", "yes"),
        ("two", "dialogue", "no"),
        ("pair", "pair", "no"),
        ("words", "all", "yes"),
    ]
    inference = answerer().inference
    prompt = inference.family.prompt_text(questions[2].turns, inference.loaded)
    assert prompt.endswith(
        "<|im_start|>user\n<image>\nIs it dark?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
        "<|im_start|>user\nIs it light?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert not TEMPLATE.messages


def test_records_without_media_or_without_an_image_token(folder):
    """As they are trained: <image> is text, pictures are unused; other forms are read too."""
    parts, reply = [{"type": "image"}, {"type": "text", "text": "Light?"}], {"role": "assistant", "content": "yes"}
    records = [
        record("tag", "Is <image>\nan RSS tag?", "<image>", "QA_GT_caption_based_noisySure?", "yes"),
        record("unused", "Is it light?", "no", image="light.png"),
        {"id": "parts", "image": "light.png", "messages": [{"role": "user", "content": parts}, reply]},
    ]
    questions = questions_of(folder, records)
    assert [len(question.paths) for question in questions] == [0, 0, 0, 1]
    assert questions[0].text == "Is <image>\nan RSS tag?" and questions[3].text == "Light?"
    inference = answerer().inference
    start = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    shown = ["Is <image>\nan RSS tag?", None, "Is it light?", "<image>\nLight?"]
    for question, text in zip(questions, shown, strict=True):
        ids = question.prompt(inference)
        assert ids.count(-200) == len(question.paths)
        written = "".join("<image>" if token == -200 else chr(token) for token in ids)
        assert text is None or written == f"{start}{text}<|im_end|>\n<|im_start|>assistant\n"
    assert "<image><|im_end|>" in "".join(map(chr, questions[1].prompt(inference)))
    result = evaluate(answerer(), questions)
    assert [row["image"] for row in result["questions"]] == [None, None, None, "light.png"]


def test_a_system_turn_is_used_where_the_model_was_trained_so(folder):
    system = {"from": "system", "value": "Be brief."}
    asked = record("one", "Is it light?", "no")
    (question,) = questions_of(folder, [{**asked, "conversations": [system, *asked["conversations"]]}])
    inference = answerer().inference
    helpful = "You are a helpful assistant."
    for setting, text in ((None, helpful), ("template", helpful), ("record", "Be brief.")):
        inference.loaded.system_turn = setting
        prompt = inference.family.prompt_text(question.turns, inference.loaded)
        assert prompt.startswith(f"<|im_start|>system\n{text}<|im_end|>\n<|im_start|>user\nIs it")


def test_score_strips_blanks_and_keeps_case():
    class Asked:
        def __init__(self, kind, answer):
            self.kind, self.answer = kind, answer

    questions = [Asked("a", "Yes"), Asked("a", "no"), Asked("b", "no"), Asked("b", "no")]
    result = score(questions, [" Yes\n", "No", "no", ""])
    assert result == {
        "exact_match": 0.5,
        "n": 4,
        "by_kind": {"a": {"exact_match": 0.5, "n": 2}, "b": {"exact_match": 0.5, "n": 2}},
    }
    assert chance(questions) == {"a": 0.5, "b": 1.0}


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_evaluate(folder, batch_size):
    asking = answerer(batch_size=batch_size)
    result = evaluate(asking, questions_of(folder), blank_images=True)
    got = {(q["id"], q["question"]): (q["prediction"], q["correct"]) for q in result["questions"]}
    assert got == {
        ("one", "Is it light?"): ("yes", True),
        ("two", "Is it dark?"): ("yes", True),
        ("two", "Is it light?"): ("no", True),
        ("pair", "and : are both light?"): ("no", True),
        ("words", "Say yes."): ("no", False),
    }
    assert (result["exact_match"], result["n"]) == (0.8, 5)
    assert result["by_kind"]["dialogue"] == {"exact_match": 1.0, "n": 2}
    blank = result["blank_images"]
    assert blank["n"] == 4 and "all" not in blank["by_kind"]
    assert blank["by_kind"]["light"] == {"exact_match": 0.0, "n": 1, "chance": 1.0}  # one colour, below the middle
    assert blank["by_kind"]["dialogue"]["chance"] == 0.5
    assert max(asking.inference.model.batches) <= batch_size
    assert json.loads(json.dumps(result)) == result


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"image": "gone.png"}, "gone.png"),
        ({"image": "../light.png"}, "leaves the folder"),
        ({"image": ["light.png", "dark.png"]}, "1 <image> for 2"),
        ({"conversations": []}, "conversations"),
    ],
)
def test_a_bad_record_is_named(folder, broken, said):
    with pytest.raises(LlavaError, match=said) as caught:
        questions_of(folder, [*RECORDS, {**RECORDS[0], "id": "bad", **broken}])
    assert str(caught.value).startswith("F.json: record bad: ") and "\n" not in str(caught.value)


def test_a_picture_cut_short_is_named(folder):
    (folder / "light.png").write_bytes((folder / "light.png").read_bytes()[:60])
    with pytest.raises(LlavaError, match=r"record one: image .*light\.png"):
        answerer().answer(questions_of(folder))


def test_main_says_what_is_wrong_before_loading_a_model(tmp_path, capsys):
    bad = tmp_path / "bad.json"
    bad.write_text('[\n{"id": 1,\n]')
    with pytest.raises(SystemExit) as caught:
        main(["--model-path", str(tmp_path / "none"), "--data-path", str(bad)])
    assert caught.value.code == 2
    assert f"{bad}, line 3" in capsys.readouterr().err


def test_help_needs_no_torch():
    code = "import sys, llava.eval.exact_match as m; m.build_parser().format_help(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
