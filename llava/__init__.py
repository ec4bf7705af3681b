"""Training vision-language models with exchangeable vision towers. Importing this package imports nothing heavy."""

__version__ = "0.1.0"
