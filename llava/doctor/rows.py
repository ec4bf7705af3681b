"""One line of the report, and what must not be in it."""

from __future__ import annotations

import os
import re
import socket
from dataclasses import asdict, dataclass

OK, MISSING, BROKEN, NOTE = "ok", "missing", "broken", "note"


@dataclass
class Row:
    """One thing that was looked at.

    Attributes:
        name: what.
        status: ok; missing; broken, which a wrong version is too; note, for what is worth knowing and no fault.
        found: what there is, in a few words.
        todo: what to do about it; empty where there is nothing to be done.
        needed: whether a run on the CPU cannot start without it.
    """

    name: str
    status: str
    found: str
    todo: str = ""
    needed: bool = False

    @property
    def stops(self) -> bool:
        """Whether no run can start."""
        return self.needed and self.status in (MISSING, BROKEN)

    def public(self) -> dict:
        """Its values without what is private."""
        return {key: private(value) if isinstance(value, str) else value for key, value in asdict(self).items()}


_SECRETS = re.compile(r"\b(hf_|sk-|ghp_|github_pat_|wandb_v1_)[A-Za-z0-9_-]{8,}")
_LOGIN = re.compile(r"(\w+://)[^/@\s]+@")
_HOMES = re.compile(r"(/home|/Users)/[^/\s:'\",;)]+")


def private(text: str) -> str:
    """A text in one line, without home folders, names of the user and the machine, tokens and logins."""
    text = " ".join(text.split())
    text = _LOGIN.sub(r"\1", _SECRETS.sub("(secret)", text))
    home = os.path.expanduser("~")
    for folder in sorted({home, os.path.realpath(home)}, key=len, reverse=True):
        if len(folder) > 1:
            text = re.sub(rf"{re.escape(folder)}(?![\w.-])", "~", text)
    text = _HOMES.sub("~", text)
    for name, instead in ((_user(), "USER"), (socket.gethostname(), "HOST")):
        if len(name) > 2 and name not in ("root", "localhost"):
            text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", instead, text)
    return text


def _user() -> str:
    return os.environ.get("USER") or os.environ.get("LOGNAME") or os.path.basename(os.path.expanduser("~"))


def gibibytes(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count < 100 * 2**30 else f"{count / 2**30:.0f} GiB"
