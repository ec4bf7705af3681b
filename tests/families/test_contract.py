"""What every family owes training, evaluation, chat and packing; a new row of `FAMILIES` is covered by itself."""

import json
import pickle
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from llava.constants import TUNABLE_PARTS
from llava.data.dataset import SampleArgs
from llava.errors import LlavaError
from llava.families import FAMILIES, family_of
from llava.inference.engine import Inference
from llava.inference.likelihood import log_likelihoods, split_tokens
from llava.model.adaptive_patches import PatchChoice
from llava.serve.chat import Chat
from tests.eval import common
from tests.support.families import CHECKPOINTS, FamilyKit

PICTURES = 3
QUESTIONS = [("What is shown?", [0]), ("Say yes.", []), ("Are the two alike, would you say?", [1, 2]), ("What?", [2])]
LORA = {"lora_enable": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "learning_rate": 2e-2, "max_steps": 2}
LORA |= {"mm_tunable_parts": "mm_mlp_adapter,mm_language_model"}
SAVING = {"save_strategy": "steps", "save_steps": 1}


def test_every_family_is_here():
    assert CHECKPOINTS.keys() == FAMILIES.keys()


@pytest.fixture(scope="module", params=FAMILIES)
def kit(request, tmp_path_factory):
    kit = FamilyKit(request.param, tmp_path_factory.mktemp(request.param))
    common.pictures(kit.folder, PICTURES)
    return kit


@pytest.fixture(scope="module")
def whole(kit):
    """A run of three steps that nothing disturbs."""
    return kit.run(kit.folder / "whole", **SAVING)


@pytest.fixture(scope="module")
def inference(kit):
    return Inference.load(kit.checkpoint, device="cpu")


@pytest.fixture(scope="module")
def adapter(kit):
    return kit.run(kit.folder / "adapter", **LORA)


def picture(kit, number) -> Image.Image:
    return Image.open(kit.folder / f"{number}.png").convert("RGB")


def turns(text, numbers, *more):
    return [("human", "<image>\n" * len(numbers) + text), *more]


def asked(kit, inference):
    """(token ids, pictures) of every one of QUESTIONS."""
    prompts = [inference.prompt(turns(*question)) for question in QUESTIONS]
    return prompts, [[picture(kit, number) for number in numbers] for _, numbers in QUESTIONS]


def weights(folder) -> dict:
    return load_file(folder / "model.safetensors")


def state_of(model) -> dict:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


# --- training ---


def test_three_steps(kit, whole):
    """The loss of supervised positions is that of logits everywhere; every part learns."""
    assert len(whole.losses) == 3 and whole.losses == pytest.approx(whole.full_losses, rel=1e-6)
    start = kit.family.load(kit.checkpoint, device="cpu").model.state_dict()
    moved = {
        kit.family.part_of(name)
        for name, value in whole.trainer.model.named_parameters()
        if not value.equal(start[name])
    }
    assert moved == {"mm_vision_tower", "mm_mlp_adapter", "mm_language_model"}


def test_resume(kit, whole):
    out = kit.folder / "cut"
    assert len(kit.run(out, stop_after=2, **SAVING).losses) == 2
    again = kit.run(out, **SAVING)
    assert again.losses == pytest.approx(whole.losses[2:], abs=1e-6)  # it went on with the third step
    first, second = weights(whole.out), weights(out)
    assert first.keys() == second.keys() and all(torch.allclose(first[k], second[k], atol=1e-6) for k in first)


def test_save_and_load(kit, whole):
    family = family_of(str(whole.out))
    loaded = family.load(str(whole.out), device="cpu")
    trained, again = state_of(whole.trainer.model), loaded.model.state_dict()
    assert type(family) is type(kit.family) and not loaded.model.training
    assert again.keys() == trained.keys() and all(again[name].equal(trained[name]) for name in again)
    assert loaded.image_processor.to_dict() == whole.trainer.train_dataset.loaded.image_processor.to_dict()
    text = "<|im_start|>user\nWhat is shown?"
    assert loaded.tokenizer(text).input_ids == whole.trainer.train_dataset.loaded.tokenizer(text).input_ids


def test_names_of_saved_weights(kit, inference, tmp_path, monkeypatch):
    """The published ones, also under ZeRO-3, which leaves a model with all renamings that transformers knows of it."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    renamings = get_model_conversion_mapping(inference.model)
    assert renamings
    monkeypatch.setattr(inference.model, "_weight_conversions", renamings, raising=False)
    inference.model.save_pretrained(tmp_path)
    assert weights(tmp_path).keys() == load_file(f"{kit.checkpoint}/model.safetensors").keys()


def test_samples_can_be_made_in_another_process(whole):
    data = whole.trainer.train_dataset
    again = pickle.loads(pickle.dumps(data))
    for name, value in data[1].items():
        same = value.equal(again[1][name]) if isinstance(value, torch.Tensor) else str(value) == str(again[1][name])
        assert same, name


def test_lora(kit, adapter, inference):
    """As trained, as loaded over its base and as merged, the model is one."""
    from llava.tools.merge_lora import main

    assert adapter.losses == pytest.approx(adapter.full_losses, rel=1e-6)
    inputs = inference.inputs(*([row[0]] for row in asked(kit, inference)))
    main(["--model-path", str(adapter.out), "--save-model-path", str(kit.folder / "merged")])
    models = [kit.family.load(str(folder), device="cpu").model for folder in (adapter.out, kit.folder / "merged")]
    with torch.no_grad():
        trained, loaded, merged, base = (
            model.eval()(**inputs).logits for model in (adapter.trainer.model, *models, inference.model)
        )
    assert (trained - loaded).abs().max() < 1e-5 * trained.abs().max() and merged.equal(loaded)
    assert (trained - base).abs().max() > 1e-2 * trained.abs().max()
    assert weights(kit.folder / "merged").keys() == load_file(f"{kit.checkpoint}/model.safetensors").keys()
    names = load_file(adapter.out / "adapter_model.safetensors").keys()
    assert names and {kit.family.part_of(name) for name in names} == {"mm_language_model"}


def test_parts(kit, adapter, inference):
    """Text alone reaches the language model's parameters and no others; names with adapters are of the same parts."""
    model, part_of = inference.model, kit.family.part_of
    parts = {name: part_of(name) for name, _ in model.named_parameters()}
    assert set(parts.values()) == {"mm_vision_tower", "mm_mlp_adapter", "mm_language_model"} < set(TUNABLE_PARTS)
    model(**inference.inputs([inference.prompt(turns("Say yes.", []))], [[]])).logits.square().sum().backward()
    reached = {name for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    language = {name for name, part in parts.items() if part == "mm_language_model"}
    assert reached <= language and language - reached <= {"model.image_newline"}
    for name, _ in adapter.trainer.model.named_parameters():
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        assert part_of(name) == parts.get(plain, "mm_language_model") and (plain in parts or "lora_" in plain)


# --- answers ---


def test_chat(kit, inference):
    """The second turn is asked with the first one and its picture before it."""
    options = {"max_new_tokens": 6, "min_new_tokens": 4}  # random weights may have nothing to say
    chat = Chat(inference, do_sample=False, **options)
    chat.add_picture(str(kit.folder / "0.png"))
    pieces = []
    first = chat.ask("What is shown?", pieces.append)
    second = chat.ask("And where?")
    shown = [[picture(kit, 0)]]
    assert first and "".join(pieces).strip() == first and len(chat.pictures) == 1
    said = turns("What is shown?", [0])
    assert [first] == inference.generate([inference.prompt(said)], shown, **options)
    said += [("gpt", first), ("human", "And where?")]
    assert [second] == inference.generate([inference.prompt(said)], shown, **options)
    assert chat.turns == [*said, ("gpt", second)]


@pytest.fixture(scope="module")
def answers(kit, inference):
    """The answer to every one of QUESTIONS, asked alone."""
    return [
        inference.generate([ids], [shown], max_new_tokens=4)[0]
        for ids, shown in zip(*asked(kit, inference), strict=True)
    ]


def test_batch_prediction_and_score(kit, answers):
    from llava.eval import model_vqa, score

    rows = [{"question_id": at, "text": text} for at, (text, _) in enumerate(QUESTIONS)]
    for row, (_, numbers) in zip(rows, QUESTIONS, strict=True):
        row |= {"image": [f"{number}.png" for number in numbers]} if numbers else {}
        row["text"] = "<image>\n" * len(numbers) + row["text"]
    (kit.folder / "questions.json").write_text(json.dumps(rows))
    for size in (1, 3):
        flags = {
            "model-path": kit.checkpoint,
            "question-file": kit.folder / "questions.json",
            "image-folder": kit.folder,
        }
        flags |= {"answers-file": kit.folder / f"{size}.jsonl", "batch-size": size, "max_new_tokens": 4}
        model_vqa.main([part for key, value in flags.items() for part in (f"--{key}", str(value))])
        found = [json.loads(line) for line in (kit.folder / f"{size}.jsonl").read_text().splitlines()]
        assert [row["text"] for row in found] == answers and len(set(answers)) > 1
    truth = [{"question_id": at, "answer": text} for at, text in enumerate([*answers[:-1], "something else"])]
    (kit.folder / "truth.json").write_text(json.dumps(truth))
    paths = {
        "answers": kit.folder / "3.jsonl",
        "references": kit.folder / "truth.json",
        "output": kit.folder / "s.json",
    }
    score.main([*(part for key, value in paths.items() for part in (f"--{key}", str(value))), "--metric", "exact"])
    assert json.loads((kit.folder / "s.json").read_text())["score"] == (len(answers) - 1) / len(answers)


def test_exact_match(kit, answers):
    from llava.eval.exact_match import main

    records = []
    for at, ((text, numbers), answer) in enumerate(zip(QUESTIONS, [*answers[:-1], "something else"], strict=True)):
        said = [*turns(text, numbers), ("gpt", answer)]
        record = {"id": str(at), "conversations": [{"from": speaker, "value": value} for speaker, value in said]}
        records.append(record | ({"image": [f"{number}.png" for number in numbers]} if numbers else {}))
    (kit.folder / "held_out.json").write_text(json.dumps(records))
    flags = {"model-path": kit.checkpoint, "data-path": kit.folder / "held_out.json", "image-folder": kit.folder}
    flags |= {"output": kit.folder / "eval.json", "batch-size": 3, "max-new-tokens": 4}
    main([*(part for key, value in flags.items() for part in (f"--{key}", str(value))), "--blank-images"])
    result = json.loads((kit.folder / "eval.json").read_text())
    assert [row["prediction"] for row in result["questions"]] == answers
    assert result["exact_match"] == (len(answers) - 1) / len(answers) and result["blank_images"]["n"] == 3


def test_likelihoods_and_logits(kit, inference, monkeypatch):
    """Rows of a batch, padded, against the logits of each row's own forward."""
    split = [split_tokens(inference, turns(*question), "A temple in China") for question in QUESTIONS]
    prompts, answers = zip(*split, strict=True)
    _, shown = asked(kit, inference)
    found = log_likelihoods(inference, list(prompts), list(answers), shown)
    for prompt, answer, pictures, (value, _) in zip(prompts, answers, shown, found, strict=True):
        inputs, count = inference.inputs([prompt + answer], [pictures]), len(answer)
        with torch.no_grad():
            logits = inference.model(**inputs).logits[0, -count - 1 : -1]
            states = kit.family.answer_states(inputs, [count], inference.loaded)
            assert torch.allclose(kit.family.logits(inference.model, states), logits, atol=1e-5)
        expected = logits.log_softmax(-1)[range(count), answer].sum().item()
        assert value == pytest.approx(expected, rel=1e-4)
    first, last = found[0][0], log_likelihoods(inference, prompts[:1], answers[:1], [[picture(kit, 1)]])[0][0]
    assert abs(first - last) > 1e-2  # it looks at the picture
    inputs, short = inference.inputs([prompts[0] + answers[0]], [shown[0]]), replace(inference.loaded, context=9)
    monkeypatch.setattr(inference.model.config, "tokenizer_model_max_length", 9, raising=False)
    with pytest.raises(LlavaError, match="beyond the model's context of 9 tokens"):
        kit.family.answer_states(inputs, [len(answers[0])], short)


# --- lengths ---


def record_of(numbers):
    said = [*turns("What is shown here?", numbers), ("gpt", "A temple in China."), ("human", "Sure?"), ("gpt", "Yes.")]
    record = {"id": "r", "conversations": [{"from": speaker, "value": value} for speaker, value in said]}
    return record | ({"image": [f"{number}.png" for number in numbers]} if numbers else {})


def real_length(kit, model, loaded, args, numbers) -> tuple[int, int]:
    """(tokens that reach the language model, patches that the vision encoder embeds) of a record's sample."""
    sample = kit.family.sample(record_of(numbers), loaded, args)
    if not numbers:
        return len(sample["input_ids"]), 0
    patches = []
    first = next(module for module in model.modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d))
    hook = first.register_forward_hook(lambda module, given, made: patches.append(made.numel() // made.shape[1]))
    with torch.no_grad():
        logits = model(**kit.family.collate([sample], loaded, args)).logits
    hook.remove()
    return logits.shape[1], sum(patches)


@pytest.mark.parametrize("numbers", [[0], [2, 1], []], ids=["one", "two", "none"])
def test_length(kit, whole, inference, numbers):
    data = whole.trainer.train_dataset
    args = replace(data.args, image_folder=str(kit.folder))
    sizes = [picture(kit, number).size for number in numbers]
    found = kit.family.length(record_of(numbers), sizes, data.loaded, args)
    assert found.exact and found[:2] == real_length(kit, inference.model, data.loaded, args, numbers)


def test_choice_of_patches(kit):
    """A family whose patches can be chosen says how long a sample is at most; another refuses in one line."""
    inference, choice = Inference.load(kit.checkpoint, device="cpu"), PatchChoice("budget", 0.3)
    loaded, choose = inference.loaded, kit.family.choose_patches
    choose(loaded, None)
    assert kit.family.patch_choice(loaded) is None
    try:
        choose(loaded, choice)
    except LlavaError as error:
        assert "adaptive" in str(error) and "expected" in str(error) and "\n" not in str(error)
        return
    assert kit.family.patch_choice(loaded) == choice
    args = SampleArgs(image_folder=str(kit.folder))
    for numbers in ([0], [2, 1]):
        sizes = [picture(kit, number).size for number in numbers]
        found = kit.family.length(record_of(numbers), sizes, loaded, args)
        tokens, patches = real_length(kit, inference.model, loaded, args, numbers)
        assert not found.exact and tokens < found.tokens and patches < found.patches
