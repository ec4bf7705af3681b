"""Pictures from files and from addresses: a local server, and everything that is refused."""

import contextlib
import io
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from llava.errors import LlavaError
from llava.serve import pictures
from llava.serve.pictures import fetch, open_picture, split_sources


def png() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (30, 20), (200, 10, 10)).save(data, "PNG")
    return data.getvalue()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        redirects = {"/moved": "/a.png", "/away": "ftp://127.0.0.1/a.png", "/inside": "file:///etc/hostname"}
        if self.path in redirects:
            self.send_response(302)
            self.send_header("Location", redirects[self.path])
            self.end_headers()
            return
        if self.path == "/gone":
            self.send_error(404)
            return
        self.send_response(200)
        self.end_headers()
        if self.path == "/slow":
            with contextlib.suppress(OSError):  # the reader goes
                for _ in range(20):
                    self.wfile.write(b".")
                    time.sleep(0.1)
        else:
            self.wfile.write(b"<html></html>" if self.path == "/page" else png())

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_only_where_it_is_allowed(address):
    for source in (f"{address}/a.png", "ftp://127.0.0.1/a.png", "file:///etc/hostname"):
        with pytest.raises(LlavaError, match="--allow-remote"):
            open_picture(source)
    for path in ("/a.png", "/moved"):
        picture = open_picture(address + path, allow_remote=True)
        assert picture.image.size == (30, 20) and picture.remote and picture.image.getpixel((1, 1)) == (200, 10, 10)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/gone", "the server answered 404"),
        ("/page", "cannot be read"),
        ("/away", "found ftp://, expected http"),
        ("/inside", "302"),
    ],
)
def test_bad_answers(address, path, said):
    with pytest.raises(LlavaError, match=said) as caught:
        open_picture(address + path, allow_remote=True)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("image ")


@pytest.mark.parametrize("source", ["file:///etc/hostname", "ftp://127.0.0.1/a.png", "data://x"])
def test_other_schemes_are_refused(source):
    with pytest.raises(LlavaError, match="expected http:// or https://"):
        open_picture(source, allow_remote=True)


def test_limits(address):
    with pytest.raises(LlavaError, match="more than 50 bytes"):
        fetch(f"{address}/a.png", max_bytes=50)
    with pytest.raises(LlavaError, match=r"within 0\.4 seconds"):
        fetch(f"{address}/slow", timeout=0.4)  # every byte of it comes in time, all of them do not
    with pytest.raises(LlavaError, match="cannot be reached"):
        fetch("http://127.0.0.1:1/a.png")
    with pytest.raises(LlavaError, match="cannot be"):
        fetch("http://")


def test_sources(tmp_path):
    odd = tmp_path / "a,b.png"
    odd.write_bytes(png())
    assert split_sources(["a.png", "b.png,c.png", "http://x/a,b.png"]) == [
        "a.png",
        "b.png",
        "c.png",
        "http://x/a,b.png",
    ]
    assert split_sources([str(odd)]) == [str(odd)] and open_picture(str(odd)).image.size == (30, 20)
    assert split_sources(["a.png, ,"]) == ["a.png"]
    assert pictures.MAX_BYTES >= 10_000_000 and pictures.TIMEOUT <= 60


def test_files_that_are_none(tmp_path):
    (tmp_path / "p.png").write_text("text")
    for path in (tmp_path / "p.png", tmp_path / "gone.png"):
        with pytest.raises(LlavaError, match="image "):
            open_picture(str(path))
