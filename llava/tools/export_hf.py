"""Export a LLaVA checkpoint to a folder that stock transformers (and the servers built on it) loads without this code.

    python -m llava.tools.export_hf --model-path DIR --output OUT

| LLaVA | transformers |
|---|---|
| anyres, spatial_unpad | `LlavaNextForConditionalGeneration` |
| anyres_max_N, spatial_unpad | `LlavaOnevisionForConditionalGeneration` |
| pad or square, flat | `LlavaForConditionalGeneration` |

with a CLIP or SigLIP tower, mlp2x_gelu and a Llama, Mistral, Qwen2 or Qwen3 language model. Everything else is refused:
transformers has no class for it.

OUT gets the weights in shards, under the names of the checkpoints on the hub, config.json, generation_config.json with
the template's stop tokens, the processor, a tokenizer with `<image>`, and a chat template that writes what the
checkpoint's conversation template writes. Weights are streamed: memory holds one shard.

Then both models get two pictures and a question without one, through their own pipelines, one model in memory after the
other. Unless prompts, pixels, token counts, logits and greedy answers agree there is no OUT.

Where the two differ by design, and these checks do not look:

- Several images in one prompt. LLaVA-NeXT squares each of them and gives it one crop. OneVision's processor does the
  same; LlavaNextProcessor cuts every image into crops, as if it stood alone.
- Unpadding rounds down in LLaVA-NeXT, and after rounding to seven digits in transformers, so that about 5 in 160,000
  image sizes (328x205 for one) get another row of tokens. The pictures of the check have sizes that agree.
- Video exists in transformers' OneVision alone, always with one newline token after a clip.
- Pixels are Pillow's. Where torchvision is installed AutoProcessor prefers it, whose pixels differ by up to 0.015;
  `processor.image_processor = AutoImageProcessor.from_pretrained(OUT, backend="pil")` gives Pillow's. OneVision's
  processor needs torchvision to be loaded at all, for its video half.
"""

import argparse

from llava.errors import report_errors
from llava.tools.folders import new_folder, quiet

ROWS = 64  # an embedding that must grow gets a multiple of so many rows


def plan_weights(source, rows: int, dtype: str | None) -> dict:
    """Name in the exported folder -> `Target`, for every weight of a checkpoint.

    Args:
        source: `Source`.
        rows: of embedding and output layer.
        dtype: to convert to; None keeps each weight's own.
    """
    from llava.tools.hf.layouts import EMBEDDING, OUTPUT, hf_name
    from llava.tools.hf.streaming import Target, with_dtype, with_rows

    targets = {}
    for name, (_, stored) in source.stored.items():
        shape, kind, read = stored.shape, stored.dtype, lambda name=name: source.read(name)
        if name in (EMBEDDING, OUTPUT) and rows > shape[0]:
            shape, read = (rows, *shape[1:]), with_rows(read, rows)
        if dtype and kind != dtype:
            kind, read = dtype, with_dtype(read, dtype)
        targets[hf_name(name)] = Target(tuple(shape), kind, read)
    return targets


def write_folder(source, folder: str, max_shard_size: str, dtype: str | None):
    """Write the folder of transformers; returns (ids that end an answer, notes for the user)."""
    from llava.tools.hf import chat_template, configs, processor, streaming, tokens
    from llava.tools.hf.layouts import EMBEDDING

    video = source.form.model_type == "llava_onevision"
    names = (tokens.IMAGE, tokens.VIDEO) if video else (tokens.IMAGE,)
    tokenizer = tokens.rebuild(source.tokenizer, added=names)
    ids = {name.strip("<>"): tokenizer.convert_tokens_to_ids(name) for name in names}
    rows, highest = source.stored[EMBEDDING][1].shape[0], max(tokenizer.get_vocab().values())
    if highest >= rows:
        rows = -(-(highest + 1) // ROWS) * ROWS
    weights_dtype = dtype or source.stored[EMBEDDING][1].dtype
    config = configs.to_hf(source.config, source.tower, source.form, ids, rows, weights_dtype)
    settings, left = tokens.generation_config(source.path, tokenizer, source.template)
    chat = chat_template.chat_template(source.template) if chat_template.has_chat_template(source.template) else None
    made = processor.build_processor(source.path, source.config, source.tower, source.form, tokenizer, chat)
    streaming.write_shards(folder, plan_weights(source, rows, dtype), max_shard_size)
    config.save_pretrained(folder)
    settings.save_pretrained(folder)
    processor.save_processor(made, source.form, folder)
    eos = settings.eos_token_id
    return eos if isinstance(eos, list) else [] if eos is None else [eos], notes(source, chat, left)


def notes(source, chat: str | None, left: list[str]) -> list[str]:
    """What the user should know of this export."""
    found = []
    if chat is None:
        found.append(f"conversation template {source.template} is no chat: no chat template is written")
    if left:
        found.append(f"answers end at {', '.join(map(repr, left))}, no single token: pass stop_strings to generate")
    if source.form.model_type == "llava_onevision":
        position = getattr(source.config, "mm_newline_position", None) or "one_token"
        mode = getattr(source.config, "mm_spatial_pool_mode", None) or "bilinear"
        if (position, mode) != ("one_token", "bilinear"):
            found.append(f"video differs: {position}, {mode} here, one_token, bilinear in transformers")
        found.append("AutoProcessor loads this folder only where torchvision is installed, which its video half needs")
    return found


def export(model_path: str, output: str, max_shard_size="5GB", dtype=None, version=None, device="cpu", overwrite=False):
    """Write `output` and compare it with the checkpoint.

    Returns:
        (name of transformers' class, `Report`, notes).

    Raises:
        LlavaError: not possible, or not the same model; `output` is then as it was before.
    """
    from llava.tools.hf.chat_template import has_chat_template
    from llava.tools.hf.source import read_source
    from llava.tools.hf.verify import check_device, verify

    check_device(device)
    with new_folder(output, model_path, overwrite) as folder:
        source = read_source(model_path, version)
        eos, found = write_folder(source, folder, max_shard_size, dtype)
        for weights, _ in source.stored.values():
            weights.close()
        chats = has_chat_template(source.template)
        report = verify(model_path, folder, source.template, chats, model_path, device, eos, dtype)
    return source.form.model_class, report, found


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Export a LLaVA checkpoint to stock transformers, and prove it equal.")
    parser.add_argument("--model-path", required=True, help="checkpoint folder")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--max-shard-size", default="5GB", help="largest file of weights, like 5GB or 500MB")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: as stored")
    parser.add_argument("--version", help="conversation template (default: the checkpoint's)")
    parser.add_argument("--device", default="cpu", help="where the two models are compared: cpu, cuda, cuda:1, ...")
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT, once the new one is proven equal")
    return parser


def print_report(report, notes: list[str], output: str, what: str) -> None:
    """What was written and what the comparison found."""
    print(f"written  {output} ({what})")
    print(
        f"verified in {report.dtype}: pixels, prompts and token counts are the same, logits differ by at most "
        f"{report.difference:.1e} (limit {report.tolerance:.1e}), {report.tokens} greedy tokens are the same"
    )
    for note in notes:
        print(f"note     {note}")


@report_errors
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    quiet()
    model_class, report, notes = export(
        args.model_path, args.output, args.max_shard_size, args.dtype, args.version, args.device, args.overwrite
    )
    print_report(report, notes, args.output, model_class)


if __name__ == "__main__":
    main()
