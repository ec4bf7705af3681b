"""Training vision-language models with exchangeable vision towers. Importing this package imports nothing heavy."""

__version__ = "0.1.0"


def __getattr__(name: str):
    if name == "LlavaLlamaForCausalLM":  # which LLaVA's package has here
        from llava.model import LlavaLlamaForCausalLM

        return LlavaLlamaForCausalLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
