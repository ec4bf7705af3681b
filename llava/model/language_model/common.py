"""What the language-model files share."""

import torch.nn as nn


def init_causal_lm(self, causal_class, model_class, config):
    """Build a causal LM around `model_class` in place of the base model that `causal_class.__init__` would build."""
    super(causal_class, self).__init__(config)  # the PreTrainedModel part
    self.model = model_class(config)
    self.vocab_size = config.vocab_size
    self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    self.post_init()
