"""The published implementation's numbers, on this device."""

import torch

from gpu_checks.registry import Context, Result, check

# absolute, from tests/golden/README.md
EMBEDS, LOGITS, LOSS = 1e-5, 1e-4, 1e-5


def compare(model, case, device: str) -> dict[str, tuple[float, float]]:
    """(largest difference, tolerance) of embeddings, logits and loss of one golden case."""

    def move(value):
        return [item.to(device) for item in value] if isinstance(value, list) else value.to(device)

    inputs = dict(case.inputs)
    for key in ("input_ids", "attention_mask", "images"):
        inputs[key] = move(inputs[key])
    labels, merged = move(case.io["labels"]), move(case.io["merged_attention_mask"]).bool()
    with torch.no_grad():
        embeds = model.prepare_inputs_labels_for_multimodal(
            inputs["input_ids"],
            None,
            inputs["attention_mask"],
            None,
            labels,
            inputs["images"],
            inputs["modalities"],
            inputs["image_sizes"],
        )[4]
        logits = model(**inputs).logits
        loss = model(**inputs, labels=labels).loss
        train_loss = model.train()(**inputs, labels=labels).loss
    model.eval()
    expected = case.io["loss"].item()
    return {
        "embeddings": ((embeds - move(case.io["inputs_embeds"]))[merged].abs().max().item(), EMBEDS),
        "logits": ((logits - move(case.io["logits"]))[merged].abs().max().item(), LOGITS),
        "loss": (abs(loss.item() - expected), LOSS),
        "training_loss": (abs(train_loss.item() - expected), LOSS),
    }


@check("golden")
def golden(context: Context, result: Result):
    """LLaVA-NeXT's golden checkpoints in float32: embeddings, logits and loss within their tolerances."""
    from llava.model.builder import load_pretrained_model
    from tests.model import golden as files

    names = files.CASES if context.options.golden_cases is None else files.CASES[: context.options.golden_cases]
    for name in names:
        case = files.case(name)
        for attention in ("eager", "sdpa"):
            _, model, _, _ = load_pretrained_model(
                str(case.folder),
                None,
                name,
                device_map=context.device,
                torch_dtype="float32",
                attn_implementation=attention,
            )
            result.below(f"{name}, {attention}", **compare(model, case, context.device))
    result.test("cases", len(names) > 0, f"{len(names)} of {len(files.CASES)} checkpoints")
