"""Every option of transformers' `generate`, a case of it, and what becomes of it: the rows of docs/generation.md."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

EQUAL, ANSWER, REFUSED, STOCK = "equal", "answer", "refused", "transformers"


@dataclass(frozen=True)
class Row:
    """One row of the table.

    case: from a `Prompt` to keyword arguments of `generate`, over those of `greedy`.
    llava, qwen: what becomes of it. EQUAL: transformers' model of the same weights answers the same. ANSWER: so it does
        from the same embeddings, as its prompt is not tokens either. REFUSED: one line of ours. STOCK: transformers'
        own error, whichever model it is.
    matters: whether the case answers otherwise than `greedy`.
    """

    case: Callable
    llava: str = EQUAL
    qwen: str = EQUAL
    matters: bool = True


@dataclass(frozen=True)
class Prompt:
    """A question about a picture: its length in tokens, the greedy answer, and parts that options need."""

    length: int
    answer: list[int]
    tokenizer: object
    assistant: object


def _greedy_eos(prompt, **more):
    return {"eos_token_id": prompt.answer[1], **more}


def _word(prompt):
    """What a token of the answer but the last one says."""
    words = (prompt.tokenizer.decode([token]) for token in prompt.answer[:-1])
    return next(word for word in words if word.isascii() and word.isprintable())


def _with_a_seven(ids):
    return torch.cat([ids, ids.new_full((1, 1), 7)], 1)


def _odd_token(scores):
    return torch.where(torch.arange(scores.shape[-1]) % 2 == 1, scores, -torch.inf)


ROWS = {
    # length
    "`max_new_tokens`": Row(lambda p: {"max_new_tokens": 3}),
    "`max_length`": Row(lambda p: {"max_new_tokens": None, "max_length": p.length + 3}),
    "`min_new_tokens`": Row(lambda p: _greedy_eos(p, min_new_tokens=5)),
    "`min_length`": Row(lambda p: _greedy_eos(p, min_length=p.length + 5)),
    "`max_time`": Row(lambda p: {"max_time": 1e6}, matters=False),
    "`eos_token_id`": Row(lambda p: {"eos_token_id": [p.answer[2], p.answer[1]]}),
    "`pad_token_id`, `bos_token_id`": Row(lambda p: {"pad_token_id": 5, "bos_token_id": 6}, matters=False),
    "`stop_strings`": Row(lambda p: {"stop_strings": [_word(p)], "tokenizer": p.tokenizer}),
    "`stopping_criteria`": Row(lambda p: {"stopping_criteria": [_stop_at(p.answer[1])]}, llava=ANSWER),
    # search and sampling
    "`do_sample`, `temperature`, `top_k`, `top_p`": Row(lambda p: _sample(temperature=2.0, top_k=20, top_p=0.9)),
    "`min_p`": Row(lambda p: _sample(min_p=0.01)),
    "`top_h`": Row(lambda p: _sample(top_h=0.4)),
    "`typical_p`": Row(lambda p: _sample(typical_p=0.5)),
    "`epsilon_cutoff`, `eta_cutoff`": Row(lambda p: _sample(epsilon_cutoff=0.003, eta_cutoff=0.003)),
    "`num_return_sequences`": Row(lambda p: _sample(num_return_sequences=3)),
    "`num_beams`, `early_stopping`, `length_penalty`": Row(
        lambda p: {"num_beams": 4, "early_stopping": True, "length_penalty": 2.0, "num_return_sequences": 4}
    ),
    "`penalty_alpha`": Row(lambda p: {"penalty_alpha": 0.6, "top_k": 4}, llava=STOCK, qwen=STOCK),
    "`dola_layers`": Row(lambda p: {"dola_layers": "high"}, llava=STOCK, qwen=STOCK),
    "`num_beam_groups`, `diversity_penalty`": Row(
        lambda p: {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}, llava=STOCK, qwen=STOCK
    ),
    "`constraints`, `force_words_ids`": Row(
        lambda p: {"num_beams": 2, "force_words_ids": [[5]]}, llava=STOCK, qwen=STOCK
    ),
    "`custom_generate`, `trust_remote_code`": Row(
        lambda p: {"custom_generate": lambda model, input_ids, **rest: _with_a_seven(input_ids)},
    ),
    # scores
    "`repetition_penalty`": Row(lambda p: {"repetition_penalty": 0.2}, llava=ANSWER),
    "`no_repeat_ngram_size`": Row(lambda p: {"no_repeat_ngram_size": 1}, llava=ANSWER, matters=False),
    "`encoder_repetition_penalty`": Row(lambda p: {"encoder_repetition_penalty": 9.0}, llava=REFUSED),
    "`encoder_no_repeat_ngram_size`": Row(lambda p: {"encoder_no_repeat_ngram_size": 1}, llava=REFUSED, matters=False),
    "`bad_words_ids`": Row(lambda p: {"bad_words_ids": [[p.answer[0]], p.answer[1:3]]}, llava=ANSWER),
    "`sequence_bias`": Row(lambda p: {"sequence_bias": {(9,): 5.0, (9, 10): 9.0}}, llava=ANSWER),
    "`suppress_tokens`": Row(lambda p: {"suppress_tokens": p.answer[1:2]}),
    "`begin_suppress_tokens`": Row(lambda p: {"begin_suppress_tokens": p.answer[:1]}),
    "`forced_bos_token_id`": Row(lambda p: {"forced_bos_token_id": 7}, llava=REFUSED, matters=False),
    "`forced_eos_token_id`": Row(lambda p: {"forced_eos_token_id": 7}),
    "`exponential_decay_length_penalty`": Row(
        lambda p: {"eos_token_id": 7, "exponential_decay_length_penalty": (2, 9.0)}
    ),
    "`renormalize_logits`, `remove_invalid_values`": Row(
        lambda p: {"renormalize_logits": True, "remove_invalid_values": True}, matters=False
    ),
    "`prefix_allowed_tokens_fn`": Row(
        lambda p: {"prefix_allowed_tokens_fn": lambda row, ids: [40 + len(ids) % 2, 50]}, llava=ANSWER
    ),
    "`logits_processor`": Row(lambda p: {"logits_processor": [lambda ids, scores: _odd_token(scores)]}, llava=ANSWER),
    "`watermarking_config`": Row(
        lambda p: {"watermarking_config": {"bias": 9.0, "seeding_scheme": "lefthash"}}, llava=ANSWER
    ),
    "`guidance_scale`": Row(lambda p: {"guidance_scale": 3.0}, qwen=REFUSED),
    "`negative_prompt_ids`, `negative_prompt_attention_mask`": Row(
        lambda p: {
            "guidance_scale": 3.0,
            "negative_prompt_ids": torch.tensor([[30, 31]]),
            "negative_prompt_attention_mask": torch.tensor([[1, 1]]),
        },
        qwen=REFUSED,
    ),
    "`token_healing`": Row(lambda p: {"token_healing": True, "tokenizer": p.tokenizer}, llava=REFUSED, qwen=REFUSED),
    # cache and speed
    "`use_cache`": Row(lambda p: {"use_cache": False}, matters=False),
    "`past_key_values`": Row(lambda p: {"past_key_values": _empty_cache()}, matters=False),
    "`cache_implementation` `dynamic`": Row(lambda p: {"cache_implementation": "dynamic"}, matters=False),
    "`cache_implementation` `static`, `max_cache_len`": Row(
        lambda p: {"cache_implementation": "static", "max_cache_len": 256}, matters=False
    ),
    "`cache_implementation` `quantized`, `cache_config`": Row(
        lambda p: {"cache_implementation": "quantized", "cache_config": {"backend": "nowhere"}}, STOCK, STOCK
    ),
    "`cache_implementation` `paged`, `continuous_batching_config`": Row(
        lambda p: {"cache_implementation": "paged"}, llava=REFUSED, qwen=REFUSED
    ),
    "`prefill_chunk_size`": Row(lambda p: {"prefill_chunk_size": 4}, llava=REFUSED, matters=False),
    "`disable_compile`, `compile_config`": Row(lambda p: {"disable_compile": True}, matters=False),
    "`synced_gpus`": Row(lambda p: {"synced_gpus": False}, matters=False),
    "`low_memory`": Row(lambda p: {"low_memory": True}, matters=False),
    "`logits_to_keep`": Row(lambda p: {"logits_to_keep": 0}, matters=False),
    # several tokens at once
    "`assistant_model`, `num_assistant_tokens`, `num_assistant_tokens_schedule`, `assistant_confidence_threshold`, "
    "`is_assistant`": Row(lambda p: {"assistant_model": p.assistant}, llava=REFUSED, matters=False),
    "`assistant_tokenizer`, `assistant_lookbehind`, `target_lookbehind`, `assistant_ensemble_weight`, "
    "`speculation_type`": Row(
        lambda p: {"assistant_model": p.assistant, "assistant_ensemble_weight": 0.5}, llava=REFUSED, matters=False
    ),
    "`assistant_early_exit`": Row(lambda p: {"assistant_early_exit": 1}, llava=REFUSED, qwen=REFUSED),
    "`prompt_lookup_num_tokens`, `max_matching_ngram_size`": Row(
        lambda p: {"prompt_lookup_num_tokens": 2, "max_matching_ngram_size": 1}, qwen=REFUSED, matters=False
    ),
    "`use_mtp`": Row(lambda p: {"use_mtp": True}, llava=STOCK, qwen=STOCK),
    # what goes in and comes out
    "`generation_config`": Row(lambda p: {"generation_config": _settings()}),
    "`streamer`": Row(lambda p: {"streamer": Heard()}, matters=False),
    "`return_dict_in_generate`, `output_scores`, `output_logits`, `output_hidden_states`, `output_attentions`": Row(
        lambda p: dict.fromkeys(
            ("return_dict_in_generate", "output_scores", "output_logits", "output_hidden_states", "output_attentions"),
            True,
        ),
        matters=False,
    ),
    "`decoder_start_token_id`": Row(lambda p: {"decoder_start_token_id": 9}, matters=False),
    "an option that there is not": Row(lambda p: {"max_new_token": 3}, llava=STOCK, qwen=STOCK),
}


class Heard:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def _sample(**more):
    return {"do_sample": True, **more}


def _stop_at(token):
    return lambda ids, scores, **rest: ids[:, -1] == token


def _empty_cache():
    from transformers import DynamicCache

    return DynamicCache()


def _settings():
    from transformers import GenerationConfig

    return GenerationConfig(max_new_tokens=4, do_sample=False, num_beams=2)
