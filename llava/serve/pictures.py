"""Where a chat's pictures come from: `llava.inference.pictures`, under the name it had."""

from llava.inference.pictures import *  # noqa: F403
