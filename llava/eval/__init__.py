"""Evaluation on LLaVA-format files."""
