"""Where a chat's pictures come from: files, and http(s) addresses where the user allows them."""

import io
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass

from llava.errors import LlavaError

TIMEOUT = 15.0  # seconds, for the whole download
MAX_BYTES = 20 * 1024 * 1024
CHUNK = 64 * 1024
SCHEMES = ("http", "https")


@dataclass(frozen=True)
class Picture:
    """A PIL image (RGB), and the path or address that it came from."""

    source: str
    image: object

    @property
    def remote(self) -> bool:
        return is_address(self.source)


def is_address(source: str) -> bool:
    return "://" in source


def split_sources(words: list[str]) -> list[str]:
    """The pictures that `--image-file` names: several words, or one with commas, as LLaVA has it.

    A file whose own name has a comma and an address are taken whole.
    """
    sources = []
    for word in words:
        whole = is_address(word.split(",", 1)[0]) or os.path.exists(word)
        sources += [word] if whole else [part.strip() for part in word.split(",") if part.strip()]
    return sources


def open_picture(source: str, allow_remote: bool = False) -> Picture:
    """The picture at a path or address.

    Raises:
        LlavaError: an address that is not allowed or cannot be had, or something that is no picture.
    """
    from llava.images.reading import load_image

    if not is_address(source):
        return Picture(source, load_image(os.path.expanduser(source)))
    if not allow_remote:
        raise LlavaError(f"image {source}: found an address, expected a file (--allow-remote lets addresses be read)")
    return Picture(source, load_image(Download(source)))


class Download(io.BytesIO):
    """The bytes at an address, as a file; its text is the address, for messages."""

    def __init__(self, address: str):
        self.address = address
        super().__init__(fetch(address))

    def __str__(self) -> str:
        return self.address


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https alone; the standard handler also goes to ftp."""

    def redirect_request(self, request, response, code, message, headers, new):
        check_scheme(new)
        return super().redirect_request(request, response, code, message, headers, new)


def check_scheme(address: str) -> None:
    scheme = urllib.parse.urlsplit(address).scheme.lower()
    if scheme not in SCHEMES:
        raise LlavaError(f"image {address}: found {scheme}://, expected http:// or https://")


def fetch(address: str, timeout: float = TIMEOUT, max_bytes: int = MAX_BYTES) -> bytes:
    """The content of an http(s) address.

    Raises:
        LlavaError: another scheme, no answer within `timeout` seconds in all, more than `max_bytes`, or an error of the
            server.
    """
    check_scheme(address)
    opener = urllib.request.OpenerDirector()  # without the standard handlers of file:// and ftp://
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    deadline = time.monotonic() + timeout
    request = urllib.request.Request(address, headers={"User-Agent": "llava", "Accept": "image/*"})
    chunks, size = [], 0
    try:
        with opener.open(request, timeout=timeout) as response:
            while chunk := response.read1(CHUNK):
                size += len(chunk)
                if size > max_bytes:
                    raise LlavaError(f"image {address}: found more than {max_bytes:,} bytes, expected at most that")
                if time.monotonic() > deadline:
                    raise TimeoutError
                chunks.append(chunk)
    except LlavaError:
        raise
    except TimeoutError:
        raise LlavaError(f"image {address}: found no whole answer within {timeout:g} seconds") from None
    except urllib.error.HTTPError as error:
        raise LlavaError(f"image {address}: the server answered {error.code} ({error.reason})") from None
    except urllib.error.URLError as error:
        raise LlavaError(f"image {address}: cannot be reached ({_one_line(error.reason)})") from None
    except (OSError, ValueError) as error:  # broken connections; addresses that are none
        raise LlavaError(f"image {address}: cannot be read ({_one_line(error)})") from None
    return b"".join(chunks)


def _one_line(error) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
