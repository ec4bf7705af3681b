"""`attn_implementation="varlen"` of transformers' language models: packed rows, ordinary batches, what is refused."""

import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.masking_utils import chunked_causal_mask_function, sdpa_mask

import llavavit.varlen_attention  # noqa: F401  registers "varlen"
from llavavit import varlen_backends

module = importlib.import_module("llavavit.varlen_attention")  # the package's `varlen_attention` is the function
WINDOWED = dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)  # the second layer
# a cap that bends these scores, and a window (of the first layer) shorter than the sequences
CAPPED = dict(attn_logit_softcapping=0.5, final_logit_softcapping=5.0, query_pre_attn_scalar=1, sliding_window=4)
KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen2, windows": (Qwen2Config, Qwen2ForCausalLM, WINDOWED),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, dict(head_dim=16)),
    "mistral": (MistralConfig, MistralForCausalLM, {}),
    "mistral, windows": (MistralConfig, MistralForCausalLM, dict(sliding_window=4)),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, CAPPED | dict(head_dim=16)),
    # gives the window to its mask and not to its attention
    "qwen2_moe, windows": (
        Qwen2MoeConfig,
        Qwen2MoeForCausalLM,
        WINDOWED | dict(num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16),
    ),
}
LENGTHS = (7, 5, 1, 5)


def make(kind="llama", attention="varlen", **changes):
    config_class, model_class, own = KINDS[kind]
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
    return model_class(config_class(**sizes | own | changes, attn_implementation=attention))


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
    """(logits [1, N, V], their gradients' weight, gradients) of every sequence alone, in transformers' eager."""
    model.set_attn_implementation("eager")
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


@pytest.mark.parametrize("window", [1, 3, 6, 7, 20])
def test_sliding_window(window):
    model = make("mistral", sliding_window=window).eval()
    logits = model(**pack(sequences())).logits
    assert torch.allclose(logits, one_by_one(model)[0], atol=1e-5)
    without = make("mistral", sliding_window=None).eval()(**pack(sequences())).logits
    assert torch.allclose(logits, without, atol=1e-5) == (window >= max(LENGTHS))


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("kind", ["mistral, windows", "gemma2", "qwen2_moe, windows"])
def test_a_row_of_one_sequence(kind, cache):
    """Its positions never start anew: transformers takes it for an ordinary row, with a mask for its window."""
    model = make(kind).eval()
    ids = sequences()[0]
    model.set_attn_implementation("eager")
    expected = model(ids).logits
    model.set_attn_implementation("varlen")
    assert torch.allclose(model(**pack([ids]) | dict(use_cache=cache)).logits, expected, atol=1e-5)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for x in out if isinstance(out, (tuple, list)) else [out]:
            self.elements = max(self.elements, x.numel() if isinstance(x, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("lengths", [(70, 80, 90, 60), (300,)], ids=str)
@pytest.mark.parametrize("kind", ["llama", "mistral, windows"])
def test_no_mask_of_a_whole_row(kind, lengths, monkeypatch):
    monkeypatch.setattr(varlen_backends, "QUERIES_AT_ONCE", 64)
    model = make(kind, max_position_embeddings=512).eval()
    with Largest() as seen, torch.no_grad():
        model(**pack([torch.ones(1, length).long() for length in lengths]))
    assert seen.elements == 300 * 64  # hidden states, where a mask would have 300 * 300
    model.set_attn_implementation("sdpa")
    with Largest() as seen, torch.no_grad():
        model(**pack([torch.ones(1, length).long() for length in lengths]))
    assert seen.elements == 300 * (64 if kind == "llama" and len(lengths) == 1 else 300)


def make_padded():
    """Left-padded rows of unlike lengths, and their mask."""
    width = max(LENGTHS)
    ids = torch.cat([torch.cat([torch.zeros(1, width - row.shape[1]).long(), row], 1) for row in sequences()])
    return ids, (ids > 0).long()


@pytest.mark.parametrize("kind", KINDS)
def test_generation_is_that_of_eager(kind):
    """With a cache: left-padded rows of unlike lengths, and rows without padding."""
    model = make(kind).eval()
    ids, mask = make_padded()
    options = dict(max_new_tokens=6, do_sample=False)
    cases = [dict(input_ids=ids, attention_mask=mask), dict(input_ids=ids[:1].repeat(2, 1)), dict(input_ids=ids[:1])]
    found = [model.generate(**case, **options) for case in cases]
    model.set_attn_implementation("eager")
    for case, tokens in zip(cases, found, strict=True):
        assert tokens.shape == (len(case["input_ids"]), ids.shape[1] + 6)
        assert torch.equal(tokens, model.generate(**case, **options))
    assert torch.equal(found[0][0], found[2][0])


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_ordinary_rows_are_left_to_sdpa(kind, calls):
    ids, mask = make_padded()
    make(kind).eval().generate(ids, attention_mask=mask, max_new_tokens=2)
    make(kind).eval()(ids)
    assert not calls


@pytest.mark.parametrize("kind", ["llama", "mistral, windows", "gemma2"])
@pytest.mark.parametrize("padded", [False, True])
def test_training_on_ordinary_rows_is_that_of_eager(kind, padded):
    """Loss and gradients of a batch of equal rows, or of one padded on the right."""
    model = make(kind).train()
    ids = torch.cat(sequences()[1::2])
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    losses, found = [], []
    for attention in ("varlen", "eager"):
        model.set_attn_implementation(attention)
        labels = ids.masked_fill(mask == 0, -100) if padded else ids
        losses.append(model(ids, attention_mask=mask if padded else None, labels=labels, use_cache=False).loss)
        losses[-1].backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
        model.zero_grad()
    assert torch.allclose(*losses, atol=1e-6)
    assert all((found[0][name] - value).abs().max() < 1e-5 for name, value in found[1].items())


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


@pytest.mark.parametrize("name", ["position_bias", "s_aux"])
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


@pytest.mark.parametrize("q_offset, expected", [(0, True), (torch.tensor(0), False)])
def test_window_without_padding_has_no_mask(q_offset, expected):
    """All but that of a static cache, whose keys are more than the rows'."""
    options = dict(q_offset=q_offset, local_size=3, config=MistralConfig(sliding_window=3))
    found = module.varlen_mask(2, 6, 6, **options)
    assert (found.numel() == 0) == expected
    assert module.varlen_mask(2, 6, 6, **options | dict(local_size=7)) is None
    assert module.varlen_mask(2, 1, 6, **options).shape == (2, 1, 1, 6)


def test_chunks_are_no_window():
    """Llama 4's masks of packed rows are written out, and refused by the attention."""
    config = LlamaConfig()
    config.attention_chunk_size = 3
    rule = chunked_causal_mask_function(3, torch.zeros(1, dtype=int))
    mask = module.varlen_mask(1, 6, 6, mask_function=rule, local_size=3, allow_is_causal_skip=False, config=config)
    assert mask.shape == (1, 1, 6, 6)
    x, starts = torch.randn(1, 2, 6, 8), torch.tensor([0, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match="came with an attention_mask that masks tokens"):
        module.varlen_attention_forward(None, x, x, x, mask, cu_seq_lens_q=starts)


def test_sinks_are_refused_in_ordinary_rows():
    x = torch.randn(2, 2, 6, 8)
    with pytest.raises(ValueError, match="s_aux: attn_implementation varlen has none"):
        module.varlen_attention_forward(make().model.layers[0].self_attn, x, x, x, None, s_aux=torch.ones(2))
