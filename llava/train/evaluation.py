"""Evaluation while a run trains: the loss on records that are not trained on, and exact match on request.

What is measured does not depend on batch sizes or the number of processes, and leaves no trace in the training: every
random state is what it was. Each rank takes the same number of forward and generate calls, as ZeRO-3 needs.
"""

import contextlib
import random
import time
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from torch.utils.data import DataLoader

from llava.constants import IGNORE_INDEX
from llava.data import make_data, read_records
from llava.errors import LlavaError
from llava.eval.exact_match import Answerer, evaluate
from llava.eval.questions import Question, read_questions
from llava.inference.engine import Inference
from llava.utils import rank0_print


@dataclass
class Evaluation:
    """What a run is evaluated on.

    Attributes:
        dataset: the records' samples.
        collate: as the trainer's.
        inference: answers questions with the model in training; None: exact match is not asked for.
        questions: for exact match.
        told: records left out that have been told of.
    """

    dataset: object
    collate: object
    inference: Inference | None
    questions: list[Question]
    told: set[str]


def evaluates(training_args) -> bool:
    return str(getattr(training_args.eval_strategy, "value", training_args.eval_strategy)) != "no"


def read_evaluation(data_args, training_args, *, version: str, refused: dict[str, str]):
    """(records, questions) of `eval_data_path`, checked as those of the training are; no weights are needed.

    Raises:
        LlavaError: as `read_records`; or, with `eval_exact_match`, records that are no questions.
    """
    from llava.conversation import get_template

    args, folder = training_args, training_args.eval_image_folder or data_args.image_folder
    named = {**vars(data_args), "data_path": args.eval_data_path, "image_folder": folder}
    records = read_records(SimpleNamespace(**named), version=version, refused=refused, seed=args.seed).first(
        args.eval_limit
    )
    questions: list[Question] = []
    for part, rows in records.by_part() if args.eval_exact_match else ():
        folders = part.image_folder or folder, get_template(version)
        questions += read_questions(rows, part.path, *folders, data_args.allow_absolute_paths)
    return records, questions


def make_evaluation(records, questions, family, loaded, args, image_folder: str | None) -> Evaluation:
    """Of records and questions, whose images lie in a folder of their own, if given; the rest as `make_data`'s."""
    # what is drawn in training has its middle here, as in the saved model
    args = replace(args, patch_choice=None, image_folder=image_folder or args.image_folder)
    data = make_data(records, family, loaded, args)
    inference = Inference(family, loaded) if questions else None
    return Evaluation(data["train_dataset"], data["data_collator"], inference, questions, set())


def run_evaluation(trainer, evaluation: Evaluation) -> dict[str, float]:
    """What is logged: eval_loss, eval_runtime, and with questions eval_exact_match, eval_exact_match_KIND, eval_n, and
    eval_blank_images_exact_match. Every rank must call it, and gets the same.

    Raises:
        LlavaError: no record has a label, or a question's picture cannot be read.
    """
    start = time.monotonic()
    with _untouched(trainer):
        metrics = {"eval_loss": _mean_loss(trainer, evaluation)}
        if evaluation.questions:
            metrics |= _exact_match(trainer, evaluation)
    return metrics | {"eval_runtime": round(time.monotonic() - start, 4)}


@contextlib.contextmanager
def _untouched(trainer):
    """Evaluate inside; afterwards random states and the model's mode are what they were."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    python, numpy, training = random.getstate(), np.random.get_state(), trainer.model_wrapped.training
    modes = {module: module.training for module in trainer.model_wrapped.modules()}
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        trainer.model_wrapped.eval()
        try:
            yield
        finally:
            trainer.model_wrapped.train(training)
            for module, mode in modes.items():  # a part may be kept in another mode
                module.training = mode
            random.setstate(python)
            np.random.set_state(numpy)


def _mean_loss(trainer, evaluation: Evaluation) -> float:
    """Over the supervised tokens of all records."""
    args, accelerator = trainer.args, trainer.accelerator
    total, count = 0.0, 0
    left_out: list[str] = []
    for batch in _batches(args, evaluation):
        left_out += [*batch.pop("bad_records", ()), *batch.pop("no_label", ())]
        labels = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
        inputs = trainer._prepare_inputs(batch)
        with trainer.compute_loss_context_manager():
            loss = trainer.model_wrapped(**inputs, num_items_in_batch=torch.ones((), device=args.device)).loss
        total, count = total + float(loss), count + labels
    sums = torch.tensor([total, count], dtype=torch.float64, device=args.device)
    total, count = accelerator.gather(sums).view(-1, 2).sum(0).tolist()
    _tell(_of_all(args, left_out), evaluation)
    if not count:
        raise LlavaError(f"{args.eval_data_path}: found no record with a label, expected something to evaluate on")
    return total / count


def _batches(args, evaluation: Evaluation):
    """This rank's batches of samples; as many on every rank, the last of some without a record."""
    records, size = len(evaluation.dataset), args.per_device_eval_batch_size
    numbers = [list(range(at, min(at + size, records))) for at in range(0, records, size)]
    rounds = -(-len(numbers) // args.world_size)
    mine = numbers[args.process_index :: args.world_size]
    loader = DataLoader(
        evaluation.dataset,
        batch_sampler=mine,
        collate_fn=evaluation.collate,
        num_workers=args.dataloader_num_workers,
        generator=torch.Generator(),
    )
    yield from loader
    for _ in range(rounds - len(mine)):
        yield evaluation.collate([])


def _of_all(args, found: list[str]) -> list[str]:
    """What all ranks have found."""
    if args.world_size == 1:
        return found
    gathered = [None] * args.world_size
    torch.distributed.all_gather_object(gathered, found)
    return [item for part in gathered for item in part]


def _tell(left_out: list[str], evaluation: Evaluation) -> None:
    for record in sorted(set(left_out) - evaluation.told):
        rank0_print(f"left out of the evaluation: {record}")
    evaluation.told.update(left_out)


def _exact_match(trainer, evaluation: Evaluation) -> dict[str, float]:
    args = trainer.args
    inference = evaluation.inference
    inference.model = inference.loaded.model = trainer.accelerator.unwrap_model(trainer.model)
    answerer = Answerer(
        inference,
        max_new_tokens=args.eval_max_new_tokens,
        batch_size=args.per_device_eval_batch_size,
        share=(args.process_index, args.world_size, partial(_of_all, args)),
        quiet=args.disable_tqdm or args.process_index > 0,
    )
    with trainer.compute_loss_context_manager():
        result = evaluate(answerer, evaluation.questions, args.eval_blank_images)
    metrics = {"eval_exact_match": result["exact_match"], "eval_n": result["n"]}
    metrics |= {f"eval_exact_match_{kind}": values["exact_match"] for kind, values in result["by_kind"].items()}
    if "blank_images" in result:
        metrics["eval_blank_images_exact_match"] = result["blank_images"]["exact_match"]
    return metrics
