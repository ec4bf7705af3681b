"""`torch_compile_tower`: the blocks of the vision encoder compiled, each kind once for all numbers and sizes of images.

All blocks of an encoder run the same code on weights of their own, and one graph serves them all; numbers of images and
of patches are symbols in it. PyTorch makes another graph where a batch holds one image alone, and where training
changes to evaluation: a few, however many steps follow.
"""

from transformers.modeling_layers import GradientCheckpointingLayer

from llava.errors import LlavaError


def vision_blocks(model) -> list:
    """The layers of the model's vision encoder: those that gradient checkpointing works on."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer) and {"vision_tower", "visual"} & set(name.split(".")):
            found.append(module)
    return found


def compile_tower(model, backend: str = "inductor") -> int:
    """Compile the blocks of the model's vision encoder, in place: names and weights stay.

    Args:
        backend: of `torch.compile`.

    Returns:
        How many blocks there are.

    Raises:
        LlavaError: a model without a vision encoder.
    """
    blocks = vision_blocks(model)
    if not blocks:
        raise LlavaError(f"torch_compile_tower: {type(model).__name__} has no vision encoder, expected one")
    for block in blocks:
        block.compile(backend=backend, dynamic=True)
    return len(blocks)
