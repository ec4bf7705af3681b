"""LLaVA on the first Gemma (Gemma 2 is in `llava_gemma2`), which does not exist here."""

from llava.model import absent_model

LlavaGemmaConfig, LlavaGemmaModel, LlavaGemmaForCausalLM = (
    absent_model(f"LlavaGemma{end}") for end in ("Config", "Model", "ForCausalLM")
)
