"""Drawing for `python -m llava.tools.visualize_patches`."""
