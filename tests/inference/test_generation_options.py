"""docs/generation.md: each row of its table against transformers' own model of the same weights."""

import inspect
import re
from pathlib import Path

import pytest
import torch

from llava.errors import LlavaError
from tests.inference.generation_rows import EQUAL, REFUSED, ROWS, STOCK, Heard, Prompt

PAGE = Path(__file__).parents[2] / "docs" / "generation.md"
NEW = 6
# not options but inputs, or facts about the settings
NOT_OPTIONS = {"self", "inputs", "kwargs", "transformers_version", "_from_model_config", "_commit_hash"}


class Side:
    """A model and a question about a picture, as its `generate` takes it."""

    def __init__(self, model, inputs, cut: int):
        self.model, self.inputs, self.cut = model, inputs, cut  # tokens of the prompt that it returns

    def generate(self, **options):
        torch.manual_seed(0)
        greedy = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        if "generation_config" in options:
            greedy = {"eos_token_id": None}
        with torch.no_grad():
            return self.model.generate(**self.inputs, **greedy | options)

    def answers(self, **options) -> list[list[int]]:
        made = self.generate(**options)
        return getattr(made, "sequences", made)[:, self.cut :].tolist()


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """(ours, transformers' with tokens, transformers' with embeddings, prompt)"""
    from transformers import AutoModelForImageTextToText

    from llava.mm_utils import process_images, tokenizer_image_token
    from llava.model.builder import load_pretrained_model
    from llava.tools.export_hf import export
    from llava.tools.hf.processor import load_processor
    from tests.tools.hf.checkpoints import make
    from tests.tools.test_export_hf import pictures, prompt

    folder = tmp_path_factory.mktemp("next")
    source = make(folder, "qwen_next")
    export(str(source), str(folder / "hf"))
    load = dict(device_map="cpu", torch_dtype="float32", attn_implementation="eager")
    tokenizer, model, images, _ = load_pretrained_model(str(source), None, "llava", **load)
    stock = AutoModelForImageTextToText.from_pretrained(folder / "hf", attn_implementation="eager").eval()
    # without the rows that the export has for image tokens, whose number a draw depends on
    stock.lm_head.weight.data = stock.lm_head.weight.data[: model.vocab_size]
    stock.config.get_text_config().vocab_size = model.vocab_size
    processor, shown = load_processor(str(folder / "hf")), pictures((100, 61))
    text = prompt(processor, "What is this?", 1)
    batch = dict(processor(text=[text], images=shown, return_tensors="pt"))
    ids = tokenizer_image_token(text, tokenizer, return_tensors="pt")[None]
    given = {"images": list(process_images(shown, images, model.config)), "image_sizes": [shown[0].size]}
    embeds = model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, **given)[4].detach()
    length = batch["input_ids"].shape[1]
    assert embeds.shape[1] == length
    ours, tokens = Side(model, {"inputs": ids, **given}, 0), Side(stock, batch, length)
    answer = tokens.answers()[0]
    return ours, tokens, Side(stock, {"inputs_embeds": embeds}, 0), Prompt(length, answer, tokenizer, stock)


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def qwen(request, tmp_path_factory):
    """As `llava`, without embeddings."""
    from transformers import AutoModelForImageTextToText

    from tests.model.qwen2_vl.parts import load, make_folder, picture, prompt

    folder = make_folder(tmp_path_factory.mktemp(request.param), request.param)
    model, processor = load(folder)
    attention = model.config._attn_implementation
    stock = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation=attention).eval()
    batch = dict(processor(text=[prompt(1)], images=[picture(84, 70)], return_tensors="pt"))
    length = batch["input_ids"].shape[1]
    ours, tokens = Side(model, batch, length), Side(stock, batch, length)
    assistant = AutoModelForImageTextToText.from_pretrained(folder).eval()
    with torch.no_grad():
        assistant.lm_head.weight[::2] += 0.1  # right now and then
    return ours, tokens, None, Prompt(length, tokens.answers()[0], processor.tokenizer, assistant)


def check(what: str, row, sides) -> None:
    ours, tokens, embedded, prompt = sides
    given = row.case(prompt)
    if what == REFUSED:
        with pytest.raises(LlavaError, match=f"^generate: ({'|'.join(given)}): found ") as refused:
            ours.answers(**given)
        assert "\n" not in str(refused.value)
        return
    if what == STOCK:
        errors = [pytest.raises((ValueError, OSError, ImportError, NotImplementedError)) for _ in range(2)]
        for side, error in zip((ours, tokens), errors, strict=True):
            with error as found:
                side.answers(**row.case(prompt))
            errors[errors.index(error)] = str(found.value)
        assert errors[0] == errors[1] and "\n" not in errors[0].strip()
        return
    stock = tokens if what == EQUAL else embedded
    expected = stock.answers(**row.case(prompt))
    assert ours.answers(**given) == expected
    if row.matters:
        assert expected != [prompt.answer]
    assert ours.answers() == [prompt.answer]  # nothing is left of it


@pytest.mark.parametrize("name", ROWS, ids=lambda name: re.findall(r"\w+", name)[0])
def test_llava(name, llava):
    check(ROWS[name].llava, ROWS[name], llava)


@pytest.mark.parametrize("name", ROWS, ids=lambda name: re.findall(r"\w+", name)[0])
def test_qwen(name, qwen):
    check(ROWS[name].qwen, ROWS[name], qwen)


def test_the_page_has_these_rows():
    """The table of docs/generation.md says what the rows say, and leaves out no option of transformers."""
    from transformers import GenerationConfig
    from transformers.generation.utils import GenerationMixin

    table = PAGE.read_text().split("| option |")[1]
    lines = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("| ")]
    said = {name.strip(): (ours.strip(), qwen.strip()) for name, ours, qwen, _ in lines}
    assert said == {name: (row.llava, row.qwen) for name, row in ROWS.items()}
    there = {*vars(GenerationConfig()), *inspect.signature(GenerationMixin.generate).parameters} - NOT_OPTIONS
    named = {word for name in ROWS for word in re.findall(r"`(\w+)`", name)}
    assert not {name for name in there if not name.startswith("_")} - named


def test_what_comes_with_the_answer_of_llava(llava):
    what_comes_with_the_answer(llava)


def test_what_comes_with_the_answer_of_qwen(qwen):
    what_comes_with_the_answer(qwen)


def what_comes_with_the_answer(sides):
    """Scores, logits, hidden states and attentions, step by step, and what a streamer hears."""
    ours, tokens, _, prompt = sides
    asked = dict.fromkeys(
        ("return_dict_in_generate", "output_scores", "output_logits", "output_hidden_states", "output_attentions"), True
    )
    made, expected = (side.generate(**asked) for side in (ours, tokens))
    for name in ("scores", "logits"):
        for a, b in zip(made[name], expected[name], strict=True):
            assert (a - b[:, : a.shape[1]]).abs().max() <= 1e-4
    for name in ("hidden_states", "attentions"):
        for step, other in zip(made[name], expected[name], strict=True):
            assert all(a.shape == b.shape and (a - b).abs().max() <= 1e-4 for a, b in zip(step, other, strict=True)), (
                name
            )
    heard = Heard()
    ours.generate(streamer=heard)
    assert heard.tokens[ours.cut :] == prompt.answer and heard.ended


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 3}])
def test_guidance_of_several_answers(llava, options):
    """Without a negative prompt each beam and each answer is guided by the last token of the prompt."""
    ours, tokens, _, prompt = llava
    answers = ours.answers(guidance_scale=2.0, **options)
    assert answers == tokens.answers(guidance_scale=2.0, **options) != [prompt.answer]


def test_a_second_turn_goes_on_from_the_cache(llava):
    ours, _, _, prompt = llava
    first = ours.generate(return_dict_in_generate=True)
    ids = torch.cat([ours.inputs["inputs"], first.sequences, torch.tensor([[9, 10]])], 1)
    second = Side(ours.model, {**ours.inputs, "inputs": ids}, 0)
    seen = []
    hook = ours.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    answers = second.answers(past_key_values=first.past_key_values)
    hook.remove()
    assert seen[0].shape[1] == 3  # the last token of the answer, and the two behind it
    assert answers == second.answers() != [prompt.answer]
