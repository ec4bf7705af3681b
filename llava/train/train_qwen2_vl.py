"""Fine-tune Qwen2-VL with adaptive patches: `llava.train.train` by the name that Qwen2-VL's users know."""

from llava.train.train import train

if __name__ == "__main__":
    train()
