"""LLaVA on Mixtral, which does not exist here."""

from llava.model import absent_model

LlavaMixtralConfig, LlavaMixtralModel, LlavaMixtralForCausalLM = (
    absent_model(f"LlavaMixtral{end}") for end in ("Config", "Model", "ForCausalLM")
)
