"""LLaVA on MPT, which does not exist here."""

from llava.model import absent_model

LlavaMptConfig, LlavaMptModel, LlavaMptForCausalLM = (
    absent_model(f"LlavaMpt{end}") for end in ("Config", "Model", "ForCausalLM")
)
