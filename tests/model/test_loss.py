"""The loss of supervised positions: logits as transformers' own forward gives them, from hidden states alone."""

import inspect

import pytest
import torch
import transformers

from llava.model.loss import output_logits, supervised_loss, supervised_training
from tests.model.qwen2_vl.parts import make_folder

SIZES = dict(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    initializer_range=0.5,  # logits that a soft cap bends
    pad_token_id=0,
    tie_word_embeddings=False,
)
FAMILIES = {  # what each does behind its output layer
    "Qwen2": {},
    "Gemma2": {"final_logit_softcapping": 3.0},
    "Gemma3": {"final_logit_softcapping": 3.0},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 8.0},
}


@pytest.fixture(params=FAMILIES)
def causal(request):
    """A random language model of transformers, in float32."""
    name, changes = request.param, FAMILIES[request.param]
    text = "Text" if name == "Gemma3" else ""
    config = getattr(transformers, f"{name}{text}Config")(**SIZES, **changes)
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def labelled(rows=((5, 6, 7, 8, 9, 10), (11, 12, 13, 0, 0, 0))):
    ids = torch.tensor(rows)
    labels = ids.masked_fill(ids == 0, -100)
    labels[0, 2] = -100
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


def test_logits_are_those_of_the_whole_model(causal):
    inputs = labelled()
    with torch.no_grad():
        hidden = causal.model(inputs["input_ids"])[0]
        expected = causal(inputs["input_ids"]).logits
        found = output_logits(causal, hidden.flatten(0, 1))
    assert found.equal(expected.flatten(0, 1))
    bare = causal.lm_head(hidden.flatten(0, 1))
    assert type(causal).__name__ == "Qwen2ForCausalLM" or (found - bare).abs().max() > 0.5  # a case that can tell


@pytest.mark.parametrize("count", [None, 3, torch.tensor(11)])
def test_loss_is_that_of_the_whole_model(causal, count):
    inputs = labelled()
    given = {} if count is None else {"num_items_in_batch": count}
    expected = causal(**inputs, **given).loss
    hidden = causal.model(inputs["input_ids"], attention_mask=inputs["attention_mask"])[0]
    assert abs(supervised_loss(causal, hidden, inputs["labels"], count) - expected).item() < 1e-6


# --- transformers' vision-language models ---


@supervised_training("of_our_own")
class Own(transformers.Qwen2VLForConditionalGeneration):
    pass


@pytest.fixture(scope="module")
def vision_language(tmp_path_factory):
    """(transformers' model, ours with the same weights)."""
    stock = transformers.Qwen2VLForConditionalGeneration.from_pretrained(make_folder(tmp_path_factory.mktemp("model")))
    ours = Own(stock.config)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def test_signature_names_what_the_model_takes(vision_language):
    stock, ours = (inspect.signature(model.forward).parameters for model in vision_language)
    assert [*stock][:-1] == [*ours][:-2] and [*ours][-2:] == ["of_our_own", "kwargs"]
    assert [p.default for p in stock.values()][:-1] == [p.default for p in ours.values()][:-2]


@pytest.mark.parametrize("count", [None, 5])
def test_training_computes_the_loss_alone(vision_language, count):
    stock, ours = (model.train() for model in vision_language)
    inputs, given = labelled(), {} if count is None else {"num_items_in_batch": count}
    expected, found = stock(**inputs, **given), ours(**inputs, **given)
    assert found.logits is None and abs(found.loss - expected.loss).item() < 1e-6
    positional = ours(inputs["input_ids"], inputs["attention_mask"], labels=inputs["labels"], use_cache=True, **given)
    assert positional.loss.equal(found.loss)
    gradients = []
    for model, out in ((stock, expected), (ours, found)):
        model.zero_grad()
        out.loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 20
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-5) for name in gradients[0])


def test_other_calls_are_the_models_own(vision_language):
    stock, ours = vision_language
    inputs = labelled()
    unlabelled = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    assert ours.train()(**unlabelled).logits.equal(stock.train()(**unlabelled).logits)
    with torch.no_grad():
        expected, found = stock.eval()(**inputs), ours.eval()(**inputs)
    assert found.logits.equal(expected.logits) and found.loss.equal(expected.loss)
    answers = [model.generate(**unlabelled, max_new_tokens=4, do_sample=False) for model in (stock, ours)]
    assert answers[0].equal(answers[1])


def test_a_batch_without_labels_teaches_nothing(vision_language):
    ours = vision_language[1].train()
    inputs = labelled()
    ours.zero_grad()
    loss = ours(**inputs | {"labels": torch.full_like(inputs["labels"], -100)}).loss
    loss.backward()
    gradients = [p.grad for name, p in ours.named_parameters() if ".visual." not in name]
    assert loss == 0 and len(gradients) > 20 and not any(gradient.any() for gradient in gradients)
