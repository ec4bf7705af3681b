"""Where a chat's pictures come from: `llava.inference.pictures`, under the name it had."""

from llava.inference.pictures import (  # noqa: F401
    MAX_BYTES,
    TIMEOUT,
    Download,
    Picture,
    fetch,
    is_address,
    open_picture,
    split_sources,
)
