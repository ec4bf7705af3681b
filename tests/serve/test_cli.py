"""`python -m llava.serve.cli` as its users run it: in a pipe, and at a terminal."""

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from llava.data.records import load_records
from llava.data.validate import validate_records
from llava.inference.engine import Inference
from llava.serve.chat import Chat
from llava.serve.cli import build_parser, main, sampling
from tests.serve import checkpoints
from tests.serve.test_pictures import address, no_proxy  # noqa: F401  (fixtures)

NEW = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli")
    for name, size in (("a.png", (50, 30)), ("b.png", (20, 60))):
        Image.linear_gradient("L").resize(size).convert("RGB").save(path / name)
    return path


@pytest.fixture(scope="module")
def checkpoint(folder):
    return checkpoints.save(folder)


@pytest.fixture(scope="module")
def expected(checkpoint, folder):
    """Answers of a session held in this process: a.png, then b.png."""
    chat = Chat(Inference.load(checkpoint, device="cpu"), max_new_tokens=NEW, do_sample=False)
    chat.add_picture(str(folder / "a.png"))
    answers = [chat.ask("What is shown?")]
    chat.add_picture(str(folder / "b.png"))
    answers.append(chat.ask("And here?"))
    chat.clear()
    return [*answers, chat.ask("Who are you?")]


def command(checkpoint, *flags):
    return [
        *(sys.executable, "-m", "llava.serve.cli", "--model-path", checkpoint),
        *("--temperature", "0", "--max-new-tokens", str(NEW), *flags),
    ]


def test_in_a_pipe(checkpoint, folder, expected, address):  # noqa: F811
    """Answers alone on stdout, one after the other; faults are one line each on stderr, and the session goes on."""
    saved = folder / "talk.json"
    lines = [
        "What is shown?",
        "",
        f"/image {folder / 'gone.png'}",
        f"/image {checkpoint}/config.json",
        f"/image {folder / 'b.png'}",
        "And here?",
        f"/save {saved}",
        "/clear",
        "/nonsense",
        "/image",
        "Who are you?",
        f"/image {address}/a.png",
        "Is <image> red?",
        f"/image {address}/page",
        "/quit",
        "never asked",
    ]
    flags = ["--image-file", str(folder / "a.png"), "--allow-remote"]
    done = subprocess.run(command(checkpoint, *flags), input="\n".join(lines), capture_output=True, text=True)
    assert done.returncode == 0
    out = done.stdout
    start = "".join(f"{answer}\n" for answer in expected)
    assert out.startswith(start) and len(out) > len(start) and "USER" not in out and "loading" not in out
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    said = ("no such file", "cannot be read", "/nonsense: no such command", "expected /image PATH", "/page")
    assert len(errors) == len(said)
    assert all(text in line for text, line in zip(said, errors, strict=True)), errors
    records = load_records(str(saved))
    validate_records(records, version="qwen_1_5", image_folder=str(folder))
    assert records[0]["image"] == ["a.png", "b.png"]
    assert [turn["value"] for turn in records[0]["conversations"]][1::2] == expected[:2]
    assert json.loads(saved.read_text())[0]["conversations"][0]["value"] == "<image>\nWhat is shown?"


class Person:
    """The other end of a pseudo-terminal."""

    def __init__(self, words):
        self.end, terminal = pty.openpty()
        environment = {**os.environ, "TERM": "dumb"}
        self.process = subprocess.Popen(
            words, stdin=terminal, stdout=terminal, stderr=terminal, env=environment, start_new_session=True,
            preexec_fn=_own_terminal,
        )  # fmt: skip
        os.close(terminal)
        self.seen = ""

    def read_until(self, pattern, limit=60.0):
        """What comes up to the end of a match of `pattern`."""
        deadline = time.monotonic() + limit
        while not (found := re.search(pattern, self.seen, re.DOTALL)):
            ready, _, _ = select.select([self.end], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"no {pattern!r} in {self.seen!r}"
            try:
                data = os.read(self.end, 4096)
            except OSError:  # the terminal's other side is closed
                data = b""
            assert data, f"ended without {pattern!r}: {self.seen!r}"
            self.seen += data.decode(errors="replace").replace("\r\n", "\n")
        part, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return part

    def write(self, text):
        os.write(self.end, text.encode())

    def interrupt_until(self, pattern):
        """Ctrl-C at the prompt, again where readline was not listening yet."""
        for _ in range(10):
            self.write("\x03")
            try:
                self.read_until(pattern, limit=5.0)
                return
            except AssertionError as error:
                last = error
        raise AssertionError(f"after ten interrupts (status {self.process.poll()}): {last}")

    def end_input(self):
        """Ctrl-D at the prompt, again where readline was not listening yet; the status the program ends with."""
        for _ in range(10):
            with contextlib.suppress(OSError):  # it has ended
                self.write("\x04")
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self.process.wait(timeout=5)
        raise AssertionError("runs on after ten times Ctrl-D")


def _own_terminal():
    """Make the pseudo-terminal the process's own, so that Ctrl-C reaches it, and is heeded.

    A shell starts its background jobs, such as these tests may be one of, with Ctrl-C ignored.
    """
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_at_a_terminal(checkpoint, folder, expected):
    """Prompts, streaming, Ctrl-C during an answer and at the prompt, and Ctrl-D."""
    flags = ["--image-file", str(folder / "a.png"), "--max-new-tokens", "3000"]
    person = Person(command(checkpoint, *flags))
    try:
        opening = person.read_until("USER: ")
        assert "a.png: goes with the first message" in opening and "/help lists" in opening
        person.write("What is shown?\n")
        begun = person.read_until("ASSISTANT: .{5}")
        person.write("\x03")
        answer = (begun.rsplit("ASSISTANT: ", 1)[1] + person.read_until("\nUSER: ")).replace("^C", "")
        assert answer.startswith(visible(expected[0])[:5]) and len(answer) < 9000
        assert person.process.poll() is None
        person.write("/clear\n")
        assert "forgotten" in person.read_until("USER: ")
        person.write(f"/image {folder / 'gone.png'}\n")
        assert "no such file" in person.read_until("USER: ")
        person.write(f"/image {folder / 'b.png'}\n")
        assert "20 x 60 pixels, goes with the next message" in person.read_until("USER: ")
        person.write("/help\n")
        assert "/save FILE" in person.read_until("USER: ")
        person.interrupt_until("/quit or Ctrl-D ends")
        person.read_until("USER: ")
        assert person.end_input() == 0
    finally:
        if person.process.poll() is None:
            person.process.kill()
            person.process.wait()
        os.close(person.end)


def visible(text):
    """As a terminal is shown it: without control characters."""
    return "".join(c for c in text if c.isprintable())


# --- what is refused, before a model is loaded ---


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--temperature", "-1"], "--temperature"),
        (["--top-p", "1.5"], "--top-p"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["--conv-mode", "qwen_15"], "did you mean 'qwen_1_5'"),
        (["--device", "toaster"], "--device"),
        (["--device", "cuda"], "no GPU"),
        (["--dtype", "float17"], "float17"),
        (["--image-file", "gone.png"], "image gone.png: no such file"),
        (["--image-file", "http://127.0.0.1:1/a.png"], "--allow-remote"),
        (["--image-file", "http://127.0.0.1:1/a.png", "--allow-remote"], "cannot be reached"),
        (["--load-4bit"], "bitsandbytes"),
        (["--model-path", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_faults_at_the_start_are_one_line(checkpoint, flags, said, capsys, monkeypatch):
    monkeypatch.setattr("transformers.utils.is_bitsandbytes_available", lambda: False)
    with pytest.raises(SystemExit) as caught:
        main(["--model-path", checkpoint, *flags])
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert caught.value.code == 2 and len(errors) == 1 and said in errors[0] and captured.out == ""


def test_a_folder_that_is_no_model(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--model-path", str(tmp_path)])
    assert caught.value.code == 2 and "no config.json: the folder is empty" in capsys.readouterr().err


def test_sampling_options():
    def options(*flags):
        return sampling(build_parser().parse_args(["--model-path", "x", *flags]))

    assert options() == {"do_sample": True, "temperature": 0.2}
    assert options("--temperature", "1", "--top-p", "0.9") == {"do_sample": True, "temperature": 1.0, "top_p": 0.9}
    assert options("--temperature", "0", "--top-p", "0.9")["do_sample"] is False


def test_a_seed_repeats_an_answer(checkpoint, monkeypatch, capsys):
    import io

    answers = []
    for seed in ("1", "1", "2"):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Tell me.\n"))
        assert main(["--model-path", checkpoint, "--seed", seed, "--temperature", "2", "--max-new-tokens", "8"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2] and answers[0].strip()


def test_help_needs_no_torch():
    code = "import sys, llava.serve.cli as m; m.build_parser().format_help(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
