"""Where a chat's pictures come from: see `llava.inference.pictures`."""

from llava.inference.pictures import (
    CHUNK,
    MAX_BYTES,
    SCHEMES,
    TIMEOUT,
    Download,
    Picture,
    check_scheme,
    fetch,
    is_address,
    open_picture,
    split_sources,
)

__all__ = [
    *("CHUNK", "MAX_BYTES", "SCHEMES", "TIMEOUT", "Download", "Picture"),
    *("check_scheme", "fetch", "is_address", "open_picture", "split_sources"),
]
