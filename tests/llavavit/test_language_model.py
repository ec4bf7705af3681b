"""`attn_implementation="varlen"` of transformers' language models: packed rows, ordinary batches, what is refused."""

import importlib

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.masking_utils import sdpa_mask

import llavavit.varlen_attention  # noqa: F401  registers "varlen"

module = importlib.import_module("llavavit.varlen_attention")  # the package's `varlen_attention` is the function
KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}
LENGTHS = (7, 5, 1, 5)


def make(kind="llama", attention="varlen", **changes):
    config_class, model_class = KINDS[kind]
    sizes = dict(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return model_class(config_class(**sizes | changes, attn_implementation=attention))


def sequences():
    torch.manual_seed(1)
    return [torch.randint(1, 50, (1, length)) for length in LENGTHS]


def pack(rows):
    """Keyword arguments for the rows as one."""
    lengths = [row.shape[1] for row in rows]
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    return dict(
        input_ids=torch.cat(rows, 1),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        cu_seq_lens_q=starts,
        cu_seq_lens_k=starts,
        max_length_q=max(lengths),
        max_length_k=max(lengths),
        use_cache=False,
    )


def gradients(model, logits, weight):
    """Gradients of all parameters of the weighted sum of logits."""
    (logits * weight).sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def one_by_one(model):
    """(logits [1, N, V], their gradients' weight, gradients) of every sequence alone in sdpa."""
    model.set_attn_implementation("sdpa")
    logits = torch.cat([model(row).logits for row in sequences()], 1)
    torch.manual_seed(2)
    weight = torch.randn_like(logits)
    expected = logits.detach(), weight, gradients(model, logits, weight)
    model.set_attn_implementation("varlen")
    return expected


@pytest.fixture
def calls(monkeypatch):
    """Number of queries of every call of `varlen_attention`."""
    seen = []
    plain = module.varlen_attention
    monkeypatch.setattr(module, "varlen_attention", lambda q, *args, **kw: seen.append(len(q)) or plain(q, *args, **kw))
    return seen


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
def test_packed_row_is_the_sequences_one_by_one(kind, checkpointing, calls, reads):
    model = make(kind).train()
    expected, weight, wanted = one_by_one(model)
    assert not calls
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        model.enable_input_require_grads()
    reads.clear()
    logits = model(**pack(sequences())).logits
    assert torch.allclose(logits, expected, atol=1e-5)
    found = gradients(model, logits, weight)
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert (value - wanted[name]).abs().max() < 1e-5 * wanted[name].abs().max(), name
    layers, again = model.config.num_hidden_layers, 1 if checkpointing is None else 2
    assert calls == [sum(LENGTHS)] * layers * again
    assert len(reads) == 1  # of the lengths, for both layers and for the forward pass that is run anew


def test_a_sequence_does_not_see_the_one_before():
    """Without the lengths the numbers would be others: the test above can fail."""
    model = make().eval()
    packed = pack(sequences())
    whole = {name: packed[name] for name in ("input_ids", "position_ids")}
    assert (model(**whole).logits - model(**packed).logits).abs().max() > 0.1


def test_lengths_of_keys_may_be_left_out():
    model = make().eval()
    packed = pack(sequences())
    expected = model(**packed).logits
    short = {name: value for name, value in packed.items() if name not in ("cu_seq_lens_k", "max_length_k")}
    assert torch.equal(model(**short).logits, expected)
    assert torch.equal(model(**packed, attention_mask=torch.ones(1, sum(LENGTHS))).logits, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_is_that_of_sdpa(kind, calls):
    """Left-padded rows of unlike lengths, with a cache."""
    model = make(kind).eval()
    rows = sequences()
    width = max(LENGTHS)
    ids = torch.cat([torch.cat([torch.zeros(1, width - row.shape[1]).long(), row], 1) for row in rows])
    options = dict(attention_mask=(ids > 0).long(), max_new_tokens=6, do_sample=False)
    found = model.generate(ids, **options)
    model.set_attn_implementation("sdpa")
    assert found.shape == (len(rows), width + 6)
    assert torch.equal(found, model.generate(ids, **options))
    assert torch.equal(found[0], model.generate(rows[0], max_new_tokens=6, do_sample=False)[0])
    assert not calls


def test_padded_training_is_that_of_sdpa():
    model = make().train()
    ids = torch.cat(sequences()[1::2])
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    found = model(ids, attention_mask=mask, labels=ids).loss
    model.set_attn_implementation("sdpa")
    assert torch.allclose(found, model(ids, attention_mask=mask, labels=ids).loss)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_positions_that_start_anew_need_lengths():
    packed = pack(sequences())
    with pytest.raises(ValueError, match=r"position_ids start anew .* give cu_seq_lens_q"):
        make().eval()(packed["input_ids"], position_ids=packed["position_ids"], use_cache=False)


def test_lengths_are_for_one_row():
    packed = pack(sequences())
    packed["input_ids"] = packed["input_ids"].repeat(2, 1)
    with pytest.raises(ValueError, match="cu_seq_lens_q: came with a batch of 2 rows"):
        make().eval()(**packed)


def test_packed_rows_have_no_padding():
    mask = torch.ones(1, sum(LENGTHS))
    mask[0, -2:] = 0
    with pytest.raises(ValueError, match="cu_seq_lens_q: came with an attention_mask that masks tokens"):
        make().eval()(**pack(sequences()), attention_mask=mask)


@pytest.mark.parametrize("window, fits", [(4, False), (6, False), (7, True)])
def test_sliding_window(window, fits):
    model = make("mistral", sliding_window=window).eval()
    if fits:
        expected = one_by_one(model)[0]
        assert torch.allclose(model(**pack(sequences())).logits, expected, atol=1e-5)
    else:
        with pytest.raises(ValueError, match=f"sliding_window {window}: attn_implementation varlen has none"):
            model(**pack(sequences()))


@pytest.mark.parametrize("name", ["softcap", "position_bias", "s_aux"])
def test_scores_of_another_kind(name):
    x = torch.randn(1, 2, 4, 8)
    starts = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match=f"{name}: attn_implementation varlen has none"):
        module.varlen_attention_forward(None, x, x, x, None, cu_seq_lens_q=starts, **{name: torch.ones(2)})


@pytest.mark.parametrize("allow", [True, False])
@pytest.mark.parametrize("padding", [None, 0, 2])
@pytest.mark.parametrize("sizes", [(2, 4, 4), (2, 1, 6)])
def test_masks_are_those_of_sdpa(sizes, padding, allow):
    """All but the mask of positions that start anew, which for a forbidden skip is an empty tensor."""
    mask = None
    if padding is not None:
        mask = torch.ones(sizes[0], sizes[2], dtype=torch.bool)
        mask[1, :padding] = False
    # the other arguments are the same in transformers 5.17 and 5.23
    options = dict(q_offset=sizes[2] - sizes[1], attention_mask=mask, allow_is_causal_skip=allow)
    found, expected = module.varlen_mask(*sizes, **options), sdpa_mask(*sizes, **options)
    if mask is None and not allow and sizes[1] > 1:
        assert found.numel() == 0 and expected.numel() > 0
    else:
        assert (found is None and expected is None) or torch.equal(found, expected)
