"""A batch of unlike prompts is answered as each prompt alone."""

import torch

from gpu_checks.registry import Context, Result, check

CASES = ("llama_clip_pad_flat", "mistral_clip_anyres_unpad", "qwen_clip_anyres_unpad")
# (text, indices of its pictures; a case with a single picture shows that one)
PROMPTS = (
    ("What is a temple?", ()),
    ("<image>\nWhat is shown?", (0,)),
    ("<image>\nWhich flower is it? Describe it in a few words, please.", (1,)),
    ("<image>\n<image>\nWhat do the two pictures have in common?", (0, 1)),
)
LOGITS = 1e-4
NEW_TOKENS = 16


def ask(model, case, prompts: list[tuple[list[int], tuple[int, ...]]], pad: int):
    """(new tokens [B, n], logits of every step [B, n, V]) for prompts padded on the left to one length."""
    device, width = model.device, max(len(ids) for ids, _ in prompts)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row, _ in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row, _ in prompts], device=device)
    used = [index % len(case.pixels) for _, indices in prompts for index in indices]
    media = {
        "images": [case.pixels[i].to(device) for i in used],
        "image_sizes": [case.inputs["image_sizes"][i] for i in used],
        "modalities": ["image"] * len(used),
    }
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            pad_token_id=pad,
            output_logits=True,
            return_dict_in_generate=True,
            **(media if used else {}),
        )
    return out.sequences, torch.stack(out.logits, dim=1)


@check("batched_generation")
def batched_generation(context: Context, result: Result):
    """Left-padded batch of unlike prompts: the same tokens and logits as one prompt at a time, float32."""
    from llava.mm_utils import tokenizer_image_token
    from llava.model.builder import load_pretrained_model
    from tests.model import golden as files

    for name in CASES:
        case = files.case(name)
        tokenizer, model, _, _ = load_pretrained_model(
            str(case.folder), None, name, device_map=context.device, torch_dtype="float32"
        )
        pad = tokenizer.pad_token_id or 0
        prompts = [(list(tokenizer_image_token(text, tokenizer)), images) for text, images in PROMPTS]
        tokens, logits = ask(model, case, prompts, pad)
        alone = [ask(model, case, [prompt], pad) for prompt in prompts]
        same = torch.equal(tokens, torch.cat([row for row, _ in alone]))
        # steps after a first unlike token have unlike inputs; the verdict on the tokens speaks for them
        worst = (logits - torch.cat([row for _, row in alone])).abs().max().item()
        lengths = sorted(len(ids) for ids, _ in prompts)
        shape = f"{len(prompts)} prompts of {lengths[0]} to {lengths[-1]} tokens, {NEW_TOKENS} new tokens each"
        result.test(f"{name}, tokens", same, f"{shape}, {'equal to' if same else 'unlike'} those of one at a time")
        result.below(f"{name}, logits", difference=(worst, LOGITS))
