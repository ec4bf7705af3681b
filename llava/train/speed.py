"""What makes steps faster, or smaller, and leaves their numbers: kernels, compiled blocks, images in chunks."""

from llava.model.compiled_blocks import compile_blocks
from llava.model.liger import apply_liger
from llava.model.vision_chunks import set_micro_batch


def speed_up(model, training_args) -> None:
    """Set up a model, without adapters yet, as the run's keys say.

    Raises:
        LlavaError: it cannot be.
    """
    set_micro_batch(model, training_args.vision_micro_batch)
    if training_args.torch_compile:
        compile_blocks(model, backend=training_args.torch_compile_backend, mode=training_args.torch_compile_mode)
        training_args.torch_compile = False  # accelerate would compile the model as a whole
        training_args.torch_compile_backend = training_args.torch_compile_mode = None
    elif training_args.torch_compile_tower:
        compile_blocks(model, tower_alone=True)
    if training_args.use_liger_kernel:
        apply_liger(model, training_args.liger_kernel_config)
        training_args.use_liger_kernel = False  # transformers' way would replace the model's forward
