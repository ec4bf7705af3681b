"""Exact match of a Qwen2-VL on a LLaVA-format file, with one or several choices of patches.

    python -m llava.eval.qwen2_vl --model-path DIR --data-path F.json --image-folder D --selections none budget:0.5 v1

Writes `eval.json` as `llava.eval.exact_match` does, for the first selection, with `selections`: for each of them
`{selection, exact_match, n, by_kind, vision_tokens, llm_tokens, seconds}`, tokens per picture on average.
"""

import argparse
import json
import os
import time

from llava.data.records import read_file
from llava.errors import report_errors
from llava.eval.exact_match import Answerer, evaluate, print_summary
from llava.eval.questions import Question, read_questions
from llava.model.adaptive_patches import PatchChoice


def parse_selection(text: str) -> dict:
    """`PatchChoice.parse` as the image processor's arguments; those that it does not say stay the processor's own."""
    choice = PatchChoice.parse(text)
    alpha = None if choice is None else choice.alpha
    return {"patch_selection_method": choice and choice.method, "alpha": 1.0 if alpha is None else alpha}


def selection_name(images) -> str:
    """An image processor's own selection, as `parse_selection` reads it."""
    return str(images.adaptive_patches or "none")


class Qwen2VLInference:
    """One Qwen2-VL for `Answerer`, with the selection in `settings` (arguments of the image processor).

    `counts` gets (vision tokens, tokens of the language model) of every picture that is processed.
    """

    def __init__(self, model, processor):
        self.model, self.processor, self.image_processor = model, processor, processor.image_processor
        processor.tokenizer.padding_side = "left"
        self.settings: dict = {}
        self.counts: list[tuple[int, int]] = []

    def prompt(self, question: Question) -> str:
        """The prompt's text, one `<|image_pad|>` for each picture."""
        from llava.data.qwen2_vl import chat_prompt

        return chat_prompt(question.turns, question.system)

    def generate(self, prompts: list[str], pictures: list[list], **options) -> list[str]:
        """The answers to a batch of prompts, greedy; `pictures` are PIL images of each row."""
        import torch

        flat = [picture for row in pictures for picture in row]
        images = {"images": flat, "images_kwargs": self.settings} if flat else {}
        inputs = self.processor(text=prompts, padding=True, return_tensors="pt", **images)
        self._count(inputs)
        inputs = inputs.to(self.model.device)
        with torch.inference_mode():
            ids = self.model.generate(
                **inputs,
                do_sample=False,
                eos_token_id=self.processor.tokenizer.eos_token_id,
                pad_token_id=self.processor.tokenizer.pad_token_id,
                **options,
            )
        texts = self.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _count(self, inputs) -> None:
        from llava.model.qwen2_vl.layout import MERGE, token_counts

        if "image_patch_levels" in inputs:
            self.counts += token_counts(inputs["image_patch_levels"], inputs["image_grid_thw"])
        else:
            sizes = [] if "image_grid_thw" not in inputs else inputs["image_grid_thw"].prod(1).tolist()
            self.counts += [(size, size // MERGE**2) for size in sizes]


def evaluate_selections(
    inference: Qwen2VLInference, questions: list[Question], selections: dict[str, dict], blank: bool = False, **options
) -> dict:
    """The content of `eval.json`.

    Args:
        selections: name -> the image processor's arguments; the first one's answers are kept in full.
        blank: ask the first one's questions again with blank pictures.
        options: of `Answerer`.
    """
    answerer = Answerer(inference, **options)
    pictures = sum(len(question.images) for question in questions)
    result, rows = {}, []
    for name, settings in selections.items():
        inference.settings, inference.counts = settings, []
        start = time.monotonic()
        found = evaluate(answerer, questions, blank and not rows)
        counts = inference.counts[:pictures]  # blank ones come after
        row = {"selection": name, **{key: found[key] for key in ("exact_match", "n", "by_kind")}}
        for at, key in enumerate(("vision_tokens", "llm_tokens")):
            row[key] = sum(count[at] for count in counts) / max(len(counts), 1)
        rows.append(row | {"seconds": round(time.monotonic() - start, 2)})
        result = result or found
    return result | {"selections": rows}


def table(rows: list[dict]) -> str:
    """The selections in aligned columns."""
    lines = [f"  {'selection':<12} {'exact match':>11} {'vision tokens':>14} {'LLM tokens':>11}   (tokens per picture)"]
    for row in rows:
        numbers = f"{row['exact_match']:>11.3f} {row['vision_tokens']:>14.1f} {row['llm_tokens']:>11.1f}"
        lines.append(f"  {row['selection']:<12} {numbers}")
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Exact match of a Qwen2-VL with one or several choices of patches.")
    parser.add_argument("--model-path", required=True, help="folder or hub id, or the folder of a LoRA adapter")
    parser.add_argument("--model-base", help="the model under an adapter (default: as the adapter names it)")
    parser.add_argument("--data-path", required=True, help="questions, .json or .jsonl; records may name their kind")
    parser.add_argument("--image-folder", help="where the records' image paths start")
    parser.add_argument("--selections", nargs="+", help="none, v1, v2, v2:ALPHA, budget:ALPHA (default: the folder's)")
    parser.add_argument("--output", help="file to write (default: eval.json in the model folder)")
    parser.add_argument("--batch-size", type=int, default=64, help="questions asked at once")
    parser.add_argument("--max-new-tokens", type=int, default=16, help="longest answer, in tokens")
    parser.add_argument("--limit", type=int, help="ask only the first N questions")
    parser.add_argument("--blank-images", action="store_true", help="ask again with blank pictures; report chance")
    parser.add_argument("--allow-absolute-paths", action="store_true", help="let image paths leave the image folder")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--dtype", help="default: float32 on cpu, else bfloat16")
    return parser


@report_errors
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    selections = {text: parse_selection(text) for text in args.selections or ()}
    output = args.output or os.path.join(args.model_path, "eval.json")
    records = read_file(args.data_path)  # before the model, which takes longer to load

    import torch

    from llava.conversation import conv_templates
    from llava.model.builder import pick_dtype
    from llava.model.qwen2_vl.loading import load_qwen2_vl

    template = conv_templates["qwen_1_5"]  # whose turns are as Qwen2-VL's
    questions = read_questions(records, args.data_path, args.image_folder, template, args.allow_absolute_paths)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = pick_dtype(args.dtype or ("float32" if device == "cpu" else "bfloat16"), device == "cpu")
    model, processor = load_qwen2_vl(args.model_path, args.model_base, device, dtype)
    result = evaluate_selections(
        Qwen2VLInference(model, processor),
        questions[: args.limit],
        selections or {selection_name(processor.image_processor): {}},
        args.blank_images,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
    )
    result["image_folder"] = args.image_folder
    os.makedirs(os.path.dirname(os.path.abspath(output)), exist_ok=True)
    with open(output, "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1)
    print(table(result["selections"]))
    print_summary(result)


if __name__ == "__main__":
    main()
