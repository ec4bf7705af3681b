"""What makes steps faster, or smaller, and leaves their numbers: kernels, compiled blocks, images in chunks."""

from llava.model.compiled_blocks import compile_blocks
from llava.model.liger import apply_liger
from llava.model.vision_chunks import set_micro_batch
from llava.utils import rank0_print


def speed_up(model, training_args) -> None:
    """Set up a model, without adapters yet, as the run's keys say.

    Raises:
        LlavaError: it cannot be.
    """
    set_micro_batch(model, training_args.vision_micro_batch)
    if training_args.torch_compile or training_args.torch_compile_tower:
        whole = training_args.torch_compile
        if whole and training_args.use_liger_kernel:  # PyTorch 2.11 cannot compile the norms of Liger 0.8.5
            rank0_print("torch_compile: beside use_liger_kernel only the vision encoder's blocks are compiled")
            whole = False
        backend, mode = training_args.torch_compile_backend, training_args.torch_compile_mode
        compile_blocks(model, tower_alone=not whole, backend=backend or "inductor", mode=mode)
        training_args.torch_compile = False  # accelerate would compile the model as a whole
        training_args.torch_compile_backend = training_args.torch_compile_mode = None
    if training_args.use_liger_kernel:
        apply_liger(model, training_args.liger_kernel_config)
        training_args.use_liger_kernel = False  # transformers' way would replace the model's forward
