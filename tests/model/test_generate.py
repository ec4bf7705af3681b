"""Generation, and the four language models from build to reload."""

import json

import pytest
import torch
from safetensors.torch import load_file

from llava.constants import IMAGE_TOKEN_INDEX
from llava.errors import LlavaError
from tests.model import golden, small

X = IMAGE_TOKEN_INDEX
SIDE = 28
NEW = 8


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    return small.tower(tmp_path_factory.mktemp("clip"), side=SIDE)


@pytest.fixture(scope="module", params=list(small.FAMILIES))
def model(tower, request):
    return small.model(tower, request.param, image_grid_pinpoints="(1x1),...,(2x2)")


@pytest.fixture(scope="module")
def qwen(tower):
    return small.model(tower, image_grid_pinpoints="(1x1),...,(2x2)")


PROMPTS = [
    ([11, X, 12, 13], [(5, (56, 50), "image")]),
    ([14, 15, 16, 17, 18, 19, 20], []),
    ([21, X, 22, X, 23], [(1, (30, 30), "image"), (3, (30, 30), "video")]),
]


def images_of(prompt, seed):
    return [small.pixels(k, 3, SIDE, SIDE, seed=10 * seed + i) for i, (k, _, _) in enumerate(prompt[1])]


def batch(prompts, side):
    """Padded ids and mask, and the images of all rows."""
    length = max(len(ids) for ids, _ in prompts)
    pads = [[small.PAD] * (length - len(ids)) for ids, _ in prompts]
    ids = [pad + row if side == "left" else row + pad for pad, (row, _) in zip(pads, prompts, strict=True)]
    mask = [
        [0] * len(pad) + [1] * len(row) if side == "left" else [1] * len(row) + [0] * len(pad)
        for pad, (row, _) in zip(pads, prompts, strict=True)
    ]
    return {
        "attention_mask": torch.tensor(mask),
        "images": [image for i, prompt in enumerate(prompts) for image in images_of(prompt, i)],
        "image_sizes": [size for _, images in prompts for _, size, _ in images],
        "modalities": [modality for _, images in prompts for _, _, modality in images],
    }, torch.tensor(ids)


def greedy(model, ids, **kwargs):
    return model.generate(
        ids, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=small.PAD, **kwargs
    )


@pytest.fixture(scope="module")
def alone(model):
    """Each prompt's answer on its own, one forward of the whole sequence per token: no cache, no padding."""
    answers = []
    for i, (prompt, images) in enumerate(PROMPTS):
        inputs = {"modalities": [m for _, _, m in images], "image_sizes": [s for _, s, _ in images]}
        answer = []
        for _ in range(NEW):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer]), images=images_of(PROMPTS[i], i), **inputs).logits
            logits[0, -1, small.EOS] = -torch.inf  # as min_new_tokens asks
            answer.append(int(logits[0, -1].argmax()))
        answers.append(answer)
    assert len({tuple(answer) for answer in answers}) == 3
    return answers


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_its_rows(model, alone, side):
    inputs, ids = batch(PROMPTS, side)
    assert greedy(model, ids, **inputs).tolist() == alone
    assert greedy(model, ids, use_cache=False, **inputs).tolist() == alone


def test_one_row_at_a_time(model, alone):
    for prompt, answer in zip(PROMPTS, alone, strict=True):
        index = PROMPTS.index(prompt)
        inputs, ids = batch([prompt], "left")
        inputs["images"] = images_of(prompt, index)
        assert greedy(model, ids, **inputs).tolist() == [answer]


def test_text_alone(model, alone):
    ids = torch.tensor([PROMPTS[1][0]])
    for images in ({}, {"images": None}, {"images": []}):
        assert greedy(model, ids, **images).tolist() == [alone[1]]
    # a dummy image for the text row
    out = greedy(model, ids, images=[small.pixels(3, SIDE, SIDE)], image_sizes=[(9, 9)], modalities=["text"])
    assert out.tolist() == [alone[1]]


def test_names_of_the_prompt(qwen):
    inputs, ids = batch(PROMPTS, "left")
    expected = greedy(qwen, ids, **inputs)
    assert torch.equal(greedy(qwen, None, input_ids=ids, **inputs), expected)
    assert torch.equal(greedy(qwen, ids, position_ids=torch.arange(ids.shape[1])[None], **inputs), expected)
    with pytest.raises(LlavaError, match="inputs_embeds is not accepted"):
        qwen.generate(inputs_embeds=torch.zeros(1, 2, 32))
    with pytest.raises(LlavaError, match="inputs or input_ids"):
        qwen.generate(max_new_tokens=2)
    with pytest.raises(LlavaError, match="3 <image> tokens in 3 rows, but 2 images"):
        greedy(qwen, ids, **{**inputs, "images": inputs["images"][:2]})


def test_padding_without_a_mask(qwen):
    """As transformers' generate does: the pad id at the ends of a row is no part of the prompt."""
    for side in ("left", "right"):
        inputs, ids = batch(PROMPTS, side)
        expected = greedy(qwen, ids, **inputs)
        del inputs["attention_mask"]
        assert torch.equal(greedy(qwen, ids, **inputs), expected)


def test_sampling_beams_and_early_ends(qwen):
    inputs, ids = batch(PROMPTS, "left")
    settings = dict(max_new_tokens=NEW, pad_token_id=small.PAD, **inputs)
    assert qwen.generate(ids, num_beams=2, do_sample=False, **settings).shape[0] == 3
    torch.manual_seed(0)
    a = qwen.generate(ids, do_sample=True, temperature=3.0, **settings)
    torch.manual_seed(1)
    assert not torch.equal(a, qwen.generate(ids, do_sample=True, temperature=3.0, **settings))
    first = greedy(qwen, ids, **inputs)[0, 0].item()
    ended = qwen.generate(
        ids[:1],
        do_sample=False,
        eos_token_id=first,
        max_new_tokens=NEW,
        pad_token_id=small.PAD,
        attention_mask=inputs["attention_mask"][:1],
        images=inputs["images"][:1],
        image_sizes=inputs["image_sizes"][:1],
        modalities=["image"],
    )
    assert ended.tolist() == [[first]]


# --- four language models, written and read ---


def outputs(model):
    inputs, ids = batch(PROMPTS, "right")
    with torch.no_grad():
        logits = model(ids, **inputs).logits
    merged = model.prepare_inputs_labels_for_multimodal(
        ids, None, inputs["attention_mask"], None, None, *(inputs[k] for k in ("images", "modalities", "image_sizes"))
    )
    return logits[merged[2].bool()]


def test_saved_and_loaded_by_the_auto_classes(model, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    family = next(key for key, row in small.FAMILIES.items() if row.architecture == type(model).__name__)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == f"llava_{family}" and stored["architectures"] == [type(model).__name__]
    weights = load_file(tmp_path / "model.safetensors")
    for name in (
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.mm_projector.0.weight",
        "model.image_newline",
        "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding",
        "model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight",
        "model.vision_tower.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
        "model.vision_tower.vision_tower.vision_model.post_layernorm.bias",
    ):
        assert name in weights
    assert weights.keys() == dict(model.named_parameters()).keys()
    assert isinstance(AutoConfig.from_pretrained(tmp_path), small.classes(family)[0])
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model) and again.get_vision_tower().is_loaded
    assert torch.equal(outputs(again), outputs(model))
    again, info = small.classes(family)[1].from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.mark.parametrize("family", list(small.FAMILIES))
def test_tied_embeddings(tower, tmp_path, family):
    model = small.model(tower, family, tie_word_embeddings=True, image_grid_pinpoints="(1x1),...,(2x2)")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in weights and "model.embed_tokens.weight" in weights
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert again.lm_head.weight is again.model.embed_tokens.weight and not info["missing_keys"]
    assert torch.equal(outputs(again), outputs(model))
    with torch.no_grad():
        again.model.embed_tokens.weight.mul_(2)
    assert not torch.allclose(outputs(again), outputs(model), atol=1e-3)


def test_language_model_without_tower(tmp_path):
    """Before `initialize_vision_modules`, the class is a plain language model."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = small.config("unused").to_dict()
    kept = {k: v for k, v in sizes.items() if not k.startswith(("mm_", "image_", "model_type", "architectures"))}
    torch.manual_seed(0)
    plain = Qwen2ForCausalLM(Qwen2Config(**kept)).eval()
    plain.save_pretrained(tmp_path)
    model = small.classes("qwen")[1].from_pretrained(tmp_path).eval()
    assert model.get_vision_tower() is None
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-6)
    expected = plain.generate(ids, do_sample=False, max_new_tokens=4, min_new_tokens=4)[:, 4:]
    assert torch.equal(model.generate(ids, do_sample=False, max_new_tokens=4, min_new_tokens=4), expected)


def test_prefill_computes_one_position():
    """`generate` asks for the last position's logits only."""
    case = golden.case("qwen_clip_anyres_unpad")
    _, model, _, _ = golden.load(case.folder)
    seen = []
    hook = model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    model.generate(**case.inputs, max_new_tokens=3, do_sample=False)
    hook.remove()
    assert seen == [1, 1, 1]


def test_a_video_with_a_size_for_each_frame(model):
    """As LLaVA-NeXT's tutorial gives them: (width, height) of a picture, its number of elements for an array."""
    ids, clip = torch.tensor([[21, X, 22]]), small.pixels(3, 3, SIDE, SIDE, seed=4)
    plain = greedy(model, ids, images=[clip], modalities=["video"])
    for sizes in ([(30, 20)] * 3, [1800] * 3):
        assert torch.equal(greedy(model, ids, images=[clip], modalities=["video"], image_sizes=sizes), plain)
        labels = torch.tensor([[-100, -100, 22]])
        losses = [
            model(ids, images=[clip], modalities=["video"], image_sizes=s, labels=labels).loss for s in (None, sizes)
        ]
        assert losses[0] == losses[1]
