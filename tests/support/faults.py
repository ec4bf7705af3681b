"""A training run to which a fault happens: `python -m tests.support.faults KIND RANK STEP FLAG...`.

At the beginning of that rank's forward pass in that step the process raises, is refused, or gets a real signal:
`raise`, `refuse` (LlavaError), `kill` (SIGKILL), `stop` (SIGSTOP), `sleep` (its main thread stands still; `sleep-data`
while it reads data), `warn` (each step of each rank warns), `none`.
"""

import os
import signal
import sys
import time
import warnings

from llava.errors import LlavaError


def main(kind: str, rank: str, step: str, *flags: str) -> None:
    from llava.train import llava_trainer
    from llava.train.train import train

    mine = os.environ.get("RANK", "0") == rank
    method = "_get_num_items_in_batch" if kind == "sleep-data" else "training_step"
    original = getattr(llava_trainer.LLaVATrainer, method)

    def faulty(trainer, *args, **kwargs):
        now = trainer.state.global_step + 1
        print(f"rank {os.environ.get('RANK', '0')} pid {os.getpid()} step {now}", flush=True)
        if kind == "warn":
            warnings.warn("something of a library", FutureWarning, stacklevel=1)
        elif mine and now == int(step):
            happen(kind)
        return original(trainer, *args, **kwargs)

    setattr(llava_trainer.LLaVATrainer, method, faulty)
    train(list(flags))


def happen(kind: str) -> None:
    if kind == "raise":
        raise KeyError("what is not there")
    if kind == "refuse":
        raise LlavaError("records.json: found nonsense, expected sense")
    if kind.startswith("sleep"):
        time.sleep(10_000)
    if kind in ("kill", "stop"):
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[kind])


if __name__ == "__main__":
    main(*sys.argv[1:])
