"""The lmms-eval models against `Inference` and against the formula, with a stand-in for lmms-eval itself."""

import importlib
import subprocess
import sys
import types
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from llava.errors import LlavaError
from llava.eval.lmms_eval_adapter import manifest
from llava.eval.lmms_eval_adapter.media import read_video, read_visual
from llava.inference.engine import Inference
from llava.inference.likelihood import log_likelihoods, split_tokens
from tests import tiny
from tests.eval import common

ADAPTER = "llava.eval.lmms_eval_adapter.models"
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


class Lmms:
    """What lmms-eval's base class sets."""

    def __init__(self):
        self._rank, self._world_size, self.task_dict = 0, 1, {}
        self.cached = []
        self.cache_hook = SimpleNamespace(add_partial=lambda *values: self.cached.append(values))

    rank = property(lambda self: self._rank)
    world_size = property(lambda self: self._world_size)

    def clean(self):
        self.cleaned = True


@dataclass
class GenerationResult:
    """lmms-eval's, of which it keeps `text` and `token_counts`."""

    text: str
    token_counts: object = None


@pytest.fixture(scope="module")
def adapter():
    """The adapter's module, imported over the stand-in."""
    names = ("lmms_eval", "lmms_eval.api", "lmms_eval.api.instance", "lmms_eval.api.model")
    names += ("lmms_eval.models", "lmms_eval.models.registry_v2")
    patch = pytest.MonkeyPatch()
    for name in names:
        patch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["lmms_eval.api.model"].lmms = Lmms
    sys.modules["lmms_eval.api.instance"].GenerationResult = GenerationResult
    sys.modules["lmms_eval.models.registry_v2"].ModelManifest = lambda **values: SimpleNamespace(**values)
    patch.delitem(sys.modules, ADAPTER, raising=False)
    yield importlib.import_module(ADAPTER)
    patch.undo()
    sys.modules.pop(ADAPTER, None)


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kit")
    common.pictures(folder, 6)
    common.checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def inference(kit):
    return Inference.load(str(kit / "llava-tiny"))


@pytest.fixture(scope="module")
def images(kit):
    return [Image.open(kit / f"{i}.png").convert("RGB") for i in range(6)]


@pytest.fixture(scope="module")
def frames():
    rng = np.random.default_rng(1)
    return [Image.fromarray(rng.integers(0, 255, (40, 30, 3), dtype=np.uint8)) for _ in range(4)]


@pytest.fixture(scope="module")
def docs(kit, images, frames):
    """(question, what doc_to_visual gives)"""
    return [
        ("What is shown?", [images[0]]),
        ("Compare them, all of them, please.", images[1:4]),
        ("Say yes.", None),
        ("What happens?", [list(frames)]),
        ("Who?", [str(kit / "4.png")]),
    ]


def prompt_of(text: str) -> str:
    return f"{SYSTEM}<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def expected(docs, images, frames):
    """(prompt, pictures) of each document, written out."""
    return [
        (prompt_of("<image>\nWhat is shown?"), [images[0]]),
        (prompt_of("<image> <image> <image>\nCompare them, all of them, please."), images[1:4]),
        (prompt_of("Say yes."), []),
        (prompt_of("<image>\nWhat happens?"), [frames]),
        (prompt_of("<image>\nWho?"), [images[4]]),
    ]


def make(adapter, kit, docs, kind="LlavaTowers", **args):
    model = getattr(adapter, kind)(str(kit / "llava-tiny"), **{"batch_size": 3, "max_new_tokens": 6} | args)
    model.task_dict["task"] = {"test": docs}
    return model


def request(*args, doc_id, **metadata):
    args = (*args, doc_id, "task", "test")
    return SimpleNamespace(args=args, metadata=metadata, task_name="task", doc_id=doc_id)


def simple_requests(docs, kwargs=None):
    return [request(doc[0], kwargs or {"until": ["\n\n"]}, lambda d: d[1], doc_id=i) for i, doc in enumerate(docs)]


def test_the_manifest_names_both_kinds(adapter):
    found = manifest()
    assert found.model_id == "llava_towers"
    for path, kind in ((found.simple_class_path, True), (found.chat_class_path, False)):
        module, name = path.rsplit(".", 1)
        loaded = getattr(importlib.import_module(module), name)
        assert issubclass(loaded, Lmms) and loaded.is_simple is kind


@pytest.mark.parametrize("batch_size", [1, 3, "8"])
def test_generate_until_is_inference(adapter, kit, docs, inference, expected, batch_size):
    model = make(adapter, kit, docs, batch_size=batch_size)
    answers = model.generate_until(simple_requests(docs))
    alone = [inference.generate([inference.tokens(p)], [pictures], max_new_tokens=6)[0] for p, pictures in expected]
    assert answers == alone and len(set(answers)) > 3
    assert sorted((name, context, text) for name, (context, _), text in model.cached) == sorted(
        ("generate_until", doc[0], text) for doc, text in zip(docs, answers, strict=True)
    )


def test_every_request_has_its_own_settings(adapter, kit, docs, inference, expected):
    lengths = [2, 5, 2, 9, 5]
    requests = [
        request(doc[0], {"max_new_tokens": length, "temperature": 0, "top_p": 1.0}, lambda d: d[1], doc_id=i)
        for i, (doc, length) in enumerate(zip(docs, lengths, strict=True))
    ]
    answers = make(adapter, kit, docs).generate_until(requests)
    assert answers == [
        inference.generate([inference.tokens(p)], [pictures], max_new_tokens=length)[0]
        for (p, pictures), length in zip(expected, lengths, strict=True)
    ]


def test_an_answer_ends_before_its_until(adapter, kit, docs):
    model = make(adapter, kit, docs)
    whole = model.generate_until(simple_requests(docs, {"max_new_tokens": 12}))
    longest = max(whole, key=len)
    end = longest[len(longest) // 2 : len(longest) // 2 + 2]
    ended = model.generate_until(simple_requests(docs, {"max_new_tokens": 12, "until": [end, "\n\n"]}))
    assert ended == [text.split(end)[0].strip() for text in whole] and ended != whole

    new = []
    generate = model.inference.model.generate
    model.inference.model.generate = lambda *a, **k: new.append(generate(*a, **k)) or new[-1]
    number = whole.index(longest)
    for until in (None, end):
        model.generate_until([simple_requests(docs, {"until": until, "max_new_tokens": 12})[number]])
    assert new[1].shape[1] < new[0].shape[1]  # nothing is generated beyond the end


@pytest.fixture(scope="module")
def qwen2_vl(tmp_path_factory):
    return tiny.qwen2_vl(tmp_path_factory.mktemp("qwen2_vl"))


def test_a_model_with_an_encoder_of_its_own(adapter, qwen2_vl, docs):
    """Whose `generate` returns the prompt: an end that stands in it ends nothing."""
    docs = [doc for doc in docs if not isinstance((doc[1] or [None])[0], list)]  # it takes no videos
    model = adapter.LlavaTowers(qwen2_vl, batch_size=3, max_new_tokens=8)
    model.task_dict["task"] = {"test": docs}
    inference = Inference.load(qwen2_vl)
    whole = model.generate_until(simple_requests(docs))
    for (text, visuals), answer in zip(docs, whole, strict=True):
        pictures = [Image.open(v).convert("RGB") if isinstance(v, str) else v for v in visuals or ()]
        images = " ".join(["<image>"] * len(pictures)) + "\n" if pictures else ""
        prompt = inference.prompt([("human", images + text)])
        assert inference.generate([prompt], [pictures], max_new_tokens=8) == [answer]
    assert len(set(whole)) > 2
    longest = max(whole, key=len)
    end = longest[len(longest) // 2 : len(longest) // 2 + 2]
    ended = model.generate_until(simple_requests(docs, {"until": [end, "assistant\n", "is"]}))
    ends = (end, "assistant\n", "is")
    assert ended == [min((text.split(stop)[0] for stop in ends), key=len).strip() for text in whole]
    assert ended != whole


@pytest.mark.parametrize(
    ("kwargs", "options", "until"),
    [
        ({}, {"do_sample": False, "max_new_tokens": 7}, []),
        ({"until": ["\n\n", "USER:"]}, {"do_sample": False, "max_new_tokens": 7}, ["USER:"]),
        ({"until": None, "max_gen_toks": 3}, {"do_sample": False, "max_new_tokens": 3}, []),
        (
            {"temperature": 0, "do_sample": True, "top_p": 0.5, "num_beams": 2, "image_aspect_ratio": "pad"},
            {"do_sample": False, "max_new_tokens": 7, "num_beams": 2},
            [],
        ),
        (
            {"temperature": 0.5, "top_p": 0.9, "until": "x"},
            {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "max_new_tokens": 7},
            ["x"],
        ),
        ({"temperature": 0.5, "do_sample": False}, {"do_sample": False, "max_new_tokens": 7}, []),
    ],
)
def test_generation_options(adapter, kwargs, options, until):
    assert adapter.generation_options(kwargs, 7) == (options, until)


def test_chat_messages_keep_pictures_where_they_stand(adapter, kit, docs, inference, images, frames):
    image = lambda i: {"type": "image", "url": images[i]}  # noqa: E731
    text = lambda words: {"type": "text", "text": words}  # noqa: E731
    messages = [
        [{"role": "user", "content": [image(0), image(1), text("Alike?")]}],
        [{"role": "user", "content": [text("First"), image(0), text("then"), image(1), text("Alike?")]}],
        [{"role": "user", "content": [image(0), image(1), text("Is <image> like <image>?")]}],
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [image(2), text("Who?")]},
            {"role": "assistant", "content": [text("A cat.")]},
            {"role": "user", "content": [{"type": "video", "url": frames}, text("And "), text("here?")]},
        ],
        [{"role": "user", "content": "What is an <image> tag?"}],
    ]
    user = "<|im_start|>user\n"
    expected = [
        (prompt_of("<image> <image>\nAlike?"), images[:2]),
        (prompt_of("First\n<image>\nthen\n<image>\nAlike?"), images[:2]),
        (prompt_of("Is <image> like <image>?"), images[:2]),
        (
            f"{SYSTEM}{user}<image>\nBe brief.\n\nWho?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"
            f"{user}<image>\nAnd here?<|im_end|>\n<|im_start|>assistant\n",
            [images[2], frames],
        ),
        (prompt_of("What is an  tag?"), []),
    ]
    model = make(adapter, kit, messages, kind="LlavaTowersChat")
    requests = [request("", lambda doc: doc, {"max_new_tokens": 6}, doc_id=i) for i in range(len(messages))]
    for asked, (prompt, pictures) in zip(requests, expected, strict=True):
        turns, found = model._asked(asked)
        assert inference.family.prompt_text(turns, inference.loaded) == prompt
        assert len(found) == len(pictures)
    alone = [inference.generate([inference.tokens(p)], [pictures], max_new_tokens=6)[0] for p, pictures in expected]
    assert model.generate_until(requests) == alone


def log_probs(inference, prompt: str, answer: str, pictures) -> tuple[float, bool]:
    """By the formula: one unpadded forward, the logits before each token of the answer."""
    ids = inference.tokens(prompt + answer)
    length = len(ids) - len(inference.tokens(prompt))
    inputs = inference.inputs([ids], [pictures])
    inputs.pop("attention_mask")
    with torch.no_grad():
        logits = inference.model(**inputs).logits[0].double()
    before = logits[-length - 1 : -1]
    target = torch.tensor(ids[-length:])
    values = before - before.exp().sum(dim=-1, keepdim=True).log()
    return values[range(length), target].sum().item(), bool((before.argmax(dim=-1) == target).all())


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_loglikelihood_is_the_formula(adapter, kit, docs, inference, expected, batch_size, padding_side):
    model = make(adapter, kit, docs, batch_size=batch_size)
    model.config.tokenizer_padding_side = padding_side
    choices = [" yes", " a black temple", " No, never."]
    greedy = [inference.generate([inference.tokens(p)], [v], max_new_tokens=3)[0] for p, v in expected]
    asked = [(i, choice) for i in range(len(docs)) for choice in (*choices, greedy[i]) if choice.strip()]
    requests = [request(docs[i][0], choice, lambda d: d[1], doc_id=i) for i, choice in asked]
    values = model.loglikelihood(requests)
    direct = [log_probs(inference, expected[i][0], choice.strip(), expected[i][1]) for i, choice in asked]
    assert [value for value, _ in values] == pytest.approx([-value for value, _ in direct], abs=1e-4)
    assert [hit for _, hit in values] == [hit for _, hit in direct]
    assert any(hit for _, hit in direct) and not all(hit for _, hit in direct)


def test_the_sign_is_what_lmms_eval_looks_for(adapter, kit, docs):
    model = make(adapter, kit, docs)
    given = request(docs[0][0], " yes", lambda d: d[1], doc_id=0)  # multiple_choice: the smallest is chosen
    made = request(docs[0][0], lambda d: " yes", lambda d: d[1], doc_id=0)  # loglikelihood
    bare = SimpleNamespace(args=("", " yes"), metadata={}, task_name="task", doc_id=0)
    (loss, _), (value, _), (unasked, _) = model.loglikelihood([given, made, bare])
    assert loss == -value > 0 and unasked > 0 and unasked != loss


def test_a_likelihood_survives_what_lmms_eval_does_to_results(adapter):
    score = adapter.Score((1.5, True))
    assert isinstance(score, GenerationResult) and score.text == (1.5, True) and score.token_counts is None
    values, greedy = zip(score, score.text, strict=True)
    assert (values, greedy) == ((1.5, 1.5), (True, True)) and score == (1.5, True)


@pytest.mark.parametrize("version", ["v1", "mistral_instruct", "llava_llama_3", "qwen_1_5", "plain", "gemma_instruct"])
def test_a_continuation_is_cut_off_before_the_templates_own_end(version, inference):
    asked, turns = Inference(inference.family, inference.loaded, version), [("human", "<image>\nm?")]
    prompt = asked.family.prompt_text(turns, asked.loaded)
    whole = asked.family.prompt_text(turns, asked.loaded, answer="m")  # a letter that template and question have too
    assert whole.startswith(prompt.rstrip(" ")) and whole[len(prompt.rstrip(" ")) :].strip(" ") == "m"
    before, after = split_tokens(asked, turns, " m ")
    assert after and before + after == asked.tokens(whole)


def test_a_token_over_the_seam_belongs_to_the_continuation(inference):
    class Pairs:
        """Two characters are a token."""

        def prompt(self, turns, answer=None):
            text = v1.family.prompt_text(turns, v1.loaded, answer=answer)
            return [text[i : i + 2] for i in range(0, len(text), 2)]

    v1 = Inference(inference.family, inference.loaded, "v1")
    for question in ("m?", "mm?"):
        turns = [("human", question)]
        before, after = split_tokens(Pairs(), turns, "yes")
        prompt = v1.family.prompt_text(turns, v1.loaded)
        assert "".join(before + after) == f"{prompt} yes"
        assert "".join(after) == (" yes" if len(prompt) % 2 == 0 else ": yes")


def test_an_answer_beyond_the_context_is_refused(inference, monkeypatch):
    monkeypatch.setattr(inference.model.config, "tokenizer_model_max_length", 6, raising=False)
    monkeypatch.setattr(inference.loaded, "context", 6)
    with pytest.raises(LlavaError, match="context of 6 tokens"):
        log_likelihoods(inference, [[11] * 5], [[12] * 5], [[]])


class Reader:
    """As decord's."""

    def __init__(self, frames):
        self.frames = np.stack([np.asarray(frame) for frame in frames])

    def __len__(self):
        return len(self.frames)

    def get_batch(self, indices):
        return SimpleNamespace(asnumpy=lambda: self.frames[indices])


def test_videos_of_every_kind_give_the_same_frames(frames, tmp_path):
    for i, frame in enumerate(frames):
        frame.save(tmp_path / f"{i}.png")
    pixels = [np.asarray(frame) for frame in frames]
    kinds = [
        list(frames),
        np.stack(pixels),
        Reader(frames),
        {"path": frames},
        [str(tmp_path / f"{i}.png") for i in range(4)],
    ]
    for kind in kinds:
        for limit, indices in ((32, [0, 1, 2, 3]), (2, [0, 3]), (3, [0, 2, 3]), (1, [0])):
            found = read_video(kind, limit)
            assert [np.array_equal(frame, pixels[i]) for frame, i in zip(found, indices, strict=True)] == [True] * len(
                indices
            )
    assert len(read_visual(str(tmp_path), 2)) == 2  # a folder of frames
    assert read_visual(str(tmp_path / "0.png"), 2).size == (30, 40)
    assert read_visual({"url": frames[0]}, 2).size == (30, 40)


@pytest.mark.parametrize(
    ("visual", "said"),
    [
        ({"path": "v.mp4", "video_start": 1.0}, "video_start"),
        ({"array": 1, "sampling_rate": 2}, "audio"),
        (7, "found int"),
        ([], "found list"),
        (np.zeros((2, 4, 4, 1), dtype=np.uint8), r"\(4, 4, 1\)"),
        ("gone.png", "gone.png"),
    ],
)
def test_media_that_is_none_is_named(adapter, kit, visual, said):
    model = make(adapter, kit, [("q", [visual])])
    with pytest.raises(LlavaError, match=said) as caught:
        model.generate_until(simple_requests(model.task_dict["task"]["test"]))
    assert str(caught.value).startswith("task task, document 0: ")


def test_a_numbered_cpu_is_a_cpu(kit):  # as accelerate names them under several processes
    assert Inference.load(str(kit / "llava-tiny"), device="cpu:0").model.dtype == torch.float32


def test_a_model_is_let_go(adapter, kit, docs):
    model = make(adapter, kit, docs)
    assert (model.rank, model.world_size, str(model.device)) == (0, 1, "cpu")
    model.clean()
    assert model.inference is None and model.cleaned
    with pytest.raises(LlavaError, match="batch_size"):
        make(adapter, kit, docs, batch_size="auto")


def test_the_entry_point_is_light():
    code = (
        "import sys, llava.eval.lmms_eval_adapter; "
        "print(sorted({'torch', 'transformers', 'lmms_eval', 'torchvision', 'timm', 'wandb'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
