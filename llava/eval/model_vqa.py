"""Answers of a checkpoint to a file of questions.

    python -m llava.eval.model_vqa --model-path DIR --image-folder D --question-file Q.jsonl --answers-file A.jsonl
    torchrun --nproc_per_node 8 -m llava.eval.model_vqa ...    # the questions are shared among the processes

Questions are LLaVA's: rows `{question_id, image, text, category}`, where `image` is a file, a list of files (an
`<image>` each, or all in front of the text) or missing; or LLaVA-format records, of which every answer is a question
asked after the true turns before it: ID#1, ID#2, ... where a record has several. Answers are rows
`{question_id, prompt, text, answer_id, model_id, metadata}`.

Rows are appended as they come, so that nothing is lost when the run is cut short: the same command, with any number of
processes, asks what is left. At the end the rows stand in the order of the questions. A question whose picture cannot
be read is named, gets no row, and makes the exit status 1.

A.jsonl.meta.json says which weights, template, settings and questions the answers are of; a file of other ones is
refused (exit status 2) unless `--overwrite` starts it anew.
"""

import argparse
import contextlib
import json
import os
import sys
import uuid
from collections import Counter
from dataclasses import dataclass

from llava.data.forms import canonical
from llava.data.paths import media_of, resolve_path
from llava.data.records import read_file
from llava.errors import LlavaError, report_errors
from llava.eval import answer_file, answer_origin
from llava.eval.questions import Question, add_images, question_ids, read_questions
from llava.eval.weights_hash import is_here, weights_hash
from llava.inference import own_code


@dataclass
class Asked(Question):
    """A question of the file. `key` tells it from all others: id, prompt, and which of those with the same two."""

    key: tuple = ()

    @property
    def name(self) -> str:
        return f"question {self.key[0]}"


def read_question_file(path: str, image_folder, inference, allow_absolute_paths: bool = False) -> list[Asked]:
    """The questions in the order of the file, with prompts for the model at hand.

    Raises:
        LlavaError: a row that is no question; names it. Whether the pictures exist is seen when they are read.
    """
    asked, seen = [], Counter()
    for number, row in enumerate(read_file(path), start=1):
        question_id = row.get("question_id", row.get("id"))
        if not isinstance(question_id, str | int):
            raise LlavaError(f"{path}: row {number}: question_id: found {question_id!r}, expected text or a number")
        try:
            row = canonical(row)
            is_record = "conversations" in row
            questions = [] if is_record else [_question(row, image_folder, allow_absolute_paths)]
        except LlavaError as error:
            raise LlavaError(f"{path}: row {number} (question {question_id}): {error}") from None
        if is_record:
            questions = read_questions([row], path, image_folder, inference.template, allow_absolute_paths)
        prompts = [question.text for question in questions] if is_record else [row["text"]]
        ids = question_ids(question_id, len(questions))
        for question, name, prompt in zip(questions, ids, prompts, strict=True):
            asked.append(Asked(**vars(question), key=(name, prompt, seen[name, prompt])))
            seen[name, prompt] += 1
    return asked


def _question(row: dict, image_folder, allow_absolute_paths: bool) -> Question:
    text = row.get("text")
    if not isinstance(text, str):
        raise LlavaError(f"text: found {text!r}, expected the question")
    media, names = media_of(row)
    if media == "video":
        raise LlavaError("video: found a video, expected images or text")
    paths = [resolve_path(image_folder, name, allow_absolute_paths) for name in names]
    text = add_images(text, len(names))
    return Question("", str(row.get("category", "all")), names, [("human", text)], "", paths)


def chunk(questions: list, count: int, index: int) -> list:
    """Part `index` of `count`, as LLaVA cuts: all parts alike in length but the last ones."""
    if not 0 <= index < count:
        raise LlavaError(f"--chunk-idx: found {index}, expected 0 to {count - 1} (--num-chunks {count})")
    size = -(-len(questions) // count)
    return questions[index * size : (index + 1) * size]


def answer_id(model_id: str, question: Asked) -> str:
    """The same in every run; no two questions of a file share it."""
    return uuid.uuid5(uuid.NAMESPACE_OID, json.dumps([model_id, question.key, question.images])).hex


def match_rows(path: str, rows: list[dict], questions: list[Asked], model_id: str) -> dict[tuple, dict]:
    """Earlier rows by the key of their question.

    Raises:
        LlavaError: rows of another model or of other questions: a file that must not be overwritten.
    """
    key_of = {answer_id(model_id, question): question.key for question in questions}
    by_key = {}
    for row in rows:
        if row.get("model_id") != model_id:
            found = f"found answers of {row.get('model_id')!r}, expected those of {model_id!r}"
            raise LlavaError(f"{path}: {found} (--overwrite asks anew)")
        key = key_of.get(row.get("answer_id"))
        if key is None:
            raise LlavaError(
                f"{path}: question {row.get('question_id')}: found an answer that is not from this question file; "
                "expected answers to it alone (--overwrite asks anew)"
            )
        by_key[key] = row  # a crash while the files were merged leaves rows twice
    return by_key


class Asker:
    """Answers in batches, appended to a file as they come.

    Args:
        inference: the model.
        path: the file of this process.
        model_id: its name in the rows.
        options: of `Inference.generate`.
    """

    def __init__(self, inference, path: str, model_id: str, batch_size: int, options: dict):
        self.inference, self.path, self.model_id = inference, path, model_id
        self.batch_size, self.options = batch_size, options

    def ask(self, questions: list[Asked], show: bool) -> list[str]:
        """Ask all, those of alike length together. Returns the names of those that have no answer."""
        from tqdm import tqdm

        failed = []
        with tqdm(total=len(questions), desc="questions", unit="question", disable=not show) as bar:
            for start in range(0, len(questions), self.batch_size):
                batch = questions[start : start + self.batch_size]
                answers = self._answers(batch)
                rows = [self._row(q, text) for q, text in zip(batch, answers, strict=True) if isinstance(text, str)]
                if rows:
                    answer_file.append(self.path, rows)
                for question, error in zip(batch, answers, strict=True):
                    if not isinstance(error, str):
                        tqdm.write(f"error: {question.name}: {error}", file=sys.stderr)
                        failed.append(question.name)
                bar.update(len(batch))
        return failed

    def _answers(self, batch: list[Asked]) -> list:
        """A text per question, or the error that kept it from one."""
        try:
            prompts = [question.prompt(self.inference) for question in batch]
            return self.inference.generate(prompts, [_pictures(question) for question in batch], **self.options)
        except (ValueError, ZeroDivisionError):
            faults = [self._fault(question) for question in batch]
            if not any(faults):
                raise
        good = [question for question, fault in zip(batch, faults, strict=True) if fault is None]
        texts = iter(self._answers(good) if good else ())
        return [fault or next(texts) for fault in faults]

    def _fault(self, question: Asked) -> Exception | None:
        """What is wrong with a question's pictures: one is none, or of a size that no processor takes."""
        try:
            self.inference.inputs([question.prompt(self.inference)], [_pictures(question)])
        except (ValueError, ZeroDivisionError) as error:
            return error
        return None

    def _row(self, question: Asked, text: str) -> dict:
        return {
            "question_id": question.key[0],
            "prompt": question.key[1],
            "text": text,
            "answer_id": answer_id(self.model_id, question),
            "model_id": self.model_id,
            "metadata": {},
        }


def _pictures(question: Asked) -> list:
    from llava.images.reading import load_image

    return [load_image(path) for path in question.paths]


@contextlib.contextmanager
def process_group(rank: int, size: int):
    """(wait for all, gather lists from all) of this run's processes; trivial where there is one."""
    if size == 1:
        yield (lambda: None), (lambda values: values)
        return
    import datetime

    import torch.distributed as dist

    # they only wait for each other, on any device; the slowest may need long
    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=datetime.timedelta(days=7))

    def gather(values: list) -> list:
        parts = [None] * size
        dist.all_gather_object(parts, values)
        return [value for part in parts for value in part]

    try:
        yield dist.barrier, gather
    finally:
        dist.destroy_process_group()


def generation_options(args: argparse.Namespace) -> dict:
    """Arguments of transformers' `generate`; temperature 0 is greedy."""
    options = {"max_new_tokens": args.max_new_tokens, "num_beams": args.num_beams, "do_sample": args.temperature > 0}
    if args.temperature > 0:
        options["temperature"] = args.temperature
        if args.top_p is not None:
            options["top_p"] = args.top_p
    return options


def settings_of(args: argparse.Namespace) -> dict:
    """What else decides an answer, but for the dtype, which the model says."""
    names = ("max_new_tokens", "num_beams", "temperature", "top_p", "seed")
    sampled = ("top_p", "seed")
    settings = {name: getattr(args, name) for name in names if args.temperature > 0 or name not in sampled}
    return settings | {"model_base": args.model_base, "vision_tower": args.vision_tower}


def run(args: argparse.Namespace) -> list[str]:
    """Ask what is not answered yet and put the file in order. Returns the names of questions without an answer."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not os.path.isfile(args.question_file):  # before the model, which takes longer to load
        raise LlavaError(f"{args.question_file}: no such file, expected questions")
    with process_group(rank, size) as (wait, gather):

        def first(work):
            """The first process works, the others wait; a fault of it ends all, and is told once."""
            fault, done = None, None
            try:
                done = work() if rank == 0 else None
            except LlavaError as error:
                fault = error
            if any(gather([fault is not None])):
                raise fault or SystemExit(0)
            return done

        meta = first(lambda: _check_origin(args))
        inference = _load(args)
        everything = read_question_file(args.question_file, args.image_folder, inference, args.allow_absolute_paths)
        mine = chunk(everything, args.num_chunks, args.chunk_idx)
        first(lambda: _begin(args, meta, inference, everything))
        return _ask(args, inference, (everything, mine), (rank, size), (wait, gather))


def _check_origin(args: argparse.Namespace) -> dict:
    """What is known of the answers before the model is loaded; LlavaError where those that are there are of another."""
    meta = {
        "schema": answer_origin.SCHEMA,
        "model": args.model_path,
        "settings": settings_of(args),
        "questions_hash": answer_origin.file_hash(args.question_file),
    }
    if is_here(args.model_path, args.model_base):
        meta["weights_hash"] = weights_hash(args.model_path, args.model_base)
    if not args.overwrite and (fault := answer_origin.fault_of(args.answers_file, meta)):
        raise LlavaError(fault)
    return meta


def _begin(args: argparse.Namespace, meta: dict, inference, everything: list[Asked]) -> None:
    """Write what the answers are of, and put those that are there in order."""
    path, dtype = args.answers_file, str(inference.model.dtype).removeprefix("torch.")
    meta = {
        "schema": meta["schema"],
        "model": meta["model"],
        "weights_hash": meta.get("weights_hash") or weights_hash(args.model_path, args.model_base),
        "template": inference.loaded.template,
        "settings": meta["settings"] | {"dtype": dtype},
        "questions_hash": meta["questions_hash"],
    }
    if not args.overwrite and (fault := answer_origin.fault_of(path, meta)):
        raise LlavaError(fault)
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    if args.overwrite:
        answer_file.remove(path)
    if not answer_file.has_rows(path):
        answer_origin.write(path, meta)
    _put_in_order(args, everything)


def _put_in_order(args: argparse.Namespace, everything: list[Asked]) -> dict:
    path = args.answers_file
    by_key = match_rows(path, answer_file.collect(path), everything, _model_id(args))
    keys = [question.key for question in everything]
    answer_file.write_in_order(path, [by_key[key] for key in keys if key in by_key])
    return by_key


def _model_id(args: argparse.Namespace) -> str:
    from llava.utils import get_model_name_from_path

    return get_model_name_from_path(args.model_path)


def _load(args: argparse.Namespace):
    import torch

    from llava.inference.engine import Inference

    device = args.device
    if device is None and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return Inference.load(
        *(args.model_path, args.model_base),
        **{"version": args.conv_mode, "device": device, "dtype": args.dtype, **own_code.overrides(args)},
    )


def _ask(args: argparse.Namespace, inference, questions: tuple, place, together) -> list[str]:
    """This process's share of the questions of this run that have no answer; then the file in order."""
    import torch

    (everything, mine), (rank, size), (wait, gather) = questions, place, together
    path, model_id = args.answers_file, _model_id(args)
    done = match_rows(path, answer_file.read_rows(path), everything, model_id)
    wait()
    left = [question for question in mine if question.key not in done]
    if rank == 0 and len(left) < len(mine):
        print(f"{path}: {len(mine) - len(left)} of {len(mine)} questions were answered before", flush=True)
    left.sort(key=lambda question: (len(question.paths), len(question.turns[-1][1])))
    torch.manual_seed(args.seed + rank)
    asker = Asker(inference, answer_file.rank_path(path, rank), model_id, args.batch_size, generation_options(args))
    failed = gather(asker.ask(left[rank::size], show=rank == 0))
    if rank == 0:
        by_key = _put_in_order(args, everything)
        print(f"{path}: {sum(q.key in by_key for q in mine)} answers to {len(mine)} questions", flush=True)
    wait()
    return failed


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="A checkpoint's answers to a file of questions.")
    parser.add_argument("--model-path", required=True, help="checkpoint folder or hub id")
    parser.add_argument("--model-base", help="language model under a projector-only checkpoint")
    parser.add_argument("--image-folder", help="where the questions' image paths start")
    parser.add_argument("--question-file", required=True, help="questions, .jsonl or .json")
    parser.add_argument("--answers-file", required=True, help=".jsonl to write, or to complete")
    parser.add_argument("--overwrite", action="store_true", help="drop the answers that are there and ask anew")
    parser.add_argument("--conv-mode", help="conversation template (default: the checkpoint's)")
    parser.add_argument("--num-chunks", type=int, default=1, help="cut the questions into this many parts ...")
    parser.add_argument("--chunk-idx", type=int, default=0, help="... and ask this one (from 0)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy (the default; LLaVA's is 0.2)")
    parser.add_argument("--top_p", type=float, help="with a temperature: sample from this share of the probability")
    parser.add_argument("--num_beams", type=int, default=1, help="beam search with this many beams")
    parser.add_argument("--max_new_tokens", type=int, default=1024, help="longest answer, in tokens")
    parser.add_argument("--batch-size", type=int, default=8, help="questions asked at once, per process")
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.add_argument("--allow-absolute-paths", action="store_true", help="let image paths leave the image folder")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--dtype", help="default: float32 on cpu, else bfloat16")
    own_code.add_options(parser)
    return parser


@report_errors
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    failed = run(args)
    if failed:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"error: {len(failed)} questions have no answer; the same command asks them again", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
