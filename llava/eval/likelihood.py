"""How likely a model finds an answer that is given to it."""

from llava.constants import IGNORE_INDEX
from llava.conversation import Conversation
from llava.errors import LlavaError


def continued_prompt(conversation: Conversation, continuation: str) -> str:
    """The prompt of a conversation whose last turn is open, up to the end of this answer to it."""
    conversation = conversation.copy()
    conversation.messages[-1][1] = continuation
    *before, last = conversation.turns()
    end = last.text.index(continuation, last.answer_start) + len(continuation)
    return "".join(piece.text for piece in before) + last.text[:end]


def split_tokens(inference, conversation: Conversation, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of the continuation, as they are in a whole answer.

    Blanks at the continuation's ends do not count: the template has its own between header and answer. Where tokens
    reach over from the prompt into the answer, the prompt ends before them.
    """
    continuation = continuation.strip()
    if not continuation:
        raise LlavaError("continuation: found no text, expected an answer to score")
    prompt = inference.tokens(conversation.get_prompt())
    whole = inference.tokens(continued_prompt(conversation, continuation))
    same = 0
    while same < min(len(prompt), len(whole) - 1) and prompt[same] == whole[same]:
        same += 1
    return whole[:same], whole[same:]


def log_likelihoods(
    inference, prompts: list[list[int]], continuations: list[list[int]], pictures: list[list]
) -> list[tuple[float, bool]]:
    """Per row, the sum of the log-probabilities of the continuation's tokens, and whether each is the likeliest.

    Args:
        inference: the model.
        prompts, continuations: token ids, as `split_tokens` gives them.
        pictures: as `Inference.inputs` takes them.

    Raises:
        LlavaError: a prompt with its answer is longer than the model's context.
    """
    import torch

    from llava.model.loss import output_logits

    model = inference.model
    rows = [prompt + continuation for prompt, continuation in zip(prompts, continuations, strict=True)]
    inputs = inference.inputs(rows, pictures)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    labels = torch.full_like(ids, IGNORE_INDEX)
    for label, continuation in zip(labels, continuations, strict=True):  # the padding is on the left
        label[len(label) - len(continuation) :] = torch.tensor(continuation)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.inference_mode():
        _, positions, mask, _, embeds, labels = model.prepare_inputs_labels_for_multimodal(
            ids,
            positions,
            mask,
            None,
            labels,
            inputs.get("images", []),
            inputs.get("modalities", ()),
            inputs.get("image_sizes"),
        )
        text = {"input_ids": ids} if embeds is None else {"inputs_embeds": embeds}
        hidden = model.get_model()(**text, attention_mask=mask, position_ids=positions, use_cache=False)[0]
        targets = labels[:, 1:]
        scored = targets != IGNORE_INDEX
        lengths = [len(continuation) for continuation in continuations]
        if scored.sum(dim=1).tolist() != lengths:
            limit = getattr(model.config, "tokenizer_model_max_length", None)
            raise LlavaError(f"continuation: found one that ends beyond the model's context of {limit} tokens")
        # the output layer runs on the continuations alone: a vocabulary's worth of numbers for every token is much
        logits = output_logits(model, hidden[:, :-1][scored]).float()
        tokens = targets[scored]
        chosen = logits.log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0]
        greedy = logits.argmax(dim=-1) == tokens
    parts = zip(chosen.split(lengths), greedy.split(lengths), strict=True)
    return [(values.double().sum().item(), bool(hits.all())) for values, hits in parts]
