"""Exact match on a LLaVA-format file.

    python -m llava.eval.exact_match --model-path checkpoints/demo/finetune --data-path F.json --image-folder D

Every answer of a record is a question, asked with the true earlier turns before it. Writes `eval.json`:
`{exact_match, n, by_kind: {kind: {exact_match, n}}, questions: [{id, kind, image, question, answer, prediction,
correct}], image_folder}` and, with `--blank-images`, `blank_images`: the same scores on pictures of one colour, beside
chance.
"""

import argparse
import json
import os

from llava.data.records import read_file
from llava.errors import LlavaError, report_errors
from llava.eval.questions import Question, build_prompt, chance, is_correct, read_questions, score


class Answerer:
    """Greedy, batched answers of one model.

    Args:
        tokenizer, model, image_processor: as `load_pretrained_model` returns them.
        template: the conversation template to ask with.
        blank: replace every picture by one colour (the processor's mean) of the same size.
    """

    def __init__(self, tokenizer, model, image_processor, template, *, max_new_tokens=16, batch_size=64, blank=False):
        self.tokenizer, self.model, self.processor, self.template = tokenizer, model, image_processor, template
        self.max_new_tokens, self.batch_size, self.blank = max_new_tokens, batch_size, blank

    def answer(self, questions: list[Question], title: str = "questions") -> list[str]:
        """One prediction per question, in the order given.

        Raises:
            LlavaError: a picture cannot be read; names the record.
        """
        from tqdm import tqdm

        from llava.mm_utils import tokenizer_image_token

        prompts = [tokenizer_image_token(build_prompt(q, self.template), self.tokenizer) for q in questions]
        # alike lengths together, so that little padding is computed
        order = sorted(range(len(questions)), key=lambda i: (len(questions[i].images), len(prompts[i])))
        predictions = [""] * len(questions)
        with tqdm(total=len(questions), desc=title, unit="question") as bar:
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                texts = self._generate([questions[i] for i in rows], [prompts[i] for i in rows])
                for i, text in zip(rows, texts, strict=True):
                    predictions[i] = text
                bar.update(len(rows))
        return predictions

    def _generate(self, questions: list[Question], prompts: list[list[int]]) -> list[str]:
        import torch

        width = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        images, sizes = [], []
        for question in questions:
            pixels, pixel_sizes = self._images(question)
            images += pixels
            sizes += pixel_sizes
        media = {"images": images, "image_sizes": sizes, "modalities": ["image"] * len(images)} if images else {}
        device = self.model.device
        with torch.inference_mode():
            new = self.model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                do_sample=False,
                max_new_tokens=self.max_new_tokens,
                eos_token_id=self._stop_ids(),
                pad_token_id=pad,
                **media,
            )
        return [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]

    def _stop_ids(self) -> list[int]:
        ids = {self.tokenizer.eos_token_id, *(self.template.stop_token_ids or ())}
        return sorted(i for i in ids if i is not None)

    def _images(self, question: Question) -> tuple[list, list[tuple[int, int]]]:
        """Pixels, in the model's dtype and on its device, and (width, height) of the question's pictures."""
        from PIL import Image

        from llava.data.images import load_image
        from llava.mm_utils import NativeResolution, process_image

        config = self.model.config
        native = NativeResolution.from_config(config)
        # as in training: several pictures are squared and get one crop each, but for native
        squared = len(question.paths) > 1 and native is None
        aspect_ratio = "pad" if squared else getattr(config, "image_aspect_ratio", None)
        grid = getattr(config, "image_grid_pinpoints", None)
        pixels, sizes = [], []
        for path in question.paths:
            try:
                picture = load_image(path)
            except LlavaError as error:
                raise LlavaError(f"record {question.id}: {error}") from None
            if self.blank:
                mean = tuple(int(255 * value) for value in self.processor.image_mean)
                picture = Image.new("RGB", picture.size, mean)
            values = process_image(picture, self.processor, aspect_ratio, grid, native)
            pixels.append(values.to(self.model.device, self.model.dtype))
            sizes.append(picture.size)
        return pixels, sizes


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


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Exact match of a checkpoint on a LLaVA-format file.")
    parser.add_argument("--model-path", required=True, help="checkpoint folder or hub id")
    parser.add_argument("--model-base", help="language model under a projector-only checkpoint")
    parser.add_argument("--data-path", required=True, help="questions, .json or .jsonl; records may name their kind")
    parser.add_argument("--image-folder", help="where the records' image paths start")
    parser.add_argument("--output", help="file to write (default: eval.json in the checkpoint folder)")
    parser.add_argument("--conv-mode", help="conversation template (default: the checkpoint's)")
    parser.add_argument("--batch-size", type=int, default=64, help="questions asked at once")
    parser.add_argument("--max-new-tokens", type=int, default=16, help="longest answer, in tokens")
    parser.add_argument("--limit", type=int, help="ask only the first N questions")
    parser.add_argument("--blank-images", action="store_true", help="ask again with blank pictures; report chance")
    parser.add_argument("--allow-absolute-paths", action="store_true", help="let image paths leave the image folder")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--dtype", help="default: float32 on cpu, else bfloat16")
    return parser


def load(args: argparse.Namespace) -> tuple:
    """(tokenizer, model, image processor, template) as the arguments say."""
    import torch

    from llava.conversation import conv_templates
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = args.dtype or ("float32" if device == "cpu" else "bfloat16")
    name = get_model_name_from_path(args.model_path)
    tokenizer, model, processor, _ = load_pretrained_model(
        args.model_path, args.model_base, name, device_map=device, torch_dtype=dtype
    )
    version = args.conv_mode or model.config.conversation_template
    if version not in conv_templates:
        raise LlavaError(f"template {version!r}: found no such one, expected one of {', '.join(conv_templates)}")
    return tokenizer, model, processor, conv_templates[version]


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
    tokenizer, model, processor, template = load(args)
    questions = read_questions(records, args.data_path, args.image_folder, template, args.allow_absolute_paths)
    answerer = Answerer(
        tokenizer, model, processor, template, max_new_tokens=args.max_new_tokens, batch_size=args.batch_size
    )
    result = evaluate(answerer, questions[: args.limit], args.blank_images)
    result["image_folder"] = args.image_folder
    os.makedirs(os.path.dirname(os.path.abspath(output)), exist_ok=True)
    with open(output, "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1)
    print_summary(result)


if __name__ == "__main__":
    main()
