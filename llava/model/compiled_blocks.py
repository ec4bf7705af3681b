"""`torch_compile` and `torch_compile_tower`: the blocks of a model compiled, each kind once for all batches.

All blocks of an encoder, or of a language model, run the same code on weights of their own, and one graph serves them
all; numbers of images, patches and tokens are symbols in it. PyTorch makes another graph where a batch holds one image
alone, and where training changes to evaluation: a few, however many steps follow. Between the blocks lies what is
planned on the host from the tokens and pictures of a batch. Compiled with them, a new number of pictures would be a new
program, and after eight of those PyTorch gives up.
"""

from transformers.modeling_layers import GradientCheckpointingLayer

from llava.errors import LlavaError
from llava.model.vision_blocks import find_blocks


def model_blocks(model, tower_alone: bool = False) -> list:
    """The layers of the model, or of its vision encoder: those that gradient checkpointing works on, and of an encoder
    without such what `find_blocks` takes for its blocks."""
    found, without_tower = [], True
    for name, module in model.named_modules():
        in_tower = bool({"vision_tower", "visual"} & set(name.split(".")))
        if isinstance(module, GradientCheckpointingLayer) and (in_tower or not tower_alone):
            found.append(module)
            without_tower = without_tower and not in_tower
    tower = model.get_vision_tower() if hasattr(model, "get_vision_tower") else None
    if tower is not None and without_tower:  # an encoder of a user's own
        found += find_blocks(tower.vision_tower)
    return found


def compile_blocks(model, *, tower_alone: bool = False, backend: str = "inductor", mode: str | None = None) -> int:
    """Compile the blocks of the model, in place: names and weights stay.

    Args:
        tower_alone: those of its vision encoder and no others.
        backend, mode: of `torch.compile`.

    Returns:
        How many blocks there are.

    Raises:
        LlavaError: the vision encoder's are asked for, and the model has no encoder, or one without blocks.
    """
    blocks = model_blocks(model, tower_alone)
    tower = model.get_vision_tower() if hasattr(model, "get_vision_tower") else None
    if not blocks and tower is not None:
        raise LlavaError(
            f"torch_compile_tower: the vision encoder {tower.vision_tower_name} has no list of modules of one class "
            "that would be its blocks; expected such, or torch_compile_tower: false"
        )
    if not blocks:
        raise LlavaError(f"torch_compile_tower: {type(model).__name__} has no vision encoder, expected one")
    for block in blocks:
        block.compile(backend=backend, mode=mode, dynamic=True)
    return len(blocks)
