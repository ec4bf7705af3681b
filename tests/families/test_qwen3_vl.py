"""Qwen3-VL: what it has of its own beside the contract of every family."""

import json
import subprocess
import sys

import pytest
import torch

from llava.data.dataset import SampleArgs
from llava.errors import LlavaError
from llava.families import family_of, get_family
from tests import tiny
from tests.model.qwen2_vl.parts import picture
from tests.support.families import FamilyKit

FAMILY = get_family("qwen3_vl")


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    return FamilyKit("qwen3_vl", tmp_path_factory.mktemp("qwen3_vl"))


@pytest.fixture(scope="module")
def loaded(kit):
    return FAMILY.load(kit.checkpoint, device="cpu")


@pytest.fixture(scope="module")
def stock(kit):
    """transformers' model of the checkpoint."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(kit.checkpoint)
    assert type(model).forward.__module__ == "transformers.models.qwen3_vl.modeling_qwen3_vl"
    return model.eval()


@pytest.fixture(scope="module")
def trained(kit, stock):
    """Three steps, beside each the loss that transformers' model has of its weights and batch."""
    weights = {name: value.clone() for name, value in stock.state_dict().items()}

    def full_loss(model, batch):
        stock.load_state_dict(model.state_dict())
        return stock(**batch).loss

    run = kit.run(kit.folder / "trained", full_loss=full_loss)
    stock.load_state_dict(weights)
    return run


def test_light_import():
    code = (
        "import sys, llava.families as f; f.get_family('qwen3_vl'); print({'torch', 'transformers'} & {*sys.modules})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_loss_is_transformers_own(trained):
    assert len(trained.losses) == 3
    for loss, full in zip(trained.losses, trained.full_losses, strict=True):
        assert abs(loss - full) <= 1e-6


def test_what_is_left_is_a_stock_folder(kit, trained, stock):
    from transformers import AutoModelForImageTextToText

    names = {"config.json": "architectures", "processor_config.json": "processor_class"}
    names |= {"preprocessor_config.json": "image_processor_type", "tokenizer_config.json": "processor_class"}
    found = {file: json.loads((trained.out / file).read_text())[name] for file, name in names.items()}
    assert found == {
        "config.json": ["Qwen3VLForConditionalGeneration"],
        "processor_config.json": "Qwen3VLProcessor",
        "preprocessor_config.json": "Qwen2VLImageProcessor",
        "tokenizer_config.json": "Qwen3VLProcessor",
    }
    again = AutoModelForImageTextToText.from_pretrained(trained.out).eval()
    assert type(again) is type(stock) and type(again) is not type(trained.trainer.model)
    ours = family_of(str(trained.out)).load(str(trained.out), device="cpu")
    inputs = FAMILY.inputs([FAMILY.prompt([("human", "<image>\nWhat?")], ours)], [[picture(90, 70)]], ours)
    with torch.no_grad():
        assert again(**inputs).logits.equal(ours.model(**inputs).logits)
        assert (again(**inputs).logits - stock(**inputs).logits).abs().max() > 1e-2


def test_inputs_are_the_processors(loaded):
    """Tokens, types and pixels as transformers' processor makes them of the chat template's text."""
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
    ]
    turns = [("system", "Be brief."), ("human", "<image>\nWhat?")]
    for chat, said in ((messages, turns), (messages[1:], turns[1:])):
        text = loaded.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        theirs = loaded.processor(text=[text], images=[picture(90, 150)], return_tensors="pt")
        ours = FAMILY.inputs([FAMILY.prompt(said, loaded)], [[picture(90, 150)]], loaded)
        assert ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in theirs)
        assert text.startswith(
            "<|im_start|>system\nBe brief." if len(chat) == 2 else "<|im_start|>user\n<|vision_start|>"
        )
    # patches of 16 pixels from -1 to 1, merged by two
    assert ours["pixel_values"].shape[1] == 3 * 2 * 16**2 and ours["image_grid_thw"].tolist() == [[1, 12, 8]]
    assert -1 <= ours["pixel_values"].min() < -0.9 and 0.9 < ours["pixel_values"].max() <= 1
    assert ours["mm_token_type_ids"].sum() == 24


def test_published_prompt():
    assert FAMILY.prompt_text([("human", "<image>\nDescribe this image.")], None) == (
        "<|im_start|>user\n<image>Describe this image.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_that_thinks_is_refused(loaded, monkeypatch):
    FAMILY.check_chat_template(loaded.processor, "here")
    opening = "<|im_start|>assistant\n"
    thinking = loaded.processor.chat_template.replace(opening, f"{opening}<think>\n")
    monkeypatch.setattr(loaded.processor, "chat_template", thinking)
    with pytest.raises(LlavaError, match=r"here: its chat template writes .*<think>.*expected Qwen3-VL's"):
        FAMILY.check_chat_template(loaded.processor, "here")


def test_deepstack_mergers_are_the_projector(kit, loaded, tmp_path):
    run = kit.run(tmp_path / "out", mm_tunable_parts="mm_mlp_adapter", max_steps=1)
    before = loaded.model.state_dict()
    moved = {name for name, value in run.trainer.model.named_parameters() if not value.equal(before[name])}
    mergers = ("model.visual.merger.", "model.visual.deepstack_merger_list.0.", "model.visual.deepstack_merger_list.1.")
    assert moved == {name for name in before if name.startswith(mergers)} and len(moved) == 3 * 6


def test_a_batch_without_images_changes_nothing(kit, loaded):
    from llava.data.records import load_records

    records, args = load_records(kit.records), SampleArgs(image_folder=str(kit.folder / "records/images"))
    samples = [FAMILY.sample(record, loaded, args) for record in records if "image" not in record]
    batch = FAMILY.collate(samples, loaded, args)
    plain = {key: batch[key][:, :-1] for key in ("input_ids", "attention_mask", "labels")}
    model = loaded.model.train()
    losses = [model(**inputs).loss for inputs in (batch, plain)]
    assert batch["pixel_values"].shape == (4, 3 * 2 * 16**2) and losses[0].item() == pytest.approx(
        losses[1].item(), abs=1e-6
    )
    losses[0].backward()
    vision = [value.grad for value in model.model.visual.parameters()]
    assert all(grad is not None and not grad.any() for grad in vision) and model.lm_head.weight.grad.any()
    model.eval().zero_grad()


REFUSED = [
    (
        {"adaptive_patches": "{method: budget, alpha: 0.3}"},
        "but Qwen3-VL keeps all patches; expected no adaptive_patches",
    ),
    ({"patch_selection_method": "v1"}, "adaptive_patches is {'method': 'v1'}, but Qwen3-VL keeps all patches"),
    ({"vision_tower": "x"}, "vision_tower is 'x', but Qwen3-VL has a vision encoder"),
    ({"mm_token_compressor_lr": 1e-3}, "expected no mm_token_compressor_lr"),
    ({"supervise": "llava_next"}, "expected answers_only"),
]


@pytest.mark.parametrize(
    ("changes", "expected"), REFUSED, ids=lambda value: " ".join(value) if isinstance(value, dict) else ""
)
def test_refusals(kit, tmp_path, capsys, changes, expected):
    with pytest.raises(SystemExit):
        kit.run(tmp_path / "out", **changes)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and expected in error


def test_selections_are_refused(kit, capsys):
    from llava.eval.exact_match import main

    folder = kit.folder / "records"
    flags = ["--data-path", folder / "records.json", "--image-folder", folder / "images", "--selections", "budget:0.5"]
    with pytest.raises(SystemExit):
        main([str(word) for word in ("--model-path", kit.checkpoint, *flags)])
    assert "qwen3_vl has patches of one size, expected a model that can choose" in capsys.readouterr().err


def test_other_kinds_are_refused(kit, tmp_path):
    other = tiny.qwen2_vl(tmp_path / "other")
    with pytest.raises(LlavaError, match="found model_type 'qwen2_vl', expected 'qwen3_vl'"):
        FAMILY.load(other, device="cpu")
    with pytest.raises(LlavaError, match="found model_type 'qwen3_vl', expected 'qwen2_vl'"):
        get_family("qwen2_vl").load(kit.checkpoint, device="cpu")
