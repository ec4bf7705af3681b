"""How likely a model finds an answer that is given to it."""

from llava.errors import LlavaError


def split_tokens(inference, turns: list[tuple[str, str]], continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of the prompt of a conversation and of the continuation, as they are in a whole answer.

    Blanks at the continuation's ends do not count: the template has its own between header and answer. Where tokens
    reach over from the prompt into the answer, the prompt ends before them.
    """
    continuation = continuation.strip()
    if not continuation:
        raise LlavaError("continuation: found no text, expected an answer to score")
    prompt, whole = inference.prompt(turns), inference.prompt(turns, continuation)
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

    family, loaded = inference.family, inference.loaded
    rows = [prompt + continuation for prompt, continuation in zip(prompts, continuations, strict=True)]
    lengths = [len(continuation) for continuation in continuations]
    with torch.inference_mode():
        hidden = family.answer_states(inference.inputs(rows, pictures), lengths, loaded)
        # the output layer runs on the continuations alone: a vocabulary's worth of numbers for every token is much
        logits = family.logits(loaded.model, hidden).float()
        tokens = torch.tensor([token for row in continuations for token in row], device=logits.device)
        chosen = logits.log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0]
        greedy = logits.argmax(dim=-1) == tokens
    parts = zip(chosen.split(lengths), greedy.split(lengths), strict=True)
    return [(values.double().sum().item(), bool(hits.all())) for values, hits in parts]
