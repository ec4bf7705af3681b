"""LLaVA's entry point for GPUs without flash-attn: `python llava/train/train_xformers.py <flags>`.

xformers is not needed: where `attn_implementation` is not given, the best attention that the machine has is taken,
which without flash-attn is PyTorch's own, as memory-efficient as that of xformers.
"""

from llava.train.train import train
from llava.utils import rank0_print

if __name__ == "__main__":
    rank0_print("note: xformers is not needed: the attention is PyTorch's own, or what attn_implementation says")
    train()
