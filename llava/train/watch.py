"""Each rank tells the others where it is, and finds out which of them stands still, has failed or is gone.

What a rank tells (its beat) lies in the run's key-value store, on a connection of its own. Two threads of each rank:
`_Teller` beats and reads, `Watch` ends a process whose main thread waits for a rank that does not come, also where no
exception reaches it: NCCL ends the process itself, with pages of text.
"""

import contextlib
import hashlib
import json
import os
import socket
import threading
import time
from dataclasses import dataclass

from llava.errors import LlavaError, LostRank
from llava.train import phases
from llava.train.launcher import end_process, gone, one_line, process, tell_launcher

_GRACE = 5.0  # seconds in which a rank's own exception comes after another rank has failed
_OF_GROUPS = ("gloo", "nccl", "closed by peer", "reset by peer", "broken pipe", "pair closure", "timeout", "timed out")
_END = "end of the run"
_runs = 0  # of this process: their keys differ, as one store may serve several


@contextlib.contextmanager
def watched(timeout: int, once=None):
    """Watch over the other ranks while the body trains; `timeout`: `ddp_timeout`, in seconds; `once`: of the warnings.

    Raises:
        LostRank: in place of what PyTorch says where another rank is why the body failed.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield
        return
    phases.enter("start", 0)
    watch = Watch(timeout, int(os.environ["RANK"]), world)
    watch.start()
    if once is not None:
        watch.teller.asked.append((lambda store: once.meet(watch.is_first), [], threading.Event()))
    try:
        yield
    except Exception as error:
        line = watch.explain(error)
        if line is None:
            watch.fail(error)
            raise
        raise LostRank(line if watch.first_to_tell() else "") from None
    finally:
        watch.stop()


@dataclass
class Peer:
    """What another rank has told, since when (`time.monotonic()` here) it has told nothing new, and the last look."""

    beat: dict
    since: float
    seen: float

    def where(self) -> str:
        return phases.place(self.beat["phase"], self.beat["step"])

    def gone(self) -> str | None:
        """How it has ended, or is stopped, if this machine can tell."""
        if self.beat["host"] != socket.gethostname():
            return None
        found = process(self.beat["pid"])
        if found is None or found.start != self.beat["start"]:
            return "is gone"
        return "is stopped by a signal" if found.state in "tT" else None


class _Teller(threading.Thread):
    """The one thread that uses the store, which may not answer: rank 0 may hold it, and stand still itself."""

    def __init__(self, timeout: float, rank: int, world: int, key: str):
        super().__init__(name="beat", daemon=True)
        self.rank, self.world, self.timeout, self.key = rank, world, timeout, key
        self.soonest = max(0.25, world / 100)  # seconds between two beats, so that many ranks are not too many
        self.every = max(self.soonest, min(10.0, max(1.0, timeout / 20)))
        self.peers: dict[int, Peer] = {}
        self.failed: str | None = None  # which rank has failed, and how
        self.failed_at = 0.0
        self.asked_at: float | None = None  # when it was asked what it has not answered
        self.asked: list = []  # (what to do with the store, where its answer goes, the event that it is there)
        self.looking, self.store = False, None
        me = process(os.getpid())
        self.owner = {"host": socket.gethostname(), "pid": os.getpid(), "start": me.start if me else ""}
        self.ended, self._wake = False, threading.Event()

    def run(self) -> None:
        while not self.ended and not gone():  # the launcher may hold the store: this process is about to end
            try:
                self.store = self.store or _own_connection()
                if self.store is not None:
                    self.asked_at = time.monotonic()
                    self._beat(self.store)
                    self.asked_at = None
            except RuntimeError:  # it is gone for good, as `asked_at` tells; PyTorch prints a page at each try
                return
            self._wake.wait(self.soonest)
            if not self._wake.is_set():
                phases.changed.wait(0.5 if self.looking else self.every)
            phases.changed.clear()
            self._wake.clear()

    def wake(self) -> None:
        self._wake.set()
        phases.changed.set()

    def ask(self, function, seconds: float = 3.0):
        """What `function` makes of the store; None where it has not answered."""
        if threading.current_thread() is self:
            return function(self.store)
        answer, there = [], threading.Event()
        self.asked.append((function, answer, there))
        self.wake()
        there.wait(seconds if self.store is not None else 0)
        return answer[0] if answer else None

    def _beat(self, store) -> None:
        now = phases.current()
        beat = {"phase": now.name, "step": now.step, "seconds": round(now.seconds, 1), "time": time.time()}
        store.set(f"{self.key}/{self.rank}", json.dumps(beat | self.owner))
        while self.asked:
            function, answer, there = self.asked.pop(0)
            answer.append(function(store))
            there.set()
        if self.failed is None and store.check([f"{self.key}/failed"]):
            self.failed, self.failed_at = store.get(f"{self.key}/failed").decode(), time.monotonic()
        if self.looking or now.seconds > self.timeout / 4:
            self._look(store)

    def _look(self, store) -> None:
        for rank in range(self.world):
            key = f"{self.key}/{rank}"
            if rank == self.rank or not store.check([key]):
                continue
            beat, known, now = json.loads(store.get(key)), self.peers.get(rank), time.monotonic()
            self.peers[rank] = Peer(beat, known.since if known and known.beat == beat else now, now)


class Watch(threading.Thread):
    """Looks after one rank of a run.

    Args:
        timeout: seconds that a rank may wait for another.
        rank, world: of this process, and how many there are.
    """

    def __init__(self, timeout: float, rank: int, world: int):
        global _runs
        super().__init__(name="watch", daemon=True)
        _runs += 1
        self.timeout, self.rank = timeout, rank
        self.key = f"llava/{_runs}"
        self.teller = _Teller(timeout, rank, world, self.key)
        self.ended = threading.Event()

    def start(self) -> None:
        self.teller.start()
        super().start()

    def stop(self) -> None:
        phases.enter(_END, 0)
        self.teller.ask(lambda store: None)  # it beats before
        self.teller.ended = True
        self.ended.set()
        self.teller.wake()

    def run(self) -> None:
        while not self.ended.wait(1.0):
            line = self._verdict()
            if line and not self.ended.is_set():
                self._blame(line)
                told = f"error: {line}" if self.first_to_tell() else None
                tell_launcher(LostRank(line))
                end_process(1, told)

    def fail(self, error: Exception) -> None:
        """Tell the other ranks that this one has failed."""
        why = one_line(error).removeprefix("error: ")
        self._blame(f"rank {self.rank} failed in the {phases.current()} ({why})")
        self.first_to_tell()

    def _blame(self, line: str) -> None:
        """What is found out first is the reason for all ranks: those that end because of it are none."""
        self.teller.ask(lambda store: store.compare_set(f"{self.key}/failed", "", line))

    def is_first(self, what: str) -> bool | None:
        """Whether no other rank has asked this before; None: the store does not answer."""
        key = f"{self.key}/{hashlib.sha1(what.encode()).hexdigest()}"
        times = self.teller.ask(lambda store: store.add(key, 1))
        return None if times is None else times == 1

    def first_to_tell(self) -> bool:
        """One rank says what has happened; where none can know, each does."""
        return self.is_first("why the run ended") is not False

    def explain(self, error: Exception) -> str | None:
        """Which rank is to blame that this one failed, in one line; None: it is this one."""
        if isinstance(error, LlavaError) or not of_a_group(error):
            return None
        self.teller.looking = True
        self.teller.wake()
        until = time.monotonic() + self.teller.every + 3
        while not (found := self._culprits(silent_for=self.teller.every + 2)) and time.monotonic() < until:
            time.sleep(0.1)
        here, words = phases.current(), " ".join(str(error).split())
        if found:
            self._blame(found)
            return f"{found}; rank {self.rank} waited for it in the {here}, {here.seconds:.0f} s"
        if here.seconds > self.timeout * 0.8:
            waited = f"rank {self.rank} waited {here.seconds:.0f} s in the {here}"
            return f"{waited}, and no rank is known to stand still: {words[:200]}"
        return None

    def _verdict(self) -> str | None:
        """Why this process should end, whatever its main thread does."""
        teller, here = self.teller, phases.current()
        if teller.failed:
            late = time.monotonic() - teller.failed_at > _GRACE
            return f"{teller.failed}; rank {self.rank} was in the {here}" if late else None
        patience, silent_for = _limits(self.timeout)
        if here.seconds < patience:
            return None
        found = self._culprits(silent_for)
        return found and f"{found}; rank {self.rank} has waited for it in the {here}, {here.seconds:.0f} s"

    def _culprits(self, silent_for: float) -> str:
        """The ranks to blame, and for what; "" where none is known."""
        teller, now, here = self.teller, time.monotonic(), phases.current()
        if teller.failed:
            return teller.failed
        peers = {rank: peer for rank, peer in teller.peers.items() if peer.beat["phase"] != _END}
        ended = {rank: how for rank, peer in peers.items() if (how := peer.gone())}
        if ended:
            return "; ".join(_named(rank, peers[rank], f"{how}, last heard in") for rank, how in ended.items())
        if teller.asked_at is not None and now - teller.asked_at > silent_for:
            agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            holder = "the launcher on {MASTER_ADDR}".format(**os.environ) if agent else "rank 0"
            return f"{holder}, which holds the run's store, no longer answers"
        silent = [rank for rank, peer in peers.items() if peer.seen - peer.since > silent_for]
        if silent:
            return "; ".join(_named(rank, peers[rank], "no longer answers, last heard in") for rank in silent)
        elsewhere = [
            rank
            for rank, peer in peers.items()
            if (peer.beat["phase"], peer.beat["step"]) != here[:2]
            and peer.beat["seconds"] > here.seconds - 1
            and here.seconds > self.timeout * 0.8
        ]
        return "; ".join(
            _named(rank, peers[rank], f"has been for {peers[rank].beat['seconds']:.0f} s in") for rank in elsewhere
        )


def of_a_group(error: Exception) -> bool:
    """Whether it was raised by communication between ranks."""
    import torch

    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _OF_GROUPS)
    )


def _named(rank: int, peer: Peer, how: str) -> str:
    return f"rank {rank} (pid {peer.beat['pid']} on {peer.beat['host']}) {how} the {peer.where()}"


def _limits(timeout: float) -> tuple[float, float]:
    """Seconds that this process waits before it is ended from here, and that another is silent to be at fault.

    NCCL would end the process soon after `timeout`, with pages of text; gloo raises an exception, which comes first.
    """
    import torch

    nccl = torch.distributed.is_initialized() and "nccl" in torch.distributed.get_backend()
    return (timeout * 0.9, timeout * 0.5) if nccl else (timeout + _GRACE, timeout)


def _own_connection():
    """One to the store that the ranks met in, so that no other thread waits for this one; None before they met."""
    import torch

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    return torch.distributed.distributed_c10d._get_default_store().clone()
