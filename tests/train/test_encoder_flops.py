"""Operations of encoders as their configs tell them, against those that PyTorch counts of the stock models."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llava.errors import LlavaError
from llava.train.flops import step_flops
from tests.model import small
from tests.support import encoders

# SAM's windows and its products with relative positions are left out; V-JEPA 2 is counted by test_towers.py alone
UNCOUNTED = ("sam_vision_model", "sam_hq_vision_model", "vjepa2")
GATED = {  # the same types with the MLP of their largest checkpoints
    "dinov2-swiglu": ("dinov2", {"use_swiglu_ffn": True, "mlp_ratio": 4}),
    "dinov3_vit-gated": ("dinov3_vit", {"use_gated_mlp": True}),
    "radio-narrow": ("radio", {"mlp_ratio": 2.5}),
}
CASES = {kind: (kind, {}) for kind in encoders.KINDS if kind not in (*encoders.MAPS, *UNCOUNTED)} | GATED
HEADS = ("head", "pooler")  # of the stock models, which no feature comes through: left out of the count


@pytest.mark.parametrize("case", CASES)
def test_as_pytorch_counts(case, tmp_path):
    kind, changes = CASES[case]
    folder = encoders.folder(tmp_path / "tower", kind, **changes)
    eager = encoders.classes(kind)[1].from_pretrained(folder, attn_implementation="eager").eval()
    if kind == "vit_mae":
        eager.config.mask_ratio = 0.0
    with torch.no_grad(), FlopCounterMode(eager, display=False) as counter:
        eager(**encoders.inputs(kind, small.pixels(1, 3, 42, 42)))
    left_out = sum(sum(counter.flop_counts.get(f"{type(eager).__name__}.{head}", {}).values()) for head in HEADS)
    model = small.model(folder, mm_vision_select_layer=-1, image_aspect_ratio="pad", mm_patch_merge_type="flat")
    model.get_model().describe_vision()
    # one image of 9 patches through encoder and projector, without a text
    projector = 2 * 9 * (32 * 32 + 32 * 32)
    found = step_flops(model.config, [], [9], set()) - projector
    assert found == pytest.approx(counter.get_total_flops() - left_out, rel=0.01)


@pytest.mark.parametrize("kind", sorted(encoders.MAPS))
def test_feature_maps_are_not_counted(kind, tmp_path):
    model = small.model(encoders.folder(tmp_path / "tower", kind))
    model.get_model().describe_vision()
    with pytest.raises(LlavaError, match="by which operations are counted"):
        step_flops(model.config, [], [4], set())
