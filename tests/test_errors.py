"""How programs end: faults in one line, and quietly where nobody reads what they print."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STARTED_BY_PATH = {"llava/tools/vit/reload_hub_folder.py"}  # which must run without this project


def unread(words: list[str], both: bool = False) -> tuple[int, str]:
    """(exit status, stderr) of a Python program whose stdout, or both outputs, nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    try:
        stderr = writer if both else subprocess.PIPE
        done = subprocess.run([sys.executable, *words], stdout=writer, stderr=stderr, text=True, env=env, timeout=60)
    finally:
        os.close(writer)
    return done.returncode, done.stderr or ""


def program(body: str) -> list[str]:
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    head = "import os, sys\nfrom llava.errors import LlavaError, report_errors\n@report_errors\ndef main():\n"
    return ["-c", f"{head}{lines}\nsys.exit(main())"]


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("print('short')", 0),
        ("print('short')\nreturn 3", 3),
        ("print('short')\nsys.exit(4)", 4),
        ("import argparse\nargparse.ArgumentParser().parse_args(['--help'])", 0),
        ("while True:\n    print('long')", 141),
        ("print('said at once', flush=True)", 141),
        ("print('short')\nraise LlavaError('a fault')", 2),
    ],
)
def test_output_that_nobody_reads_ends_a_program_quietly(body, status, both):
    found, stderr = unread(program(body), both)
    assert found == status or (both and found == 141)
    assert stderr in (["", "error: a fault\n"] if "a fault" in body else [""])


def test_another_broken_pipe_is_a_fault():
    """Of a process that this one talks to, say."""
    body = "end, other = os.pipe()\nos.close(end)\nos.write(other, b'x')"
    done = subprocess.run([sys.executable, *program(body)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "BrokenPipeError" in done.stderr


@pytest.mark.parametrize(
    "words",
    [["-m", "llava.config", "table"], ["-m", "llava.tools.towers", "--help"], ["-m", "llava.train.train", "--help"]],
)
def test_commands_end_quietly(words):
    status, stderr = unread(words)
    assert status in (0, 141) and not stderr


def test_every_command_ends_so():
    """A program's main is decorated, or calls one that is."""
    found = [path for path in (ROOT / "llava").rglob("*.py") if '__name__ == "__main__"' in path.read_text()]
    assert len(found) > 20
    for path in found:
        where, text = str(path.relative_to(ROOT)), path.read_text()
        facade = re.search(r"from llava\.[\w.]+ import (main|train)$| = absent_command\(", text, re.MULTILINE)
        assert "report_errors" in text or facade or where in STARTED_BY_PATH, where
