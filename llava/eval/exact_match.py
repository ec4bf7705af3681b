"""Exact match on a LLaVA-format file, of a model of any family.

    python -m llava.eval.exact_match --model-path checkpoints/demo/finetune --data-path F.json --image-folder D
    python -m llava.eval.exact_match ... --selections none budget:0.5 v1        # with several choices of patches

Every answer of a record is a question, asked with the true earlier turns before it. Writes `eval.json`:
`{exact_match, n, by_kind: {kind: {exact_match, n}}, questions: [{id, kind, image, question, answer, prediction,
correct}], image_folder}`; with `--blank-images` also `blank_images`: the same scores on pictures of one colour, beside
chance; with `--selections` also `selections`: for each of them `{exact_match, n, by_kind, vision_tokens, llm_tokens,
seconds}`, tokens per picture on average, where the first one's answers are those kept in full.
"""

import argparse
import json
import os
import time

from llava.data.records import read_file
from llava.errors import LlavaError, report_errors
from llava.eval.questions import Question, chance, is_correct, read_questions, score
from llava.inference import own_code


class Answerer:
    """Greedy, batched answers of one model.

    Args:
        inference: an `Inference`.
        max_new_tokens: longest answer.
        batch_size: questions that are asked at once.
        share: (rank, number of ranks, function that joins the lists of all ranks), where several processes share the
            questions; each makes the same number of calls, with pictures in the same ones.
        quiet: without a progress bar.
        after_batch: called after each batch; what it raises ends the answering.

    Attributes:
        blank: replace every picture by one colour (the processor's mean) of the same size.
        counts: (vision tokens, tokens of the language model) of every picture that was shown; None: not counted.
    """

    def __init__(self, inference, *, max_new_tokens=16, batch_size=64, share=None, quiet=False, after_batch=None):
        self.inference, self.max_new_tokens, self.batch_size = inference, max_new_tokens, batch_size
        self.share, self.quiet, self.after_batch = share, quiet, after_batch
        self.blank, self.counts = False, None

    def answer(self, questions: list[Question], title: str = "questions") -> list[str]:
        """One prediction per question, in the order given; of several ranks, on each the same.

        Raises:
            LlavaError: a picture cannot be read; names the record.
        """
        from tqdm import tqdm

        inference = self.inference
        prompts = [question.prompt(inference) for question in questions]
        turns, found = list(self._turns(questions, prompts)), []
        with tqdm(total=sum(len(t[0]) for t in turns), desc=title, unit="question", disable=self.quiet) as bar:
            for rows, mine in turns:
                inputs = inference.inputs([prompts[i] for i in rows], [self._pictures(questions[i]) for i in rows])
                if self.counts is not None:
                    self.counts += inference.family.picture_tokens(inputs, inference.loaded)
                texts = inference.answer(inputs, max_new_tokens=self.max_new_tokens)
                found += zip(rows, texts, strict=True) if mine else ()
                bar.update(len(rows))
                if self.after_batch is not None:
                    self.after_batch()
        predictions = dict(found if self.share is None else self.share[2](found))
        return [predictions[i] for i in range(len(questions))]

    def _turns(self, questions: list[Question], prompts: list[list[int]]):
        """(numbers of questions, whether they are this rank's or only keep it in step) of each call."""
        rank, ranks = (0, 1) if self.share is None else self.share[:2]
        for seeing in (False, True):
            # alike lengths together, so that little padding is computed
            order = [i for i, question in enumerate(questions) if bool(question.images) == seeing]
            order.sort(key=lambda i: (len(questions[i].images), len(prompts[i])))
            batches = [order[at : at + self.batch_size] for at in range(0, len(order), self.batch_size)]
            for at in range(0, len(batches), ranks):
                mine = at + rank < len(batches)
                yield batches[at + rank if mine else at], mine

    def _pictures(self, question: Question) -> list:
        from PIL import Image

        from llava.images.reading import load_image

        pictures = []
        for path in question.paths:
            try:
                picture = load_image(path)
            except LlavaError as error:
                raise LlavaError(f"record {question.id}: {error}") from None
            if self.blank:
                mean = tuple(int(255 * value) for value in self.inference.image_processor.image_mean)
                picture = Image.new("RGB", picture.size, mean)
            pictures.append(picture)
        return pictures


def evaluate(answerer: Answerer, questions: list[Question], blank_images: bool = False) -> dict:
    """The content of `eval.json`."""
    predictions = answerer.answer(questions)
    result = score(questions, predictions)
    result["questions"] = [
        {
            "id": question.id,
            "kind": question.kind,
            "image": question.images[0] if len(question.images) == 1 else (question.images or None),
            "question": question.text,
            "answer": question.answer,
            "prediction": prediction,
            "correct": is_correct(prediction, question.answer),
        }
        for question, prediction in zip(questions, predictions, strict=True)
    ]
    seen = [question for question in questions if question.images]
    if blank_images and seen:
        answerer.blank = True
        blank = score(seen, answerer.answer(seen, "questions, images blanked"))
        answerer.blank = False
        for kind, share in chance(seen).items():
            blank["by_kind"][kind]["chance"] = share
        result["blank_images"] = blank
    return result


def evaluate_selections(
    answerer: Answerer, questions: list[Question], selections: dict, blank_images: bool = False
) -> dict:
    """The content of `eval.json` with `selections`.

    Args:
        selections: name -> `PatchChoice`, or None for all patches; the first one's answers are kept in full.
        blank_images: ask the first one's questions again with blank pictures.
    """
    inference, result, rows = answerer.inference, {}, {}
    pictures = sum(len(question.images) for question in questions)
    for name, choice in selections.items():
        inference.family.choose_patches(inference.loaded, choice)
        answerer.counts, start = [], time.monotonic()
        found = evaluate(answerer, questions, blank_images and not rows)
        counts = answerer.counts[:pictures]  # blank ones come after
        row = {key: found[key] for key in ("exact_match", "n", "by_kind")}
        for at, key in enumerate(("vision_tokens", "llm_tokens")):
            row[key] = sum(count[at] for count in counts) / max(len(counts), 1)
        rows[name] = row | {"seconds": round(time.monotonic() - start, 2)}
        result = result or found
    return result | {"selections": rows}


def table(selections: dict) -> str:
    """The selections in aligned columns."""
    lines = [f"  {'selection':<12} {'exact match':>11} {'vision tokens':>14} {'LLM tokens':>11}   (tokens per picture)"]
    for name, row in selections.items():
        numbers = f"{row['exact_match']:>11.3f} {row['vision_tokens']:>14.1f} {row['llm_tokens']:>11.1f}"
        lines.append(f"  {name:<12} {numbers}")
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Exact match of a checkpoint on a LLaVA-format file.")
    parser.add_argument("--model-path", required=True, help="checkpoint folder or hub id")
    parser.add_argument("--model-base", help="model under a projector-only checkpoint or a LoRA adapter")
    parser.add_argument("--data-path", required=True, help="questions, .json or .jsonl; records may name their kind")
    parser.add_argument("--image-folder", help="where the records' image paths start")
    parser.add_argument("--output", help="file to write (default: eval.json in the checkpoint folder)")
    parser.add_argument("--conv-mode", help="conversation template (default: the checkpoint's)")
    parser.add_argument(
        "--selections",
        nargs="+",
        help="choices of patches: none, v1, v2, v2:ALPHA, budget:ALPHA (default: the model's)",
    )
    parser.add_argument("--batch-size", type=int, default=64, help="questions asked at once")
    parser.add_argument("--max-new-tokens", type=int, default=16, help="longest answer, in tokens")
    parser.add_argument("--limit", type=int, help="ask only the first N questions")
    parser.add_argument("--blank-images", action="store_true", help="ask again with blank pictures; report chance")
    parser.add_argument("--allow-absolute-paths", action="store_true", help="let image paths leave the image folder")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--dtype", help="default: float32 on cpu, else bfloat16")
    own_code.add_options(parser)
    return parser


def print_summary(result: dict) -> None:
    """A line per kind, then the line that says it all."""
    blank = result.get("blank_images", {}).get("by_kind", {})
    for kind, values in result["by_kind"].items():
        line = f"  {kind:<12} {values['exact_match']:.3f} (n={values['n']})"
        if kind in blank:
            line += f", images blanked {blank[kind]['exact_match']:.3f} (chance {blank[kind]['chance']:.3f})"
        print(line)
    print(f"held-out exact match: {result['exact_match']:.3f} (n={result['n']})", flush=True)


@report_errors
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    output = args.output or os.path.join(args.model_path, "eval.json")
    records = read_file(args.data_path)  # before the model, which takes longer to load
    selections = {}
    if args.selections:
        from llava.model.adaptive_patches import PatchChoice

        selections = {text: PatchChoice.parse(text) for text in args.selections}

    from llava.inference.engine import Inference

    inference = Inference.load(
        *(args.model_path, args.model_base),
        **{"version": args.conv_mode, "device": args.device, "dtype": args.dtype, **own_code.overrides(args)},
    )
    template = inference.template
    questions = read_questions(records, args.data_path, args.image_folder, template, args.allow_absolute_paths)
    questions = questions[: args.limit]
    answerer = Answerer(inference, max_new_tokens=args.max_new_tokens, batch_size=args.batch_size)
    if selections:
        result = evaluate_selections(answerer, questions, selections, args.blank_images)
        print(table(result["selections"]))
    else:
        result = evaluate(answerer, questions, args.blank_images)
    result["image_folder"] = args.image_folder
    os.makedirs(os.path.dirname(os.path.abspath(output)), exist_ok=True)
    with open(output, "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1)
    print_summary(result)


if __name__ == "__main__":
    main()
