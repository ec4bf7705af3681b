"""What this machine has and lacks for training here: `python -m llava.doctor`. Standard library only, in this process.

Whatever may be broken (PyTorch, flash-attn, DeepSpeed, ...) is imported and tried in child processes with a time limit.
"""
