import json

import pytest
import sentencepiece

from llava.conversation import conv_templates
from llava.data.preprocess import preprocess, resolve_supervise
from llava.errors import LlavaError
from llava.text_encoding import text_encoder
from tests.data.common import GOLDEN, talk, tokenizer

CASES = json.loads((GOLDEN / "preprocess.json").read_text())
V1 = {"tokenizer": tokenizer("llama"), "version": "v1"}


def row(source, tokenizer, **options):
    found = preprocess([source], tokenizer, **options)
    return found["input_ids"][0].tolist(), found["labels"][0].tolist()


def learned(source, tokenizer, **options) -> list[str]:
    """The supervised stretches as text."""
    ids, labels = row(source, tokenizer, **options)
    stretches, current = [], []
    for token, label in zip([*ids, 0], [*labels, -100], strict=True):
        if label != -100:
            assert label == token
            current.append(token)
        elif current:
            stretches.append(tokenizer.decode(current))
            current = []
    return stretches


@pytest.mark.parametrize("case", CASES, ids=[f"{c['version']}-{'image' if c['has_image'] else 'text'}" for c in CASES])
def test_golden(case):
    ids, labels = row(
        case["conversations"], tokenizer(case["tokenizer"]), has_image=case["has_image"], version=case["version"]
    )
    assert ids == case["input_ids"]
    assert labels == case["labels"]


@pytest.mark.parametrize(("version", "name"), [("qwen_1_5", "qwen"), ("v1", "llama"), ("llava_llama_3", "llama3")])
def test_a_batch_is_padded_on_the_right(version, name):
    long, short = [case["conversations"] for case in CASES if case["version"] == version]
    found = preprocess([short, long], tokenizer(name), has_image=True, version=version)
    alone = row(short, tokenizer(name), has_image=True, version=version)
    assert found["input_ids"].shape == found["labels"].shape
    filled = len(alone[0])
    assert found["input_ids"][0, :filled].tolist() == alone[0]
    assert set(found["input_ids"][0, filled:].tolist()) == {tokenizer(name).pad_token_id}
    assert set(found["labels"][0, filled:].tolist()) == {-100}


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("What is <image> this?", "<image>\nWhat is  this?"),
        ("What is this?\n<image>", "<image>\nWhat is this?"),
        ("<image>What is this?", "<image>What is this?"),
        ("QA_GT_caption_based_noisyWhat?", "What?"),
    ],
)
@pytest.mark.parametrize(("version", "name"), [("qwen_1_5", "qwen"), ("mistral_instruct", "llama")])
def test_a_single_image_moves_to_the_front(given, meant, version, name):
    options = {"has_image": True, "version": version}
    assert row(talk(given, "A cat."), tokenizer(name), **options) == row(
        talk(meant, "A cat."), tokenizer(name), **options
    )


def test_several_images_stay_where_they_are():
    ids, _ = row(talk("Compare <image> and <image>.", "Same."), tokenizer("qwen"), has_image=True)
    assert ids.count(-200) == 2
    assert tokenizer("qwen").decode(ids[: ids.index(-200)]).endswith("user\nCompare ")


def test_without_images_the_marker_is_text():
    ids, _ = row(talk("What is <image>?", "A tag."), tokenizer("qwen"))
    assert -200 not in ids
    assert "What is <image>?" in tokenizer("qwen").decode(ids)


def test_a_leading_turn_of_the_model_is_dropped():
    full = talk("Hi", "Hello")
    leading = [{"from": "gpt", "value": "Welcome"}, *full]
    assert row(leading, tokenizer("qwen")) == row(full, tokenizer("qwen"))
    assert row(leading, **V1) == row(full, **V1)


def test_roles_may_be_spelled_as_in_chat_formats():
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert row(chat, tokenizer("qwen")) == row(talk("Hi", "Hello"), tokenizer("qwen"))


def test_a_system_turn_in_between_is_not_learned():
    source = [*talk("Hi", "Hello"), {"from": "system", "value": "Be brief."}, *talk("Why?", "So.")]
    ids, _ = row(source, tokenizer("qwen"))
    assert "<|im_start|>system\nBe brief.<|im_end|>" in tokenizer("qwen").decode(ids)
    assert learned(source, tokenizer("qwen"), supervise="answers_only") == ["Hello<|im_end|>\n", "So.<|im_end|>\n"]


@pytest.mark.parametrize("version", sorted(set(conv_templates) - {"plain", "v0_plain"}))
def test_answers_only_learns_the_answers_and_their_ends(version):
    name = {"qwen": "qwen", "llama_v3": "llama3"}.get(conv_templates[version].version, "llama")
    source = talk("What is this?", "A cat.", "Why?", "It purrs.")
    found = learned(source, tokenizer(name), version=version, supervise="answers_only")
    ends = [text.strip() for text in found]
    template = conv_templates[version]
    end = (template.sep2 or template.sep).strip()
    assert [text.removesuffix(end).strip() for text in ends] == ["A cat.", "It purrs."]
    assert all(text.endswith(end) for text in ends)


@pytest.mark.parametrize("version", ["v0", "llava_v0", "mpt", "chatml_direct", "mistral_zephyr", "gemma_instruct"])
def test_templates_without_published_labels_take_answers_only(version):
    assert resolve_supervise(version) == "answers_only"
    with pytest.raises(LlavaError, match="llava_next is not defined"):
        resolve_supervise(version, "llava_next")


def test_unknown_supervision():
    with pytest.raises(LlavaError, match="'everything', expected one of llava_next, answers_only"):
        resolve_supervise("qwen_1_5", "everything")


def test_every_qwen_template_trains_with_the_same_system_text():
    source = talk("Hi", "Hello")
    assert row(source, tokenizer("qwen"), version="qwen_2_5") == row(source, tokenizer("qwen"), version="qwen_1_5")


QWEN2 = (  # the stock chat template
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
)
OWN = {"from": "system", "value": "Be\nbrief. "}


def with_own(*texts):
    chat = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]
    return [OWN, *talk(*texts)], [{"role": "system", "content": OWN["value"]}, *chat]


@pytest.mark.parametrize(
    ("version", "name", "stock"),
    [("qwen_1_5", "qwen", QWEN2), ("qwen_2_5", "qwen", QWEN2), ("llava_llama_3", "llama3", None)],
)
def test_a_records_own_system_turn_is_the_chat_templates(version, name, stock):
    source, chat = with_own("Hi", "Hello", "Why?", "So.")
    tok = tokenizer(name)
    expected = tok.apply_chat_template(chat, chat_template=stock, tokenize=False)
    options = {"version": version, "system_turn": "record"}
    ids, labels = row(source, tok, **options)
    assert ids == text_encoder(tok).encode(expected).ids and "brief." in expected
    assert learned(source, tok, supervise="answers_only", **options) == learned(
        source[1:], tok, supervise="answers_only", version=version
    )
    # of the system's text nothing is learned but the tokens that LLaVA-NeXT supervises wherever they stand
    head = expected[: expected.index("brief.") + len("brief.")]
    found = {tok.decode(label) for label in labels[: len(text_encoder(tok).encode(head).ids)] if label != -100}
    headers = {"<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"}
    assert found == ({"<|im_start|>", "\n"} if name == "qwen" else headers)
    # a record without one has the template's; and without the setting its own is dropped
    assert row(talk("Hi", "Hello"), tok, **options) == row(talk("Hi", "Hello"), tok, version=version)
    assert row(source, tok, version=version) == row(source[1:], tok, version=version)


WRITTEN = {  # what is written in front of the first turn of (Hi, Hello)
    "v1": ("{}", " USER: Hi ASSISTANT: Hello</s>"),
    "llava_v1": ("{}", " USER: Hi ASSISTANT: Hello</s>"),
    "v0": ("{}", "###Human: Hi###Assistant: Hello###"),
    "llama_2": ("[INST] <<SYS>>\n{}\n<</SYS>>\n\n", "Hi [/INST] Hello </s>"),
    "mistral_instruct": ("[INST] <<SYS>>\n{}\n<</SYS>>\n\n", "Hi [/INST] Hello </s>"),
    "mpt": ("<|im_start|>system\n{}", "<|im_end|><|im_start|>user\nHi<|im_end|><|im_start|>assistant\nHello<|im_end|>"),
    "mistral_zephyr": ("<|system|>\n{}", "</s><|user|>\nHi</s><|assistant|>\nHello</s>"),
}


@pytest.mark.parametrize("version", WRITTEN)
def test_a_records_own_system_turn_in_templates_of_one_text(version):
    before, after = WRITTEN[version]
    tok = tokenizer("llama")
    for system in ("Be brief.", "Two\nlines. "):
        source = [{"from": "system", "value": system}, *talk("Hi", "Hello")]
        ids, _ = row(source, tok, version=version, system_turn="record")
        text = before.format(system) + after
        assert ids == text_encoder(tok).encode(text, add_special_tokens=True).ids
        answers = learned(source[1:], tok, version=version)
        assert learned(source, tok, version=version, system_turn="record") == answers and len(answers) == 1
        assert row(source, tok, version=version) == row(source[1:], tok, version=version)


def test_which_templates_have_a_place_for_a_system_text():
    without = {"plain", "v0_plain", "gemma_instruct"}
    assert {name for name, template in conv_templates.items() if not template.takes_system} == without
    for name in sorted(without):
        with pytest.raises(LlavaError, match=f"system_turn: found record, but template '{name}' has no place"):
            preprocess([talk("<image>", "a cat")], tokenizer("llama"), version=name, system_turn="record")
        with pytest.raises(LlavaError, match="no place for a system text"):
            conv_templates[name].with_system("Be brief.")
    with pytest.raises(LlavaError, match="system_turn: found 'own', expected template or record"):
        preprocess([talk("Hi", "Hello")], tokenizer("qwen"), system_turn="own")


def test_plain_takes_one_image_and_the_caption():
    source = talk("Describe <image> or <image>", "a cat")
    ids, labels = row(source, tokenizer("llama"), version="plain")
    assert ids[:2] == [1, -200] and ids.count(-200) == 1
    assert labels[:2] == [-100, -100] and labels[2:] == ids[2:]
    assert tokenizer("llama").decode(ids[2:]) == "a cat\n"


def test_mmtag_and_start_end_marks():
    source = talk("What is <image> this?", "A cat.")
    ids, _ = row(source, tokenizer("llama"), has_image=True, version="llava_v1_mmtag")
    at = ids.index(-200)
    assert tokenizer("llama").decode(ids[:at]).endswith("<Image>")
    assert tokenizer("llama").decode(ids[at + 1 :]).startswith("</Image>\nWhat is  this?")
    ids, _ = row(source, tokenizer("qwen"), has_image=True, mm_use_im_start_end=True)
    at = ids.index(-200)
    assert tokenizer("qwen").decode(ids[:at]).endswith("<im_start>")
    assert tokenizer("qwen").decode(ids[at + 1 :]).startswith("<im_end>\nWhat")


@pytest.mark.parametrize(
    "source",
    [
        talk("Say it.", "The ASSISTANT: said [/INST] so.", "And?", "No."),
        talk("Name it.", "Red.", "And now?"),
        talk("A </s> here", "Fine."),
    ],
)
@pytest.mark.parametrize("version", ["v1", "mistral_instruct", "llama_2"])
def test_labels_survive_what_breaks_a_search_for_them(source, version):
    found = learned(source, tokenizer("llama"), version=version)
    answers = [turn["value"] for turn in source if turn["from"] == "gpt"]
    assert [text.replace("</s>", "").strip() for text in found] == answers


def test_sentencepiece_ids_are_those_of_sentencepiece():
    """A blank in front of every piece, also where one is there already, as in "<image> a cat"."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(GOLDEN / "tokenizer_llama/tokenizer.model"))
    for text in ["a cat", " a cat", "  two  blanks ", "\n", " ", "日本 é 😀", "\ta", ""]:
        expected = model.encode(text) if text else []
        assert text_encoder(tokenizer("llama")).encode(text).ids == expected
        ids, _ = row(talk(f"<image>{text}", "ok"), tokenizer("llama"), has_image=True, version="v1")
        between = model.encode(f"{text} ASSISTANT: ok")
        assert ids[ids.index(-200) + 1 :] == [*between, 2]


def test_encoder_ignores_padding_and_follows_new_tokens():
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer_qwen")
    before = text_encoder(own).encode("a <new> b").ids
    own("a", padding="max_length", max_length=50, truncation=True)
    assert text_encoder(own).encode("a <new> b").ids == before
    own.add_tokens(["<new>"])
    assert len(text_encoder(own).encode("a <new> b").ids) < len(before)


@pytest.mark.parametrize(
    ("source", "version", "message"),
    [
        (talk("Hi"), "plain", "found 1 turns, expected 2"),
        (talk("Hi", "a cat"), "plain", "found no <image>"),
        ([{"from": "gpt", "value": "Hi"}], "v1", "found no turn"),
        ([{"from": "human", "value": "a"}, {"from": "human", "value": "b"}], "v1", "turn 1: found human, expected gpt"),
        ([{"from": "robot", "value": "a"}], "qwen_1_5", "turn 0: found 'robot' as its speaker"),
        ([{"from": "human", "value": None}], "qwen_1_5", "turn 0: found None as its value"),
        (["text"], "qwen_1_5", "turn 0: found str"),
        (talk("", "a"), "llama_2", "turn 0: found no text"),
    ],
)
def test_faults(source, version, message):
    with pytest.raises(LlavaError, match=message):
        preprocess([source], tokenizer("llama"), has_image=True, version=version)
