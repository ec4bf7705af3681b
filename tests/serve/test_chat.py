"""The conversation behind the chat: prompts, streaming, ends of answers, limits, saving."""

import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from llava.conversation import conv_templates
from llava.data.dataset import LazySupervisedDataset
from llava.data.records import load_records
from llava.data.validate import validate_records
from llava.errors import LlavaError
from llava.inference.engine import Inference
from llava.serve.chat import Chat
from llava.serve.stream import AnswerStream
from tests.data.common import llava_parts
from tests.serve import checkpoints

GREEDY = {"do_sample": False}
NEW = 12


@pytest.fixture(scope="module")
def inference(tmp_path_factory):
    return Inference.load(checkpoints.save(tmp_path_factory.mktemp("chat")), device="cpu")


@pytest.fixture
def chat(inference):
    return Chat(inference, max_new_tokens=NEW, **GREEDY)


@pytest.fixture
def pictures(tmp_path):
    for name, size in (("a.png", (50, 30)), ("b.png", (20, 60))):
        Image.linear_gradient("L").resize(size).convert("RGB").save(tmp_path / name)
    return tmp_path


def test_a_conversation_is_what_the_template_renders(chat, inference, pictures):
    """And every answer is the one that `Inference` gives to the whole prompt."""
    images = [Image.open(pictures / name).convert("RGB") for name in ("a.png", "b.png")]
    chat.add_picture(str(pictures / "a.png"))
    first = chat.ask("What is shown?")
    chat.add_picture(str(pictures / "b.png"))
    second = chat.ask("And here?")
    third = chat.ask("Are both alike?")
    expected = conv_templates["qwen_1_5"].copy()
    user, assistant = expected.roles
    rounds = [("<image>\nWhat is shown?", first), ("<image>\nAnd here?", second), ("Are both alike?", third)]
    seen = (1, 2, 2)
    for (question, answer), count in zip(rounds, seen, strict=True):
        expected.append_message(user, question)
        expected.append_message(assistant, None)
        ids = inference.tokens(expected.get_prompt())
        assert inference.generate([ids], [images[:count]], max_new_tokens=NEW) == [answer]
        expected.messages[-1][1] = answer
    assert first and second and third and len({first, second, third}) == 3
    assert not inference.template.messages


@pytest.mark.parametrize("name", list(conv_templates))
def test_every_template(inference, name, pictures):
    """Prompts of any template, with a picture, a second round, and `<im_start>` around the picture."""
    chat = Chat(Inference(inference.family, inference.loaded, name))
    if name.endswith("plain"):
        assert chat.prompt([("human", "<image>\n")]).startswith("<image>")
        return
    turns = [("human", "<image>\nWhat?"), ("gpt", "A cat."), ("human", "Where?")]
    expected = conv_templates[name].copy()
    for index, (_, text) in enumerate(turns):
        expected.append_message(expected.roles[index % 2], text)
    expected.append_message(expected.roles[1], None)
    assert chat.prompt(turns) == expected.get_prompt()


def test_im_start_and_end_as_in_training(chat, inference, monkeypatch):
    monkeypatch.setattr(inference.model.config, "mm_use_im_start_end", True, raising=False)
    assert "user\n<im_start><image><im_end>\nWhat?<|im_end|>" in chat.prompt([("human", "<image>\nWhat?")])
    assert "user\n<im_start><image><im_end>\nWhat?<|im_end|>" in chat.prompt([("human", "What? <image>")])


def test_pictures_go_where_they_are_typed(chat, pictures):
    for name in ("a.png", "b.png"):
        chat.add_picture(str(pictures / name))
    assert chat.message("Alike?") == "<image>\n<image>\nAlike?"
    assert chat.message("Is <image> like <image>?") == "Is <image> like <image>?"
    with pytest.raises(LlavaError, match="found 1 <image> for 2 new pictures"):
        chat.ask("Is <image> nice?")
    assert len(chat.waiting) == 2 and not chat.turns


# --- streaming, and where an answer ends ---


def test_the_stream_is_the_answer_in_pieces(chat, inference):
    pieces = []
    chat.max_new_tokens = 60
    answer = chat.ask("Tell me.", pieces.append)
    assert "".join(pieces) == answer and len(pieces) > 10
    ids = inference.tokens(chat.prompt([("human", "Tell me.")]))
    assert [answer] == inference.generate([ids], [[]], max_new_tokens=60)


class Bytes:
    """A tokenizer whose tokens are bytes."""

    @staticmethod
    def decode(ids, skip_special_tokens):
        return bytes(ids).decode("utf-8", errors="replace")


def streamed(text, stops, size=1, tokenizer=Bytes, prompt=()):
    """(pieces, text) of a stream that gets the bytes of `text`, or a tokenizer's tokens, in parts."""
    pieces, stream = [], AnswerStream(tokenizer, stops, lambda piece: pieces.append(piece))
    stream.put(torch.tensor([prompt], dtype=torch.long))
    data = list(text.encode()) if tokenizer is Bytes else tokenizer(text, add_special_tokens=False).input_ids
    for at in range(0, len(data), size):
        stream.put(torch.tensor(data[at : at + size]))
    stream.end()
    return pieces, stream.text


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("A small cat.", [], "A small cat."),
        ("  blanks \n\n  inside \n", [], "blanks \n\n  inside"),
        ("猫と犬 🐈 é", [], "猫と犬 🐈 é"),
        ("One.###Human: two", ["###"], "One."),
        ("a # b ## c ###", ["###"], "a # b ## c"),
        ("ends with ##", ["###"], "ends with ##"),
        ("a caption\nmore", ["\n"], "a caption"),
        ("", ["###"], ""),
    ],
)
def test_nothing_is_shown_that_is_not_in_the_answer(text, stops, expected, size):
    pieces, final = streamed(text, stops, size)
    assert "".join(pieces) == final == expected
    assert len(pieces) > 1 or len(expected) < 9 or "\n" in stops


def test_the_prompt_is_no_part_of_the_answer():
    """It is empty where `generate` works from embeddings, and the prompt's tokens where it does not."""
    pieces, final = streamed("a cat", [], prompt=list(b"USER: what is it? "))
    assert "".join(pieces) == final == "a cat"


@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_indentation_is_streamed_as_it_is(name):
    """Llama's tokenizer drops a blank where decoding begins, as at every line of transformers' `TextStreamer`."""
    text = "def f():\n    return 1"
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parents[1] / "golden" / "llava" / f"tokenizer_{name}")
    pieces, final = streamed(text, [], tokenizer=tokenizer)
    assert "".join(pieces) == final == text and len(pieces) > 3


def test_a_separator_that_is_text_ends_the_answer(inference, monkeypatch):
    """As under v0, whose `###` is no token."""
    free = Chat(inference, max_new_tokens=40, **GREEDY).ask("Go on.")
    stop = free[8:11]
    assert free.index(stop) == 8
    monkeypatch.setitem(conv_templates, "stopping", dataclasses.replace(conv_templates["qwen_1_5"], stop_str=stop))
    stopping = Inference(inference.family, inference.loaded, "stopping")
    assert stopping.stop_texts == [stop]
    pieces, lengths = [], []
    hook = inference.model.lm_head.register_forward_hook(lambda *args: lengths.append(1))
    answer = Chat(stopping, max_new_tokens=40, **GREEDY).ask("Go on.", pieces.append)
    hook.remove()
    assert answer == "".join(pieces) == free[:8].strip() and len(lengths) < 40


def test_the_templates_separator_ends_an_answer_as_a_token(inference):
    """Also where the tokenizer's end token is another, as in base models."""
    tokenizer = inference.tokenizer
    end = tokenizer.eos_token
    try:
        tokenizer.eos_token = "<|endoftext|>"
        assert inference.stop_ids == [700, 701] and inference.stop_texts == []
    finally:
        tokenizer.eos_token = end
    plain = Inference(inference.family, inference.loaded, "v0")
    assert plain.stop_texts == ["###"] and plain.stop_ids == [700]


# --- limits and faults ---


def test_a_conversation_that_is_too_long_is_refused(chat, inference, pictures, monkeypatch):
    chat.add_picture(str(pictures / "a.png"))
    prompt = inference.tokens(chat.prompt([("human", chat.message("What?"))]))
    text = len(prompt) - 1
    pixels = inference.inputs([prompt], [[chat.waiting[0].image]])["images"][0]
    visual = inference.model.visual_token_counter()(tuple(pixels.shape), (50, 30))
    monkeypatch.setattr(inference.loaded, "context", text + visual)
    counts = rf"{text + visual} tokens \({text} of text, {visual} of pictures\), expected fewer than the model's"
    with pytest.raises(LlavaError, match=counts):
        chat.ask("What?")
    assert not chat.turns and len(chat.waiting) == 1
    monkeypatch.setattr(inference.loaded, "context", text + visual + 3)
    chat.ask("What?")  # room for three tokens
    assert len(inference.tokenizer(chat.turns[-1][1]).input_ids) <= 6 and len(chat.turns) == 2


def test_clear(chat, pictures):
    fresh = chat.ask("Who?")
    chat.add_picture(str(pictures / "a.png"))
    chat.ask("What is shown?")
    chat.add_picture(str(pictures / "b.png"))
    chat.clear()
    assert (chat.turns, chat.pictures, chat.waiting) == ([], [], [])
    assert chat.ask("Who?") == fresh


def test_an_interrupt_ends_the_answer_alone(chat):
    whole = Chat(chat.inference, max_new_tokens=40, **GREEDY).ask("Tell me.")
    shown = []

    def interrupt(piece):
        shown.append(piece)
        if len(shown) == 3:
            raise KeyboardInterrupt

    chat.max_new_tokens = 40
    part = chat.ask("Tell me.", interrupt)
    assert part and part != whole and whole.startswith(part) and chat.turns[-1] == ("gpt", part)
    assert chat.ask("Go on.")
    chat.interruptible = False
    shown.clear()
    with pytest.raises(KeyboardInterrupt):
        chat.ask("Tell me.", interrupt)
    assert len(chat.turns) == 4


def test_a_message_without_an_answer_is_not_kept(chat, pictures, monkeypatch):
    chat.add_picture(str(pictures / "a.png"))
    monkeypatch.setattr(type(chat.inference), "answer", lambda *args, **options: [""])
    assert chat.ask("What?") == "" and not chat.turns and len(chat.waiting) == 1


def test_an_image_that_the_model_writes_is_no_picture(chat, monkeypatch):
    monkeypatch.setattr(type(chat.inference), "answer", lambda *args, **options: ["an <image> of"])
    chat.ask("What?")
    monkeypatch.undo()
    assert chat.ask("And?")


def test_no_vision_tower(inference, pictures):
    blind = Chat(Inference(inference.family, dataclasses.replace(inference.loaded, image_processor=None)))
    with pytest.raises(LlavaError, match="no vision tower"):
        blind.add_picture(str(pictures / "a.png"))


# --- saving ---


def test_saved_conversations_are_training_data(chat, inference, pictures, tmp_path_factory):
    """Read, checked and prepared by the data pipeline, whose prompt is the chat's own."""
    chat.add_picture(str(pictures / "a.png"))
    chat.ask("What is shown?")
    chat.add_picture(str(pictures / "b.png"))
    chat.ask("And here?")
    for folder in (pictures, tmp_path_factory.mktemp("elsewhere")):
        for name in ("talk.json", "talk_lines.jsonl"):
            chat.save(str(folder / name))
            records = load_records(str(folder / name))
            validate_records(records, version="qwen_1_5", image_folder=str(folder))
            assert [turn["value"] for turn in records[0]["conversations"]] == [text for _, text in chat.turns]
            parts = llava_parts(inference.tokenizer, inference.image_processor, image_folder=str(folder))
            sample = LazySupervisedDataset(records, *parts)[0]
            assert sample["image_sizes"] == [(50, 30), (20, 60)]
            asked = inference.tokens(chat.prompt(chat.turns[:3]))
            assert sample["input_ids"].tolist()[: len(asked)] == asked
    assert [path.name for path in sorted(pictures.iterdir())] == ["a.png", "b.png", "talk.json", "talk_lines.jsonl"]


def test_saving_again_and_faults(chat, tmp_path):
    with pytest.raises(LlavaError, match="nothing was said"):
        chat.save(str(tmp_path / "t.json"))
    chat.ask("Who?")
    chat.save(str(tmp_path / "t.json"))
    chat.ask("Why?")
    chat.save(str(tmp_path / "t.json"))
    assert len(load_records(str(tmp_path / "t.json"))[0]["conversations"]) == 4
    (tmp_path / "other.json").write_text("[]")
    for path, said in (
        (tmp_path / "other.json", "exists already"),
        (tmp_path / "t.txt", "expected .json or .jsonl"),
        (tmp_path / "no" / "t.json", "cannot be written"),
    ):
        with pytest.raises(LlavaError, match=said):
            chat.save(str(path))
    assert (tmp_path / "other.json").read_text() == "[]"


def test_an_interrupt_is_noted_and_ends_the_answer_at_its_next_token(chat):
    """By the signal itself, sent while other code runs; a second one is raised at once."""
    import os
    import signal

    from llava.serve.stream import noted_interrupts

    before = signal.getsignal(signal.SIGINT)
    pieces = []

    def emit(piece):
        pieces.append(piece)
        if len(pieces) == 1:
            os.kill(os.getpid(), signal.SIGINT)

    whole = chat.ask("What is shown?")
    chat.clear()
    answer = chat.ask("What is shown?", emit)
    assert answer == "".join(pieces) and whole.startswith(answer) and len(answer) < len(whole)
    assert chat.turns[-1] == ("gpt", answer) and signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt), noted_interrupts() as interrupted:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted()
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
