"""The packed rows of a training run."""

from dataclasses import dataclass
from functools import partial

import numpy as np

from llava.data.packing import BufferPacking, StepPacking, cost
from llava.errors import LlavaError
from llava.utils import rank0_print


@dataclass(frozen=True)
class Packing:
    """How a run packs.

    Attributes:
        scope: "step" or "buffer".
        length: most tokens of a row.
        buffer, seed: of pack_scope buffer.
        tokens, costs: int32 and float [records], of each record's sample, as long as it can be.
    """

    scope: str
    length: int
    buffer: int
    seed: int
    tokens: np.ndarray
    costs: np.ndarray

    @classmethod
    def of(cls, dataset, lengths, data_args, training_args, config) -> "Packing":
        """As the run's keys say.

        Args:
            lengths: `llava.data.lengths.record_lengths` of the data set's records, on every rank alike.

        Raises:
            LlavaError: a row has no room for the longest sample.
        """
        limit, length = training_args.model_max_length, data_args.pack_length
        tokens, patches, exact = lengths
        tokens = np.minimum(tokens, limit).astype(np.int32)
        at, mean, batch = int(tokens.argmax()), tokens.mean(), 1
        longest = tokens[at]
        if length is not None and length < longest:
            raise LlavaError(
                f"{dataset.records.describe(at)}: its sample has {longest} tokens, which is more than pack_length "
                f"{length}; expected a pack_length of at least {longest}, or a shorter model_max_length"
            )
        if data_args.pack_scope == "step":
            batch = training_args.train_batch_size
        if length is None:
            length = limit * batch  # into which the samples of any step fit
        elif length < mean * batch:
            raise LlavaError(
                f"pack_length: found {length}, but with pack_scope step a row has {batch} samples on average "
                f"(per_device_train_batch_size), and they have {mean * batch:.0f} tokens; expected a longer "
                "pack_length, a smaller batch with more gradient_accumulation_steps, or pack_scope buffer"
            )
        seed = data_args.pack_seed
        if seed is None:
            seed = training_args.seed if training_args.data_seed is None else training_args.data_seed
        rank0_print(
            f"packing: {len(tokens):,} samples of {mean:,.0f} tokens on average and {longest:,} at most"
            + ("" if exact.all() else "; where the media decide, the most that there can be")
        )
        costs = cost(tokens.astype(float), patches.astype(float), config)
        return cls(data_args.pack_scope, length, data_args.pack_buffer, seed, tokens, costs)

    def batches(self, sampler, args) -> StepPacking | BufferPacking:
        """A data loader's batches, in the order that a sampler gives; `args` are the run's `TrainingArguments`."""
        rows = args.gradient_accumulation_steps * args.world_size
        if self.scope == "buffer":
            options = {"pack_length": self.length, "buffer": self.buffer, "seed": self.seed}
            batches = BufferPacking(sampler, self.tokens, rows=rows, **options)
            steps = len(batches) // rows
            rank0_print(
                f"packing: {len(batches):,} rows of at most {self.length:,} tokens, "
                f"{self.tokens.sum() / (len(batches) * self.length):.1%} filled; a step has "
                f"{len(self.tokens) / steps:.1f} samples on average, where padded ones would have "
                f"{args.train_batch_size * rows}"
            )
            return batches
        options = {"samples": rows * args.train_batch_size, "drop_last": args.dataloader_drop_last}
        return StepPacking(sampler, self.tokens, self.costs, rows=rows, pack_length=self.length, **options)

    def loader(self, dataset, sampler, collate, args):
        """The data loader, before accelerate deals its batches out to the ranks."""
        from torch.utils.data import DataLoader
        from transformers.trainer_utils import seed_worker

        workers = args.dataloader_num_workers
        return DataLoader(
            dataset,
            batch_sampler=self.batches(sampler, args),
            collate_fn=collate,
            num_workers=workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=partial(seed_worker, num_workers=workers, rank=args.process_index),
        )
