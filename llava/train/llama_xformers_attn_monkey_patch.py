"""LLaVA's patch of Llama's attention, which nothing needs any more."""

from llava.utils import rank0_print


def replace_llama_attn_with_xformers_attn() -> None:
    """Nothing but one line: transformers has the choice of attention, `attn_implementation`."""
    rank0_print("note: Llama is not patched for xformers: attn_implementation chooses the attention")
