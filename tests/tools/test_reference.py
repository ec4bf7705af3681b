"""The formulas against the published values; they must stand by themselves, since conversions are held against them."""

import ast
from pathlib import Path

import pytest
import torch

import llava.tools.vit.reference
from llava.tools.vit.reference import encode
from llavavit.conversion import convert_state_dict
from tests.support.vit.cases import named, read_golden_case
from tests.support.vit.golden import golden_folder, golden_state

CASES = [
    ("llava_vit", "image"),
    ("llava_vit", "video"),
    ("llava_vit", "video_sparse"),
    ("llava_vit_packing", "packed"),
    ("llava_vit_packing", "packed_positions"),
    ("onevision_encoder", "image"),
    ("onevision_encoder", "video"),
]


@pytest.mark.parametrize(("folder", "prefix"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_formulas_give_the_published_values(folder, prefix, dtype):
    patch = 14 if folder == "onevision_encoder" else 16
    case, expected = read_golden_case(golden_folder(folder) / "io.safetensors", prefix, patch, layers=3)
    state = convert_state_dict(golden_state(folder), "source")
    settings = {"num_heads": 2, "layer_norm_eps": 1e-6, "head_norm_eps": 1e-6, "rope_theta": 10000.0}
    found = named([encode(state, sample.to(dtype), **settings, **case.formulas) for sample in case.samples])
    expected.pop("hidden_states_in", None)
    assert {"last_hidden_state", "pooler_output"} <= expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == dtype
        torch.testing.assert_close(found[name].float(), value, atol=1e-5, rtol=0)


def test_formulas_use_nothing_of_the_project():
    tree = ast.parse(Path(llava.tools.vit.reference.__file__).read_text())
    imports = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imports |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imports == {"math", "typing", "torch", "torch.nn.functional"}
