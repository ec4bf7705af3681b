"""A chat template writes what its conversation template writes."""

import pytest
from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from llava.conversation import conv_templates, get_template
from llava.data.turns import place_image
from llava.errors import LlavaError
from llava.tools.hf.chat_template import chat_template, has_chat_template, probe_messages, probe_prompt, recognise

CHATS = [name for name in conv_templates if has_chat_template(name)]
HEADERS = ("<|im_start|>system\n", "<|system|>\n")


def render(name, messages, generate=True):
    return render_jinja_template([messages], chat_template=chat_template(name), add_generation_prompt=generate)[0][0]


def part(text):
    return {"type": "text", "text": text}


def written(name, texts, system=None):
    """By the conversation template; an odd number of texts leaves the next answer to be generated."""
    conversation = get_template(name)
    if system is not None:
        header = next((h for h in HEADERS if conversation.system.startswith(h)), "")
        conversation.system = header + system if system else ""
    for index, text in enumerate(texts):
        conversation.append_message(conversation.roles[index % 2], text)
    if len(texts) % 2:
        conversation.append_message(conversation.roles[1], None)
        return conversation.get_prompt()
    return "".join(turn.text for turn in conversation.turns())


def spoken(texts, system=None):
    roles = ("user", "assistant")
    found = [{"role": roles[index % 2], "content": text} for index, text in enumerate(texts)]
    return found if system is None else [{"role": "system", "content": system}, *found]


@pytest.mark.parametrize("name", CHATS)
def test_several_turns(name):
    texts = [" What is 2 < 3? {{ x }} \"'\n", "It's {% true %}.\n", "Sure? \u00e9\u4e2d", "Yes.", "And\tnow?"]
    for count in (1, 3, 5):
        assert render(name, spoken(texts[:count])) == written(name, texts[:count])
    for count in (2, 4):
        assert render(name, spoken(texts[:count]), generate=False) == written(name, texts[:count])


@pytest.mark.parametrize("name", [name for name in CHATS if name != "gemma_instruct"])
def test_system_text(name):
    texts = ["What is this?", "A cat.", "Sure?"]
    for system in ("Answer in one word.", ""):
        assert render(name, spoken(texts, system)) == written(name, texts, system)
        parts = [part(system)] if system else []
        assert render(name, spoken(texts, parts)) == written(name, texts, system)


@pytest.mark.parametrize("name", CHATS)
def test_images(name):
    """One goes to the front, as `place_image` puts it; several stay where they are."""
    image, ask = {"type": "image"}, part("What is shown?")
    one = written(name, [place_image("What is shown?\n<image>")])
    for content in ([image, ask], [ask, image], "<image>\nWhat is shown?"):
        assert render(name, [{"role": "user", "content": content}]) == one
    two = written(name, ["<image>\n<image>\nWhat is shown?"])
    assert render(name, [{"role": "user", "content": [image, image, ask]}]) == two
    mixed = [part("First: "), image, part("second: "), image, ask]
    text = "First: <image>\nsecond: <image>\nWhat is shown?"
    assert render(name, [{"role": "user", "content": mixed}]) == written(name, [text])
    later = [*spoken(["Hi", "Hello."]), {"role": "user", "content": [image, ask]}]
    assert render(name, later) == written(name, ["Hi", "Hello.", "<image>\nWhat is shown?"])


@pytest.mark.parametrize("name", CHATS)
def test_it_is_recognised(name):
    rendered = render(name, probe_messages())
    assert rendered == probe_prompt(name)
    found = recognise(rendered)
    assert get_template(found) == get_template(name)
    assert get_template(recognise("<bos>" + rendered, "<bos>")) == get_template(name)


def test_the_names_that_people_know():
    names = ("qwen_1_5", "v1", "mistral_instruct", "llava_llama_3")
    assert [recognise(probe_prompt(name)) for name in names] == list(names)


def test_an_unknown_one_names_the_nearest():
    with pytest.raises(LlavaError, match=r"--version \(the nearest is v1\)"):
        recognise(probe_prompt("v1").replace("USER: ", "User: "))


@pytest.mark.parametrize("name", ["plain", "v0_plain", "llava_v1_mmtag", "llava_llama_2_mmtag"])
def test_what_is_no_chat(name):
    assert not has_chat_template(name)
    with pytest.raises(LlavaError, match=f"conversation template {name}: cannot be written as a chat template"):
        chat_template(name)


@pytest.mark.parametrize(
    "name, messages, words",
    [
        ("qwen_1_5", spoken(["Hi", "Hello."])[::-1], "turns must alternate"),
        ("v1", [*spoken(["Hi"]), *spoken(["Hi"])], "turns must alternate"),
        ("v1", [{"role": "tool", "content": "7"}], "turns must alternate"),
        ("v1", [{"role": "user", "content": [{"type": "audio"}]}], "unknown content type audio"),
        ("gemma_instruct", spoken(["Hi"], "Be brief."), "no place for system text"),
    ],
)
def test_what_it_refuses(name, messages, words):
    with pytest.raises(TemplateError, match=words):
        render(name, messages)
