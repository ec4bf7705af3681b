"""Import a LLaVA model of stock transformers as a LLaVA checkpoint, which this package trains, evaluates and serves.

    python -m llava.tools.import_hf --model-path HF_DIR --output OUT

HF_DIR is a folder of `LlavaNextForConditionalGeneration`, `LlavaOnevisionForConditionalGeneration` or
`LlavaForConditionalGeneration` with a CLIP or SigLIP tower and a Llama, Mistral, Qwen2 or Qwen3 language model, its
weights under transformers 5's names or those of the checkpoints on the hub.

OUT is complete, as a folder that training leaves: it loads offline. The conversation template is the one that writes
what HF_DIR's chat template writes, or the one that --version names. What `export_hf` wrote comes back with the same
tensors.

Weights are streamed: memory holds one shard. Then both models are compared as `export_hf` does it, given the prompts of
the conversation template, and unless they agree there is no OUT.

HF_DIR's image processor decides how images are handled. That of llava-1.5 on the hub crops the middle of a picture
(`image_aspect_ratio: square`), where LLaVA-1.5 itself pads; set it to pad in OUT's config.json for that. LLaVA puts a
blank behind an image where a Llama tokenizer of transformers may put none; where that is the one difference of token
ids, a note says so and both models are compared on LLaVA's ids.
"""

import argparse

from llava.errors import LlavaError, report_errors
from llava.tools.export_hf import print_report
from llava.tools.folders import new_folder, quiet


def choose_template(path: str, processor, version: str | None) -> str:
    """The conversation template: `version`, or the one that writes what the chat template writes.

    Raises:
        LlavaError: no such template, none written so, or no chat template.
    """
    from llava.conversation import get_template
    from llava.tools.hf.chat_template import probe_messages, recognise

    if version:
        get_template(version)
        return version
    if not getattr(processor, "chat_template", None) and not getattr(processor.tokenizer, "chat_template", None):
        raise LlavaError(f"{path}: found no chat template, so name the conversation template with --version")
    try:
        rendered = processor.apply_chat_template(probe_messages(), add_generation_prompt=True, tokenize=False)
    except Exception as error:  # whatever a folder's own template may raise
        reason = next(iter(str(error).splitlines()), "")[:120]
        raise LlavaError(
            f"{path}: its chat template fails ({type(error).__name__}: {reason}); name the conversation template with "
            "--version"
        ) from None
    try:
        return recognise(rendered, processor.tokenizer.bos_token)
    except LlavaError as error:
        raise LlavaError(f"{path}: {error}") from None


def cut_vocabulary(hf, tokenizer, rows: int):
    """(tokenizer, rows) as they were before an export added `<image>`; as they are where none did.

    Args:
        hf: the config.
        tokenizer: of the folder.
        rows: of its embedding.
    """
    from llava.tools.hf import tokens
    from llava.tools.hf.configs import OWN_KEY

    own = getattr(hf, OWN_KEY, None) or {}
    added = tokens.last_tokens(tokenizer, (tokens.IMAGE, tokens.VIDEO)) if "vocab_size" in own else ()
    side = own.get("tokenizer_padding_side", "right")
    rest = [index for text, index in tokenizer.get_vocab().items() if text not in added]
    before = own.get("vocab_size", rows)
    if before > rows or max(rest) >= before:  # it was changed since
        return tokens.rebuild(tokenizer, padding_side=side), rows
    return tokens.rebuild(tokenizer, without=added, padding_side=side), before


def plan_weights(path: str, weights, expected: dict, dtype: str | None) -> dict:
    """LLaVA name -> `Target`, for every weight that the LLaVA model has.

    Raises:
        LlavaError: some are missing, have another shape, or have no place.
    """
    from llava.tools.hf.layouts import EMBEDDING, OUTPUT, TOWER, is_buffer, llava_name
    from llava.tools.hf.streaming import Target, with_dtype, with_fewer_rows

    named = {llava_name(name): stored for name, stored in weights.stored.items()}
    lacking = [name for name in expected if name not in named]
    if lacking:
        raise LlavaError(f"{path}: lacks {len(lacking)} of {len(expected)} weights, {', '.join(lacking[:3])}")
    # SigLIP's last layer and head, and the output layer where it is the embedding, are not used
    unknown = [
        stored.name
        for name, stored in named.items()
        if name not in expected and not (name and (name.startswith(TOWER) or name == OUTPUT or is_buffer(name)))
    ]
    if unknown:
        raise LlavaError(f"{path}: holds weights that LLaVA has no place for, {', '.join(unknown[:3])}")
    targets = {}
    for name, shape in expected.items():
        stored = named[name]
        kind, read = stored.dtype, lambda stored=stored: weights.read(stored.name)
        if name in (EMBEDDING, OUTPUT) and shape[0] < stored.shape[0] and shape[1:] == stored.shape[1:]:
            read = with_fewer_rows(read, shape[0])
        elif shape != stored.shape:
            raise LlavaError(f"{path}: {stored.name}: found {stored.shape}, expected {shape} as config.json says")
        if dtype and kind != dtype:
            kind, read = dtype, with_dtype(read, dtype)
        targets[name] = Target(shape, kind, read)
    return targets


def write_folder(path: str, folder: str, max_shard_size: str, dtype: str | None, version: str | None):
    """Write the LLaVA checkpoint; returns (template, ids that end an answer, notes, class name)."""
    import torch

    from llava.model.families import model_classes
    from llava.tools.hf import configs, processor, source, streaming, tokens
    from llava.tools.hf.layouts import EMBEDDING, llava_name

    hf, form = configs.read_hf(path)
    made = processor.load_processor(path)
    template = choose_template(path, made, version)
    weights = streaming.Weights(path)
    embedding = next((s for name, s in weights.stored.items() if llava_name(name) == EMBEDDING), None)
    if embedding is None:
        raise LlavaError(f"{path}: found no embedding among its weights, expected those of a {form.model_class}")
    tokenizer, rows = cut_vocabulary(hf, made.tokenizer, embedding.shape[0])
    hf.text_config.vocab_size = rows
    config = configs.to_llava(path, hf, form, made.image_processor, template)
    config.dtype = getattr(torch, dtype or embedding.dtype)
    name = config.architectures[0]
    expected, tower = source.expected_weights(model_classes(name)[0], config)
    settings, _ = tokens.generation_config(path, tokenizer, template)
    streaming.write_shards(folder, plan_weights(path, weights, expected, dtype), max_shard_size)
    weights.close()
    config.save_pretrained(folder)
    settings.save_pretrained(folder)
    tower.image_processor.save_pretrained(folder)
    tokens.save(tokenizer, folder)
    eos = settings.eos_token_id
    eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
    notes = [f"conversation template {template}, image_aspect_ratio {config.image_aspect_ratio}"]
    return template, eos, notes, name


def import_hf(
    model_path: str, output: str, max_shard_size="5GB", dtype=None, version=None, device="cpu", overwrite=False
):
    """Write `output` and compare it with the folder of transformers.

    Returns:
        (name of LLaVA's class, `Report`, notes).

    Raises:
        LlavaError: not possible, or not the same model; `output` is then as it was before.
    """
    from llava.tools.hf.verify import check_device, verify

    check_device(device)
    with new_folder(output, model_path, overwrite) as folder:
        template, eos, notes, name = write_folder(model_path, folder, max_shard_size, dtype, version)
        report = verify(folder, model_path, template, False, model_path, device, eos, dtype)
        if report.blank:
            notes.append("transformers' tokenizer puts no blank behind an image, LLaVA's does: compared on LLaVA's ids")
    return name, report, notes


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Import a LLaVA model of transformers, and prove it equal.")
    parser.add_argument("--model-path", required=True, help="folder of transformers")
    parser.add_argument("--output", required=True, help="checkpoint folder to write")
    parser.add_argument("--max-shard-size", default="5GB", help="largest file of weights, like 5GB or 500MB")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: as stored")
    parser.add_argument("--version", help="conversation template (default: the one that the chat template writes)")
    parser.add_argument("--device", default="cpu", help="where the two models are compared: cpu, cuda, cuda:1, ...")
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT, once the new one is proven equal")
    return parser


@report_errors
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    quiet()
    name, report, notes = import_hf(
        args.model_path, args.output, args.max_shard_size, args.dtype, args.version, args.device, args.overwrite
    )
    print_report(report, notes, args.output, name)


if __name__ == "__main__":
    main()
