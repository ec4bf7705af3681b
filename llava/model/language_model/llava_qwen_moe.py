"""LLaVA on Qwen's mixtures of experts, which does not exist here."""

from llava.model import absent_model

LlavaQwenMoeConfig, LlavaQwenMoeModel, LlavaQwenMoeForCausalLM = (
    absent_model(f"LlavaQwenMoe{end}") for end in ("Config", "Model", "ForCausalLM")
)
