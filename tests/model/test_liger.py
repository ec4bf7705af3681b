"""Liger's kernels go into this project's classes, and its loss into `supervised_loss`; here a stub stands for Liger."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from llava.errors import LlavaError
from llava.model import liger
from tests import tiny
from tests.model import small
from tests.model.qwen2_vl import parts
from tests.model.test_training_forward import batch, gradients

OPTIONS = dict(rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True, swiglu=True)
LLAVA = {"llama": "llama", "mistral": "mistral", "qwen": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2"}


@pytest.fixture
def stub(monkeypatch):
    """What was patched, [(model type, model, options)], and the rows that the fused loss got."""
    seen = SimpleNamespace(patched=[], rows=[], norms=[], mlps=[])

    def patch(kind):
        def apply(
            model=None, rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True, swiglu=True
        ):
            given = (rope, cross_entropy, fused_linear_cross_entropy, rms_norm, swiglu)
            seen.patched.append((kind, model, dict(zip(OPTIONS, given, strict=True))))

        return apply

    def loss(hidden, weight, target, bias=None, reduction="mean"):
        seen.rows.append(len(target))
        return F.cross_entropy(F.linear(hidden, weight, bias), target, reduction=reduction)

    modules = {name: ModuleType(name) for name in ("liger_kernel", "liger_kernel.transformers")}
    for name in ("monkey_patch", "functional"):
        modules[f"liger_kernel.transformers.{name}"] = ModuleType(name)
    kinds = (*LLAVA.values(), *parts.VISION)
    monkey_patch = modules["liger_kernel.transformers.monkey_patch"]
    monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN = {kind: patch(kind) for kind in kinds}
    monkey_patch._patch_rms_norm_module = lambda module: seen.norms.append(module)
    monkey_patch._patch_swiglu_module = lambda module, replacement: seen.mlps.append((module, replacement))
    monkey_patch.LigerSwiGLUMLP, monkey_patch.liger_rotary_pos_emb = object(), object()
    modules["liger_kernel.transformers"].monkey_patch = monkey_patch
    modules["liger_kernel.transformers.functional"].liger_fused_linear_cross_entropy = loss
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return seen


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    return small.tower(tmp_path_factory.mktemp("clip"), side=28)


def llava(tower, family="qwen"):
    return small.model(tower, family, image_grid_pinpoints="(1x1),...,(2x2)").train().requires_grad_(True)


@pytest.mark.parametrize("family", LLAVA)
def test_a_llava_model_is_patched_as_its_language_model(stub, tower, family):
    model = llava(tower, family)
    liger.apply_liger(model)
    ((kind, patched, options),) = stub.patched
    assert kind == LLAVA[family] and patched is model
    assert options == OPTIONS | {"fused_linear_cross_entropy": False}  # it would replace the model's forward
    fused = family != "gemma2"  # whose logits have a cap
    assert liger.fuses_loss(model) == fused
    model(**batch()).loss.backward()
    assert len(stub.rows) == fused


@pytest.mark.parametrize("kind", parts.VISION)
def test_a_qwen_vl_models_language_model_is_patched(stub, tmp_path, monkeypatch, kind):
    model, _ = parts.load(tiny.qwen2_vl(tmp_path / kind, kind))
    text, liger_parts = model.model.language_model, sys.modules["liger_kernel.transformers.monkey_patch"]
    transformers_parts = sys.modules[f"transformers.models.{kind}.modeling_{kind}"]
    rope = transformers_parts.apply_rotary_pos_emb
    monkeypatch.setattr(transformers_parts, "apply_rotary_pos_emb", rope)  # put back afterwards
    liger.apply_liger(model, {"rope": False})
    assert transformers_parts.apply_rotary_pos_emb is rope and not stub.patched
    assert stub.mlps == [(layer.mlp, liger_parts.LigerSwiGLUMLP) for layer in text.layers]
    assert {*stub.norms} == {module for module in text.modules() if "RMSNorm" in type(module).__name__}
    assert len(stub.norms) == len({*stub.norms}) > 4
    liger.apply_liger(model, {"rms_norm": False, "swiglu": False})
    assert transformers_parts.apply_rotary_pos_emb is liger_parts.liger_rotary_pos_emb
    assert len(stub.mlps) == len(text.layers) and liger.fuses_loss(model)


def test_the_fused_loss_is_the_loss(stub, tower):
    model = llava(tower)
    plain = [gradients(model, batch()), gradients(model, batch(), num_items_in_batch=9)]
    liger.apply_liger(model)
    fused = [gradients(model, batch()), gradients(model, batch(), num_items_in_batch=9)]
    assert stub.rows == [6, 6]
    for (loss, found), (expected, wanted) in zip(fused, plain, strict=True):
        assert loss == pytest.approx(expected, abs=1e-6) and found.keys() == wanted.keys()
        assert all((found[name] - gradient).abs().max() < 1e-6 for name, gradient in wanted.items())
    assert model(**batch(labelled=False)).loss == 0 and len(stub.rows) == 2  # nothing that it could be given


def test_kernels_are_chosen(stub, tower):
    model = llava(tower)
    liger.apply_liger(model, {"rope": False, "fused_linear_cross_entropy": False})
    assert stub.patched[0][2] == OPTIONS | {"rope": False, "fused_linear_cross_entropy": False}
    model(**batch())
    assert not stub.rows
    for name in ("cross_entropy", "model", "geglu"):
        with pytest.raises(LlavaError, match=f"liger_kernel_config: found '{name}', expected fused_linear_cross_entr"):
            liger.apply_liger(model, {name: True})


def test_an_adapted_output_layer_is_not_fused(stub, tower):
    from tests.model.test_chunked_loss import Adapted

    model = llava(tower)
    liger.apply_liger(model)
    model.lm_head = Adapted(model.lm_head)
    model(**batch())
    assert not stub.rows and model.lm_head.calls == 1


def test_a_model_that_liger_does_not_know(stub, tower, monkeypatch):
    known = sys.modules["liger_kernel.transformers.monkey_patch"].MODEL_TYPE_TO_APPLY_LIGER_FN
    monkeypatch.delitem(known, "qwen2")
    with pytest.raises(LlavaError, match="the installed liger_kernel has no kernels for qwen2, expected a newer one"):
        liger.apply_liger(llava(tower))


def test_the_real_one_where_it_is_installed(tower):
    """With a GPU: modules of this project's classes are Liger's after it, and the loss stays."""
    pytest.importorskip("liger_kernel.transformers")
    if not torch.cuda.is_available():
        pytest.skip("its kernels need a CUDA device")
    model = llava(tower).cuda()
    given = {k: v.cuda() if torch.is_tensor(v) else v for k, v in batch().items()}
    given["images"] = [image.cuda() for image in given["images"]]
    expected = model(**given).loss
    liger.apply_liger(model)
    assert "Liger" in repr(model.model.norm) and "Liger" in repr(model.model.layers[0].mlp.forward)
    assert abs(model(**given).loss - expected) < 1e-4
