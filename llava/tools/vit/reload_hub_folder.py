"""Load a Hub folder as somebody does who has torch and transformers, but not this project, and save its outputs.

    python reload_hub_folder.py FOLDER INPUTS.safetensors OUTPUTS.safetensors

A program of its own, run by its path: modules of this project cannot be imported in it. `upload_llava_vit` measures
with it whether the folder that it has assembled stands alone.
"""

import sys

OWN_PACKAGES = ("llava", "llavavit")


class Blocker:
    """Import finder that has none of this project's packages."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in OWN_PACKAGES:
            raise ModuleNotFoundError(f"{name}: this program runs without it")


def main(folder: str, inputs: str, outputs: str) -> None:
    sys.meta_path.insert(0, Blocker())
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    with torch.no_grad():
        out = model(**load_file(inputs), output_hidden_states=True)
    tensors = {f"hidden_states.{i}": state.contiguous() for i, state in enumerate(out.hidden_states)}
    tensors["last_hidden_state"] = out.last_hidden_state.clone()  # without a head it is the last hidden state itself
    if out.pooler_output is not None:
        tensors["pooler_output"] = out.pooler_output
    save_file(tensors, outputs)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
