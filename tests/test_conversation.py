import json
from pathlib import Path

import pytest

from llava.conversation import SeparatorStyle, conv_templates, default_conversation, get_template, stop_strings
from llava.errors import LlavaError

PROMPTS = json.loads((Path(__file__).parent / "golden/llava/conversation_prompts.json").read_text())


def two_turns(name):
    conversation = get_template(name)
    for role, text in zip(conversation.roles * 2, ["<image>\nWhat is this?", "A cat.", "Sure?", None], strict=True):
        conversation.append_message(role, text)
    return conversation


@pytest.mark.parametrize("name", PROMPTS)
def test_prompt_is_the_published_one(name):
    assert two_turns(name).get_prompt() == PROMPTS[name]


@pytest.mark.parametrize("name", conv_templates)
def test_turns_join_to_the_prompt_and_mark_the_answers(name):
    conversation = two_turns(name)
    turns = conversation.turns()
    tail = "<|start_header_id|>assistant<|end_header_id|>\n\n" if name == "llava_llama_3" else ""
    assert "".join(turn.text for turn in turns) + tail == conversation.get_prompt()
    answers = [turn.text[turn.answer_start :] for turn in turns if turn.answer_start is not None]
    assert answers[-1].strip().startswith("A cat.")
    assert not any("What is this?" in answer for answer in answers)


def test_every_published_name_is_there():
    assert {"plain", "v0_plain", "llava_llama_3", *PROMPTS} == set(conv_templates)
    assert conv_templates["v0"] is default_conversation


def test_llama_3_spells_its_headers_out():
    prompt = two_turns("llava_llama_3").get_prompt()
    assert prompt.startswith(
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language"
    )
    assert prompt.endswith(
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA cat.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_plain_is_a_caption():
    conversation = get_template("plain")
    conversation.append_message("", "<image>")
    conversation.append_message("", "a cat")
    assert [turn.answer_start for turn in conversation.turns()] == [None, None, 0]
    assert conversation.get_prompt() == "<image>\na cat\n"


def test_a_copy_leaves_the_template_alone():
    copy = conv_templates["qwen_1_5"].copy()
    copy.append_message(copy.roles[0], "hello")
    assert conv_templates["qwen_1_5"].messages == []
    assert copy.messages == [["<|im_start|>user", "hello"]]
    assert (copy.sep, copy.version, copy.sep_style) == ("<|im_end|>", "qwen", SeparatorStyle.CHATML)
    first = conv_templates["v0"].copy()
    first.messages[0][1] = "changed"
    assert conv_templates["v0"].messages[0][1].startswith("What are the key differences")


def test_a_first_message_with_an_image_gets_it_in_front():
    conversation = get_template("v1")
    conversation.append_message("USER", ("What is <image> this?", "picture", "Pad"))
    conversation.append_message("ASSISTANT", None)
    assert conversation.get_prompt().endswith("USER: <image>\nWhat is  this? ASSISTANT:")
    assert conversation.dict()["messages"] == [["USER", "What is <image> this?"], ["ASSISTANT", None]]


def test_mmtag_gives_the_image_a_round_of_its_own():
    conversation = get_template("llava_v1_mmtag")
    conversation.append_message("USER", ("<image>\nWhat is this?", "picture", "Pad"))
    conversation.append_message("ASSISTANT", None)
    expected = "USER: <Image><image></Image> ASSISTANT: Received.</s>USER: What is this? ASSISTANT:"
    assert conversation.get_prompt().endswith(expected)


def test_text_with_braces_is_left_as_it_is():
    conversation = get_template("qwen_1_5")
    conversation.append_message(conversation.roles[0], "{role} {0} {")
    assert conversation.get_prompt().endswith("<|im_start|>user\n{role} {0} {<|im_end|>\n")


def test_unknown_template_names_the_nearest():
    with pytest.raises(LlavaError, match="'qwen2_5': did you mean 'qwen_2_5'"):
        get_template("qwen2_5")


@pytest.mark.parametrize(
    ("name", "stop"),
    [
        ("qwen_1_5", "<|im_end|>"),
        ("v1", "</s>"),
        ("mistral_instruct", "</s>"),
        ("llava_llama_3", "<|eot_id|>"),
        ("gemma_instruct", "<end_of_turn>"),
        ("plain", "\n"),
        ("v0", "###"),
    ],
)
def test_stop_strings(name, stop):
    assert stop_strings(name) == [stop]
