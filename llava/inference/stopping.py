"""Texts that end an answer."""

import torch
from transformers import StoppingCriteria


class KeywordsStoppingCriteria(StoppingCriteria):
    """Stop generation when every row's new text contains one of `keywords`.

    Args:
        keywords: list of str.
        tokenizer: decodes the new tokens.
        input_ids: [B, L] prompt ids given to `generate`. Whether the ids to judge begin with them is told at the first
            call: a LLaVA model generates from embeddings, so that only new tokens come.
    """

    def __init__(self, keywords, tokenizer, input_ids):
        self.keywords = keywords
        self.tokenizer = tokenizer
        self.start_len = input_ids.shape[1]
        # a keyword can be spread over as many tokens as it is long, plus one that it shares with earlier text
        self.tail = max((len(keyword.encode()) for keyword in keywords), default=0) + 1

    def __call__(self, output_ids, scores, **kwargs):
        if output_ids.shape[1] <= self.start_len:  # the prompt is not among them
            self.start_len = 0
        new = output_ids[:, max(self.start_len, output_ids.shape[1] - self.tail) :]
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=False)
        found = [any(keyword in text for keyword in self.keywords) for text in texts]
        return torch.tensor(found, dtype=torch.bool, device=output_ids.device)
