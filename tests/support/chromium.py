"""A headless Chromium, driven by its DevTools protocol over two pipes with Python's own library alone."""

import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import time

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",  # tests may run as root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--no-first-run",
)
PATIENCE = 120  # seconds for an answer, on a machine that has much else to do
# Chromium reads commands from descriptor 3 and answers on 4
WIRE = """
import fcntl, os, sys
pipes = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
for place, pipe in zip((3, 4), pipes):
    os.dup2(pipe, place)
os.execv(sys.argv[3], sys.argv[3:])
"""


def binary() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


def dumped(address: str) -> str:
    """The page's elements after its scripts have run."""
    found = subprocess.run(
        [binary(), *FLAGS, "--virtual-time-budget=2000", "--dump-dom", address],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    return found.stdout


class Tab:
    """One page of a browser that lives as long as this object is entered.

    Attributes:
        events: what the browser has told without being asked, in order.
    """

    def __init__(self, profile: str):
        self.profile, self.events, self.number, self.buffer, self.session = profile, [], 0, b"", None

    def __enter__(self):
        theirs, self.out = os.pipe()
        self.into, their_out = os.pipe()
        arguments = [binary(), *FLAGS, f"--user-data-dir={self.profile}", "--remote-debugging-pipe", "about:blank"]
        command = [sys.executable, "-c", WIRE, str(theirs), str(their_out), *arguments]
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(command, pass_fds=(theirs, their_out), stdout=quiet, stderr=quiet)
        os.close(theirs)
        os.close(their_out)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for part in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{part}.enable")
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):
            os.close(self.out)  # at which it ends
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.into)

    def call(self, method: str, **parameters) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.out, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + PATIENCE
        while True:
            answer = self._next(until)
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def _next(self, until: float) -> dict:
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.into], [], [], max(0, until - time.monotonic()))
            more = os.read(self.into, 1 << 16) if ready else b""
            assert more, "Chromium has ended" if ready else "Chromium does not answer"
            self.buffer += more
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def open(self, address: str) -> None:
        """Returns when the page has loaded."""
        self.call("Page.navigate", url=address)
        until = time.monotonic() + PATIENCE
        while self.run("document.readyState + location.href.startsWith('file:')") != "completetrue":
            assert time.monotonic() < until, f"{address} does not load"
            time.sleep(0.05)

    def run(self, script: str):
        """The value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, key: str, code: int) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def narrow(self, width: int, height: int = 800) -> None:
        """Lays the page out as a telephone of that width does."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=True)
