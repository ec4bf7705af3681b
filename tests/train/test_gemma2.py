"""LLaVA on Gemma 2, whose embeddings are scaled and whose attention scores and logits are capped."""

import json

import pytest
import torch
from safetensors.torch import load_file

from llava.errors import LlavaError
from llava.model.builder import best_attention, load_pretrained_model
from tests import tiny

# caps that bend these numbers, a window shorter than the rows, and ids of the golden tokenizer
CHANGES = dict(
    attn_logit_softcapping=0.5,
    final_logit_softcapping=0.5,
    query_pre_attn_scalar=1,
    head_dim=16,
    sliding_window=8,
    initializer_range=0.2,
    pad_token_id=701,
    bos_token_id=None,
    eos_token_id=702,
)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    return tiny.llm(tmp_path_factory.mktemp("gemma2"), "gemma2", **CHANGES)


@pytest.fixture(scope="module")
def flags(kit, gemma):
    return {"model_name_or_path": gemma, "version": "gemma_instruct"}


def load(folder, **kwargs):
    return load_pretrained_model(str(folder), None, "llava", device_map="cpu", torch_dtype="float32", **kwargs)


def test_text_alone_is_gemma(gemma):
    """The same weights give the same logits, from ids and from embeddings that the merge has made."""
    from transformers import Gemma2ForCausalLM

    stock = Gemma2ForCausalLM.from_pretrained(gemma, attn_implementation="eager").eval()
    ours = load(gemma)[1]
    assert type(ours).__name__ == "LlavaGemma2ForCausalLM" and ours.config._attn_implementation == "eager"
    ids = torch.tensor([[*range(5, 25)], [*range(40, 55), 0, 0, 0, 0, 0]])
    mask = torch.arange(20) < torch.tensor([[20], [15]])
    with torch.no_grad():
        expected, found = (model(ids, attention_mask=mask).logits[mask] for model in (stock, ours))
        uncapped = Gemma2ForCausalLM.from_pretrained(gemma, attn_logit_softcapping=None).eval()(ids).logits[mask]
    assert found.equal(expected) and expected.abs().max() > 0.45
    assert (uncapped - expected).abs().max() > 0.01  # a case in which the cap of attention counts


def test_text_through_the_merge_is_gemma(gemma, kit, tmp_path):
    from transformers import Gemma2ForCausalLM

    out = kit.run(tmp_path / "out", model_name_or_path=gemma, version="gemma_instruct", max_steps=1, learning_rate=0.0)
    stock = Gemma2ForCausalLM.from_pretrained(gemma, attn_implementation="eager").eval()
    ours = load(out)[1]
    ids = torch.tensor([[*range(5, 25)], [*range(40, 55), 0, 0, 0, 0, 0]])
    mask = torch.arange(20) < torch.tensor([[20], [15]])
    with torch.no_grad():
        merged = ours.prepare_inputs_labels_for_multimodal(ids, None, mask, None, None, images=[])
        found = ours(inputs_embeds=merged[4], attention_mask=merged[2]).logits
        assert torch.allclose(found[mask], stock(ids, attention_mask=mask).logits[mask], atol=1e-6)
        assert merged[4][mask].equal(stock.model.embed_tokens(ids)[mask])


def test_visual_tokens_are_not_scaled(gemma, kit, tmp_path):
    from llava.constants import IMAGE_TOKEN_INDEX

    model = load(kit.run(tmp_path / "out", model_name_or_path=gemma, version="gemma_instruct", max_steps=1))[1]
    image = torch.randn(1, 3, tiny.SIDE, tiny.SIDE)
    with torch.no_grad():
        merged = model.prepare_inputs_labels_for_multimodal(
            torch.tensor([[5, IMAGE_TOKEN_INDEX, 6]]), None, None, None, None, image
        )[4][0]
        assert merged[1:-1].equal(model.encode_images(image)[0]) and len(merged) == 6
        assert torch.allclose(merged[0], model.model.embed_tokens.weight[5] * 32**0.5)


def test_three_steps(kit, flags, tmp_path, spy):
    """The loss is that of the full logits; what was saved loads, with Gemma's template, and answers."""
    out = kit.run(tmp_path / "out", "itmtitmtiimt", **flags)
    trainer = spy.trainer
    losses = [entry["loss"] for entry in tiny.history(out)]
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert spy.moved_parts() == {"mm_vision_tower", "mm_mlp_adapter", "mm_language_model"}

    trained = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.model.load_state_dict(spy.before, strict=False)
    batch = trainer.data_collator([trainer.train_dataset[at] for at in range(4)])
    with torch.no_grad():
        expected = trainer.model.eval()(**batch).loss.item()  # transformers' own, of logits at every position
    assert losses[0] == pytest.approx(expected, abs=1e-5)

    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["conversation_template"]) == ("llava_gemma2", "gemma_instruct")
    assert "lm_head.weight" not in load_file(out / "model.safetensors")  # tied, as Gemma's
    tokenizer, model, _, _ = load(out)
    assert all(value.equal(trained[key]) for key, value in model.state_dict().items())
    prompt = torch.tensor([tokenizer("<start_of_turn>user\nHi").input_ids])
    answers = [
        model.generate(prompt, max_new_tokens=12, min_new_tokens=12, do_sample=False, use_cache=cache)
        for cache in (True, False)
    ]
    assert answers[0].shape == (1, 12) and answers[0].equal(answers[1])


def test_new_tokens_are_scaled_too(gemma):
    from llava.model.llava_arch import grow_embeddings

    model = load(gemma)[1]
    grow_embeddings(model, range(710))
    layer = model.get_input_embeddings()
    assert torch.allclose(layer(torch.tensor([709])), layer.weight[709] * 32**0.5)
    assert model.lm_head.weight is layer.weight


def test_varlen_has_the_cap(gemma):
    """Padded on either side, or not at all, of rows longer than the window."""
    eager, varlen = (load(gemma, attn_implementation=name)[1] for name in ("eager", "varlen"))
    ids = torch.randint(1, 700, (2, 20), generator=torch.Generator().manual_seed(0))
    right = torch.arange(20) < torch.tensor([[20], [15]])
    with torch.no_grad():
        for mask in (right, right.flip(1), torch.ones_like(right)):
            expected, found = (model(ids, attention_mask=mask).logits[mask] for model in (eager, varlen))
            assert torch.allclose(found, expected, atol=1e-5)
        assert torch.allclose(varlen(ids).logits, eager(ids).logits, atol=1e-5)


def test_attention_that_has_no_cap_is_refused(kit, flags, gemma, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        kit.run(tmp_path / "out", attn_implementation="sdpa", **flags)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    words = "attn_implementation: found 'sdpa', which leaves out attn_logit_softcapping 0.5"
    assert ended.value.code == 2 and words in error and "expected one of eager, varlen, flash_attention_2" in error
    with pytest.raises(LlavaError, match=words):
        load(gemma, attn_implementation="sdpa")


def test_attention_without_a_cap_is_as_before():
    from transformers import Gemma2Config, Qwen2Config

    for config in (None, Qwen2Config(), Gemma2Config(attn_logit_softcapping=None)):
        assert best_attention(torch.float32, True, config) == "sdpa"
        assert best_attention(torch.float32, True, config, "varlen") == "varlen"
