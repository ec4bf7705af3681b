"""LLaVA-NeXT's entry point: `python llava/train/train_mem.py <flags>`."""

from llava.train.train import train

if __name__ == "__main__":
    train()
