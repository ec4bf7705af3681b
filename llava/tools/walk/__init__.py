"""Parts of `python -m llava.tools.explain_image`."""
