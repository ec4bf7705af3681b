"""LLaVA on Gemma 2.

Its embedding layer scales what it gives, so visual tokens enter as the projector makes them. Its attention caps scores,
which sdpa leaves out (see `builder.best_attention`), and its logits are capped (see `llava.model.loss`).
"""

from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, Gemma2Model

from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel


class LlavaGemma2Config(Gemma2Config):
    model_type = "llava_gemma2"


class LlavaGemma2Model(LlavaMetaModel, Gemma2Model):
    config_class = LlavaGemma2Config


class LlavaGemma2ForCausalLM(LlavaMetaForCausalLM, Gemma2ForCausalLM):
    config_class = LlavaGemma2Config
    model_class = LlavaGemma2Model


AutoConfig.register("llava_gemma2", LlavaGemma2Config)
AutoModelForCausalLM.register(LlavaGemma2Config, LlavaGemma2ForCausalLM)
