"""The README of an HEVC-ViT encoder on the Hub."""

CARD = """\
---
library_name: transformers
pipeline_tag: image-feature-extraction
tags:
- vision-transformer
- llava
---

# {name}

An HEVC-ViT (LlavaViT, OneVision-Encoder) vision encoder: a pre-norm vision transformer with rotary positions over time,
height and width, without class token and without position embedding, so that it takes images and clips of any size in
multiples of {patch} pixels.{head}

| parameters | patch | width | heads | layers | MLP width | image size | weights |
|---|---|---|---|---|---|---|---|
| {parameters:.1f} M | {patch} | {width} | {heads} | {layers} | {mlp} | {image} | {layout} layout |

The code is in this repository: torch and transformers 5.17 or later are all it takes.

## Images or clips of one size

```python
from PIL import Image
from transformers import CLIPImageProcessorPil
{load_padded}
processor = CLIPImageProcessorPil.from_pretrained("{repo}")
pixels = processor(Image.open("picture.jpg"), return_tensors="pt").pixel_values  # [1, {channels}, {image}, {image}]
out = model(pixels.to(model.dtype))
print(out.last_hidden_state.shape)  # [1, {tokens}, {width}]{pooled}
```

A clip is [B, {channels}, T, H, W]; `visible_indices` [B, K] encodes only some of its patches.
`output_hidden_states=True` returns the input of every block and the output of the last, before the last norm.

## Images of any sizes in one sequence, without padding

```python
import torch
import torch.nn.functional as F
{load_packed}
images = [torch.randn({channels}, {tall}, {patch}), torch.randn({channels}, {patch}, {wide})]  # normalised pixels
rows = torch.cat([F.unfold(image[None], {patch}, stride={patch})[0].T for image in images])  # [N, {row}]
grid_thw = torch.tensor([[1, image.shape[1] // {patch}, image.shape[2] // {patch}] for image in images])
out = model(rows.to(model.dtype), grid_thw)
print(out.last_hidden_state.shape)  # [N, {width}], one image after the other{packed_pooled}
```

A row is one patch, flattened channel first, then rows, then columns; `grid_thw` holds frames, rows and columns of each
image or clip in patches. Attention never crosses from one to another. The two models have the same numbers under
different names: either loads these weights and renames them where it has to.

## Verified

Largest differences from the encoder's formulas, which were written out separately, on {inputs}
(torch {torch}, transformers {transformers}); a hidden state's in units of its largest value, where that is above 1.
"This folder" was loaded by `AutoModel.from_pretrained(..., trust_remote_code=True)` in a Python without any other code
of this model.

| |{columns}
|---|{rules}
{rows}

Norms: eps {eps:.6g}{head_eps}. The rotary frequencies are computed, not stored.
"""

LOAD = """\
from transformers import AutoModel

model = AutoModel.from_pretrained("{repo}", trust_remote_code=True)"""
# the model of the other layout is in the repository, too, but AutoModel does not give it
LOAD_OTHER = """\
from transformers.dynamic_module_utils import get_class_from_dynamic_module

{name} = get_class_from_dynamic_module("{module}.{name}", "{repo}")
model = {name}.from_pretrained("{repo}")"""
MODELS = {
    "padded": {"module": "modeling_llava_vit", "name": "LlavaViTModel"},
    "packed": {"module": "modeling_llava_vit_packing", "name": "LlavaViTPackingModel"},
}


def model_card(repo_id: str, config, layout: str, measured: dict[str, dict[str, float]], inputs: str) -> str:
    """Markdown for the repository `repo_id`.

    Args:
        config: of the encoder.
        layout: padded or packed, what `AutoModel` gives.
        measured: what was compared -> the largest difference of each output.
        inputs: what they were measured on.
    """
    import torch
    import transformers

    outputs = list(next(iter(measured.values())))
    head_eps = config.layer_norm_eps if config.head_norm_eps is None else config.head_norm_eps
    patch, channels = config.patch_size, config.num_channels
    return CARD.format(
        repo=repo_id,
        name=repo_id.rpartition("/")[2],
        parameters=_parameters(config) / 1e6,
        patch=patch,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        layers=config.num_hidden_layers,
        mlp=config.intermediate_size,
        image=config.image_size,
        channels=channels,
        layout=layout,
        row=channels * patch**2,
        tokens=(config.image_size // patch) ** 2,
        tall=4 * patch,
        wide=6 * patch,
        head=" A learned query pools the patches into one vector." if config.use_head else "",
        pooled=f"\nprint(out.pooler_output.shape)  # [1, {config.hidden_size}]" if config.use_head else "",
        packed_pooled=f"\nprint(out.pooler_output.shape)  # [2, {config.hidden_size}]" if config.use_head else "",
        **{
            f"load_{name}": (LOAD if name == layout else LOAD_OTHER).format(repo=repo_id, **model)
            for name, model in MODELS.items()
        },
        inputs=inputs,
        torch=torch.__version__.partition("+")[0],
        transformers=transformers.__version__,
        columns="".join(f" {name} |" for name in outputs),
        rules="---|" * len(outputs),
        rows="\n".join(
            f"| {side} |" + "".join(f" {values[name]:.1e} |" for name in outputs) for side, values in measured.items()
        ),
        eps=config.layer_norm_eps,
        head_eps=f", the pooling head's {head_eps:.6g}" if config.use_head else "",
    )


def _parameters(config) -> int:
    import torch

    from llava.tools.vit.checkpoint import class_of

    with torch.device("meta"):
        return class_of(config)(config).num_parameters()
