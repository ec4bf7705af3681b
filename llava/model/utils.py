"""Upgrading checkpoints of LLaVA's first version, which are not read here."""

from llava.absent import absent

auto_upgrade = absent(
    "llava.model.utils.auto_upgrade", "checkpoints from LLaVA v1 on are read as they are, none is rewritten"
)
