"""Configuration: one definition per key (keys.py), from which the YAML schema, the command line and the docs derive."""

from llava.config.resolve import Run, Setting, resolve

__all__ = ["Run", "Setting", "resolve"]
