"""The sides that are held against each other: copies of the encoder's code, and the formulas."""

import functools
import importlib

from tests.support.vit import published
from tests.support.vit.golden import golden_folder

PADDED, PACKED, ONEVISION = "llava_vit", "llava_vit_packing", "onevision_encoder"
MODELS = {
    PADDED: ("modeling_llava_vit", "LlavaViTModel"),
    PACKED: ("modeling_llava_vit_packing", "LlavaViTPackingModel"),
    ONEVISION: ("modeling_llava_vit", "OneVisionEncoderModel"),
}
LAYOUTS = {PADDED: "padded", PACKED: "packed", ONEVISION: "padded"}


class Side:
    """The models of one copy of the code: the project's, or the one in a Hub folder.

    Args:
        name: of the side.
        hub_folder: where the code is; None: the project's.
    """

    def __init__(self, name: str, hub_folder: str | None = None):
        self.name, self.hub_folder = name, hub_folder
        self.model_class = functools.cache(self._model_class)
        self.golden = functools.cache(self._golden)

    def _model_class(self, model_type: str):
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        module, model = MODELS[model_type]
        if self.hub_folder is None:
            return getattr(importlib.import_module(f"llavavit.{module}"), model)
        # what AutoModel does with trust_remote_code, unless the type is registered, as the project's are here
        return get_class_from_dynamic_module(f"{module}.{model}", self.hub_folder)

    def _golden(self, model_type: str, stored_as: str):
        """A model with the published weights, loaded from the folder of one of the types."""
        return self.model_class(model_type).from_pretrained(golden_folder(stored_as)).eval()

    def module(self, model_type: str, name: str):
        """A module from beside a model."""
        return importlib.import_module(f"{self.model_class(model_type).__module__.rpartition('.')[0]}.{name}")

    def convert(self, state: dict, model_type: str) -> dict:
        """Weights of any layout in that of a type."""
        return self.module(model_type, "conversion").convert_state_dict(state, LAYOUTS[model_type])

    def empty(self, model_type: str, values: dict):
        """A model of a config with these values, without memory for its weights."""
        import torch

        model, known = self.model_class(model_type), published.DEFAULTS[model_type]
        with torch.device("meta"):
            return model(model.config_class(**{key: value for key, value in values.items() if key in known}))

    def build(self, model_type: str, values: dict, state: dict):
        """A model of a config with these values and weights of any layout."""
        model = self.empty(model_type, values)
        model.load_state_dict(self.convert(state, model_type), assign=True)
        return model.eval()


def formulas(state: dict, values: dict, case) -> dict:
    """Outputs of the plain formulas, for weights of any layout and a config's values, else the published defaults."""
    from llavavit.conversion import convert_state_dict
    from tests.support.vit.cases import run_formulas

    full = published.DEFAULTS[values.get("model_type", PADDED)] | values
    eps, head_eps = full["layer_norm_eps"], full["head_norm_eps"]
    return run_formulas(
        convert_state_dict(state, "source"),
        case,
        num_heads=full["num_attention_heads"],
        layer_norm_eps=eps,
        head_norm_eps=eps if head_eps is None else head_eps,
        rope_theta=full["rope_theta"],
    )
