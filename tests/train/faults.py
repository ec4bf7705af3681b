"""Faults that a run is given: changes to its own process, by `tests.support.forks`."""

import itertools
import os
import signal
import threading
import time
from pathlib import Path


def kill_at(moment: str) -> None:
    """SIGKILL at the n-th time that it flushes, renames or removes something, counted from its first save."""
    at_moments(lambda number: number == int(moment) and os.kill(os.getpid(), signal.SIGKILL))


def count_moments(path: str) -> None:
    """Write how many such times there are so far."""
    at_moments(lambda number: Path(path).write_text(str(number + 1)))


def at_moments(do) -> None:
    import shutil

    from llava.train import llava_trainer, saving

    numbers, begun = itertools.count(), []

    def counted(function):
        def wrapper(*args, **kwargs):
            if begun and threading.current_thread() is threading.main_thread():  # not the lock's, which goes by time
                do(next(numbers))
            return function(*args, **kwargs)

        return wrapper

    for module, name in ((os, "fsync"), (os, "rename"), (os, "replace"), (shutil, "rmtree"), (os, "unlink")):
        setattr(module, name, counted(getattr(module, name)))
    save = saving.save_checkpoint

    def begin(*args):
        begun.append(True)
        return save(*args)

    llava_trainer.save_checkpoint = begin


def stand_still(step: str) -> None:
    """Never end this step."""
    from llava.train.llava_trainer import LLaVATrainer

    take = LLaVATrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == int(step):
            print("standing still", flush=True)
        while self.state.global_step == int(step):
            time.sleep(0.05)
        return take(self, *args, **kwargs)

    LLaVATrainer.training_step = training_step


def slow_steps(seconds: str) -> None:
    """Each step takes this much longer."""
    from llava.train.llava_trainer import LLaVATrainer

    take = LLaVATrainer.training_step

    def training_step(self, *args, **kwargs):
        time.sleep(float(seconds))
        return take(self, *args, **kwargs)

    LLaVATrainer.training_step = training_step


def slow_evaluation(seconds: str) -> None:
    """Each batch of an evaluation takes this much longer, and tells of itself."""
    from llava.train import evaluation

    go_on = evaluation._go_on

    def slowly(trainer):
        print("evaluating", flush=True)
        time.sleep(float(seconds))
        go_on(trainer)

    evaluation._go_on = slowly


def slow_loading(seconds: str) -> None:
    """The model takes this long to load, and tells of itself."""
    from llava.families.llava import Llava

    prepare = Llava.prepare

    def slowly(*args, **kwargs):
        print("loading", flush=True)
        time.sleep(float(seconds))
        return prepare(*args, **kwargs)

    Llava.prepare = slowly


def ignore_hangups() -> None:
    """As nohup does."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    slow_steps("0.3")
