"""Evaluation while a run trains: the loss on records that are not trained on, and exact match on request.

What is measured depends neither on batch sizes nor on the number of processes, and leaves no trace in the training:
random states and modes are what they were. Every rank makes the same calls of the model, as ZeRO-3 needs.
"""

import contextlib
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from llava.constants import IGNORE_INDEX
from llava.data import make_data, read_records
from llava.data.dataset import BadRecord
from llava.data.records import Records
from llava.errors import LlavaError
from llava.eval.exact_match import Answerer, evaluate
from llava.eval.questions import Question, read_questions
from llava.inference.engine import Inference
from llava.train.ranks import gather
from llava.train.stopping import in_worker, worker_context
from llava.utils import rank0_print

BLANK = "blank_images_exact_match"
LISTED = 10  # records that are left out, of one evaluation


@dataclass
class Evaluation:
    """What a run is evaluated on.

    Attributes:
        dataset: the records' samples, a `LazySupervisedDataset`.
        collate: as the trainer's.
        inference: answers questions with the model in training; None: exact match is not asked for.
        questions: for exact match; each knows its record's number in the data set.
        told: records left out that have been told of.
    """

    dataset: Dataset
    collate: object
    inference: Inference | None
    questions: list[Question]
    told: set[str] = field(default_factory=set)


# --- before weights are read ---


def evaluates(training_args) -> bool:
    """Whether a run with these `TrainingArguments` is ever evaluated."""
    return training_args.eval_strategy != "no" or training_args.eval_on_start


def read_evaluation(data_args, training_args, *, version: str, refused: dict) -> tuple[Records, list[Question]]:
    """The records of `eval_data_path`, checked as those of the training are, and with `eval_exact_match` their
    questions.

    Raises:
        LlavaError: as `read_records`; records that are no questions; or nothing to measure what is asked for on.
    """
    args, folder = training_args, training_args.eval_image_folder or data_args.image_folder
    named = SimpleNamespace(**{**vars(data_args), "data_path": args.eval_data_path, "image_folder": folder})
    records = read_records(named, version=version, refused=refused, seed=args.seed, key="eval_data_path")
    records = records.first(args.eval_limit)
    questions = _questions(records, folder, version, data_args.allow_absolute_paths) if args.eval_exact_match else []
    if args.eval_blank_images and not any(question.images for question in questions):
        raise LlavaError(f"{args.eval_data_path}: found no images, expected some (eval_blank_images)")
    names = ["loss"]
    if questions:
        names += ["exact_match", *sorted({f"exact_match_{question.kind}" for question in questions})]
        names += [BLANK] if args.eval_blank_images else []
    metric = args.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_") not in names:
        listed = ", ".join(f"eval_{name}" for name in names)
        raise LlavaError(f"metric_for_best_model is {metric!r}, expected one of {listed} ({args.eval_data_path})")
    return records, questions


def _questions(records: Records, folder: str | None, version: str, allow_absolute_paths: bool) -> list[Question]:
    from llava.conversation import get_template

    found, start, template = [], 0, get_template(version)
    for part, rows in records.by_part():
        asked = read_questions(rows, part.path, part.image_folder or folder, template, allow_absolute_paths)
        found += [replace(question, record=question.record + start) for question in asked]
        start += len(rows)
    return found


def make_evaluation(records, questions, family, loaded, args, image_folder: str | None) -> Evaluation:
    """Of records and questions, whose images lie in a folder of their own, if given; the rest as `make_data`'s."""
    # what is drawn in training has its middle here, as in the saved model
    args = replace(args, patch_choice=None, image_folder=image_folder or args.image_folder)
    data = make_data(records, family, loaded, args)
    inference = Inference(family, loaded) if questions else None
    return Evaluation(data["train_dataset"], data["data_collator"], inference, questions)


# --- in training ---


class _Stopped(Exception):
    """The run is to end, by a signal."""


def run_evaluation(trainer, evaluation: Evaluation) -> dict[str, float] | None:
    """What is logged; every rank must call it, and gets the same. None: the run is to end before all is measured.

    Returns:
        eval_loss; eval_n: questions asked, without exact match the records that the loss is of; eval_runtime in
        seconds; and with questions eval_exact_match and eval_exact_match_KIND, shares between 0 and 1, and with
        `eval_blank_images` eval_blank_images_exact_match.

    Raises:
        LlavaError: nothing is left that could be measured.
    """
    start = time.monotonic()
    try:
        with _untouched(trainer):
            metrics, lost = _mean_loss(trainer, evaluation)
            if evaluation.questions:
                metrics |= _exact_match(trainer, evaluation, lost)
    except _Stopped:
        return None
    metric = trainer.args.metric_for_best_model
    if metric is not None and f"eval_{metric.removeprefix('eval_')}" not in metrics:
        raise LlavaError(f"{metric}: all of its questions were left out, expected some (metric_for_best_model)")
    return metrics | {"eval_runtime": round(time.monotonic() - start, 4)}


@contextlib.contextmanager
def _untouched(trainer) -> Iterator[None]:
    """Evaluate inside; afterwards random states and the model's modes are what they were."""
    model, optimizer = trainer.model_wrapped, trainer.optimizer
    modes = [(module, module.training) for module in model.modules()]
    python, numpy = random.getstate(), np.random.get_state()
    devices = [trainer.args.device] if trainer.args.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        model.eval()
        if callable(getattr(optimizer, "eval", None)):
            optimizer.eval()  # one without a schedule holds averaged weights for this; `Trainer`'s step takes them back
        try:
            yield
        finally:
            for module, mode in modes:  # a part may be kept in another mode than the whole
                module.training = mode
            random.setstate(python)
            np.random.set_state(numpy)


def _mean_loss(trainer, evaluation: Evaluation) -> tuple[dict[str, float], set[int]]:
    """eval_loss, over the supervised tokens of all records, and eval_n; and the numbers of records without a sample."""
    args, loader = trainer.args, _loader(trainer.args, evaluation)
    total, labels = 0.0, 0
    lost: dict[int, BadRecord] = {}
    trainer.callback_handler.eval_dataloader = loader  # for the progress bar
    for batch, left_out in loader:
        lost |= left_out
        labels += int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
        inputs = trainer._prepare_inputs(batch)
        with trainer.compute_loss_context_manager():
            loss = trainer.model_wrapped(**inputs, num_items_in_batch=torch.ones((), device=args.device)).loss
        total += float(loss)  # in double precision: how many batches there are must not show
        trainer.control = trainer.callback_handler.on_prediction_step(args, trainer.state, trainer.control)
        _go_on(trainer)
    totals, counts, losts = zip(*gather((total, labels, lost)), strict=True)
    lost = {number: record for part in losts for number, record in part.items()}
    _tell(lost, evaluation)
    if not sum(counts):
        why = f"; left out: {next(iter(lost.values()))}" if lost else ""
        raise LlavaError(f"{args.eval_data_path}: found no record with a label, expected something to evaluate on{why}")
    metrics = {"eval_loss": sum(totals) / sum(counts), "eval_n": len(evaluation.dataset) - len(lost)}
    return metrics, {number for number, record in lost.items() if record.kind != "no_label"}


def _go_on(trainer) -> None:
    """Leave the evaluation where a signal asks any rank for the run's end; each has as many batches."""
    if number := max(gather(trainer.stopping.asked())):
        trainer.stopping.agree(number)
        raise _Stopped


class _Numbered(Dataset):
    """(number, sample) of a data set."""

    def __init__(self, samples: Dataset):
        self.samples = samples

    def __getitem__(self, number: int):
        return number, self.samples[number]


def _collate(numbered: list, collate) -> tuple[dict, dict[int, BadRecord]]:
    """A batch, and what was left out of it."""
    batch = collate([sample for _, sample in numbered])
    lost = {number: sample for number, sample in numbered if isinstance(sample, BadRecord)}
    return {key: value for key, value in batch.items() if key not in ("bad_records", "no_label")}, lost


def _loader(args, evaluation: Evaluation) -> DataLoader:
    """This rank's batches; as many on every rank, the last of some without a record."""
    records, size, ranks = len(evaluation.dataset), args.eval_batch_size, args.world_size
    workers = args.dataloader_num_workers
    batches = [list(range(at, min(at + size, records))) for at in range(0, records, size)]
    batches += [[]] * (-len(batches) % ranks)
    return DataLoader(
        _Numbered(evaluation.dataset),
        batch_sampler=batches[args.process_index :: ranks],
        collate_fn=partial(_collate, collate=evaluation.collate),
        num_workers=workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        multiprocessing_context=worker_context(args.dataloader_multiprocessing_context) if workers else None,
        generator=torch.Generator(),  # the training's draws are its own
        worker_init_fn=in_worker(),
    )


def _tell(lost: dict[int, BadRecord], evaluation: Evaluation) -> None:
    """Name the records that are left out, once each."""
    new = sorted({str(record) for record in lost.values()} - evaluation.told)
    for record in new[:LISTED]:
        rank0_print(f"left out of the evaluation: {record}")
    if len(new) > LISTED:
        rank0_print(f"left out of the evaluation: {len(new) - LISTED} more")
    evaluation.told.update(new)


def _exact_match(trainer, evaluation: Evaluation, lost: set[int]) -> dict[str, float]:
    """Of all questions but those about records that are lost: the command's own scores of the model as it is."""
    args, inference = trainer.args, evaluation.inference
    questions = [question for question in evaluation.questions if question.record not in lost]
    if not questions:
        raise LlavaError(f"{args.eval_data_path}: found no question that can be asked, expected some")
    inference.model = inference.loaded.model = trainer.accelerator.unwrap_model(trainer.model)
    answerer = Answerer(
        inference,
        max_new_tokens=args.eval_max_new_tokens,
        batch_size=args.eval_batch_size,
        share=(args.process_index, args.world_size, lambda found: [item for part in gather(found) for item in part]),
        after_batch=partial(_go_on, trainer),
        quiet=args.disable_tqdm or args.process_index > 0,
    )
    with trainer.compute_loss_context_manager():
        result = evaluate(answerer, questions, args.eval_blank_images)
    metrics = {"eval_exact_match": result["exact_match"], "eval_n": result["n"]}
    metrics |= {f"eval_exact_match_{kind}": values["exact_match"] for kind, values in result["by_kind"].items()}
    if "blank_images" in result:
        metrics[f"eval_{BLANK}"] = result["blank_images"]["exact_match"]
    return metrics
