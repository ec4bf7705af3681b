"""Programs of a few lines in processes of their own: what is broken there ends them and not the doctor."""

from __future__ import annotations

import json
import os
import subprocess
import sys

MARK = "\x1e"  # in front of a line that is an answer; everything else that a child prints is dropped

# what a program that tries several things does with each: `attempt` returns what it found, or raises
_EACH = """
import json, sys
for name in sys.argv[1:]:
    print("\\n\\x1e" + json.dumps({"begun": name}), flush=True)
    try:
        answer = {"name": name, "found": attempt(name), "fault": None}
    except BaseException as error:
        text = (str(error).strip().splitlines() or [""])[0]
        answer = {"name": name, "found": None, "fault": f"{type(error).__name__}: {text}"}
    print("\\n\\x1e" + json.dumps(answer), flush=True)
"""
_IMPORT = """
def attempt(name):
    import importlib
    importlib.import_module(name)
"""


def run(program: str, *words: str, seconds: float, **environment: str) -> tuple[list, str]:
    """(answers, why it ended early or "") of a Python program."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "WANDB_MODE": "disabled"} | environment
    command = [sys.executable, "-c", program, *words]
    try:
        done = subprocess.run(command, capture_output=True, timeout=seconds, env=env, stdin=subprocess.DEVNULL)
        out, err, status = done.stdout, done.stderr, done.returncode
    except subprocess.TimeoutExpired as late:
        out, err, status = late.stdout or b"", b"", None
    except OSError as error:
        return [], str(error)
    lines = out.decode(errors="replace").split("\n")
    answers = [json.loads(line[1:]) for line in lines if line.startswith(MARK)]
    if status is None:
        return answers, f"no answer in {seconds:g} seconds"
    if status < 0:
        return answers, f"ended by signal {-status}"
    said = err.decode(errors="replace").strip().splitlines()
    return answers, "" if status == 0 else (said[-1] if said else f"exit status {status}")


def each(program: str, names: list[str], seconds: float, **environment: str) -> dict[str, tuple]:
    """{name: (what it found, why it failed or None)} of a program that defines `attempt(name)`.

    They are tried in one process; where one of them ends it, or hangs, the others are tried in another.
    """
    tried: dict[str, tuple] = {}
    left = list(names)
    while left:
        answers, ended = run(program + _EACH, *left, seconds=seconds, **environment)
        tried |= {a["name"]: (a["found"], a["fault"]) for a in answers if "name" in a}
        begun = [a["begun"] for a in answers if "begun" in a and a["begun"] not in tried]
        if begun:
            tried[begun[-1]] = (None, ended or "it ended Python")
        elif any(name not in tried for name in left):  # not even the first was begun
            tried |= {name: (None, ended or "Python did not start") for name in left if name not in tried}
        left = [name for name in left if name not in tried]
    return tried


def imports(names: list[str], seconds: float) -> dict[str, str | None]:
    """{module: why it cannot be imported, or None}."""
    return {name: fault for name, (_, fault) in each(_IMPORT, names, seconds, **cpu_deepspeed()).items()}


def cpu_deepspeed() -> dict[str, str]:
    """DeepSpeed asks for an accelerator as it is imported."""
    has_driver = any(map(os.path.exists, ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd")))
    return {} if has_driver or os.environ.get("DS_ACCELERATOR") else {"DS_ACCELERATOR": "cpu"}
