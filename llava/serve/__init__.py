"""Talking to a model: `python -m llava.serve.cli`."""
