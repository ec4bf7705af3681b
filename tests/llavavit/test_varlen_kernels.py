"""Variable-length attention on the CUDA kernels: what they are given, held by stand-ins, and which one is chosen."""

import logging
import sys
from types import SimpleNamespace

import pytest
import torch

from llavavit import varlen_backends as module
from llavavit.varlen_attention import usable_backends, varlen_attention
from tests.llavavit.varlen_formula import CASES, call, formula, make


def kernel_like(record, q, k, v, cu_q, cu_k, max_q, max_k, window_size, scale, softcap=0.0):
    """The formula behind a kernel's checks: int32 starts, host lengths, last dimension contiguous."""
    for starts, longest, tokens in ((cu_q, max_q, q), (cu_k, max_k, k)):
        assert starts.dtype == torch.int32 and type(longest) is int and longest == starts.diff().max()
        assert starts[-1] == len(tokens) and tokens.stride(-1) == 1
    before, after = window_size
    assert after in (-1, 0) and (before == -1 or after == 0)
    record.append(dict(kv_heads=k.shape[1], causal=after == 0, scale=scale, window_size=window_size, softcap=softcap))
    window = None if before == -1 else before + 1
    lengths = cu_q.diff().tolist(), cu_k.diff().tolist()
    return formula(q, k, v, *lengths, after == 0, scale, window, softcap or None).to(q.dtype)


def torch_kernel(record, with_gqa):
    """`torch.nn.attention.varlen.varlen_attn` as of 2.13, or as of 2.11, which knows nothing of grouped queries."""

    def refuse_groups(query, key):
        if query.shape[1] != key.shape[1]:
            raise ValueError("Expect query and key/value to have the same number of heads")

    def run(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size):
        return kernel_like(record, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size, scale)

    def varlen_attn(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        *,
        return_aux=None,
        scale=None,
        window_size=(-1, -1),
        enable_gqa=False,
        seqused_k=None,
        block_table=None,
        num_splits=None,
    ):
        if not enable_gqa:
            refuse_groups(query, key)
        return run(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)

    def varlen_attn_2_11(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        *,
        return_aux=None,
        scale=None,
        window_size=(-1, -1),
    ):
        refuse_groups(query, key)
        return run(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)

    return varlen_attn if with_gqa else varlen_attn_2_11


def flash_kernel(record):
    """`flash_attn.flash_attn_varlen_func`."""

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
        block_table=None,
    ):
        window = (window_size[0], 0 if causal else window_size[1])
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        out = kernel_like(record, q, k, v, *lengths, window, softmax_scale, softcap)
        record[-1]["dropout_p"] = dropout_p
        return out

    return flash_attn_varlen_func


@pytest.fixture
def flash_attn(monkeypatch):
    """Record of a flash-attn package that is a stand-in."""
    record = []
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash_kernel(record)))
    module._flash_attn_function.cache_clear()
    yield record
    module._flash_attn_function.cache_clear()


KERNEL_CASES = ("unsorted", "two to a key head", "one key head", "probes", "causal", "causal, more keys", "scale")
WINDOW_CASES = ("window", "window of one", "window, more keys", "window over all")
CAP_CASES = ("cap", "cap, causal, scale", "cap, window", "cap, window, more keys")
KERNELS = ("torch 2.13", "torch 2.11", "flash_attn")


@pytest.mark.parametrize(
    "kernel, case",
    [(kernel, case) for kernel in KERNELS for case in KERNEL_CASES + WINDOW_CASES]
    + [("flash_attn", case) for case in CAP_CASES],
)
def test_what_the_kernels_are_given(case, kernel, monkeypatch, flash_attn):
    record = flash_attn
    backend = "flash_attn" if kernel == "flash_attn" else "torch_varlen"
    if backend == "torch_varlen":
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", torch_kernel(record, kernel == "torch 2.13"))
    monkeypatch.setattr(module, "usable_backends", lambda q, *args, **kw: [backend])
    values = dict(CASES[case])
    heads = {name: values.pop(name) for name in ("heads", "kv_heads") if name in values}
    q, k, v, gradient = make(values["lengths_q"], values.get("lengths_k"), **heads)
    out = call(q, k, v, **values)
    expected = formula(q, k, v, **values)
    assert torch.allclose(out.double(), expected, atol=1e-6)
    found, wanted = (torch.autograd.grad(o, (q, k, v), gradient.to(o.dtype)) for o in (out, expected))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, wanted, strict=True))
    (seen,) = record
    assert seen["scale"] == values.get("scale", 8**-0.5) and seen["causal"] == values.get("causal", False)
    window = values.get("window")
    limits = window is not None and case != "window over all"  # else the kernel is spared it
    assert seen["window_size"] == (window - 1 if limits else -1, 0 if seen["causal"] else -1)
    assert seen["softcap"] == values.get("softcap", 0.0)
    assert seen["kv_heads"] == (q.shape[1] if kernel == "torch 2.11" else k.shape[1])  # repeated only where it must be


def test_kernels_get_int32(monkeypatch, flash_attn):
    monkeypatch.setattr(module, "usable_backends", lambda q, *args, **kw: ["flash_attn"])
    q, k, v, _ = make([4, 6])
    out = varlen_attention(q, k, v, torch.tensor([0, 4, 10]), 6)
    assert torch.allclose(out.double(), formula(q, k, v, [4, 6]), atol=1e-6)


def test_dropout_reaches_flash_attn(monkeypatch, flash_attn):
    monkeypatch.setattr(module, "usable_backends", lambda q, *args, **kw: ["flash_attn"])
    q, k, v, _ = make([4])
    call(q, k, v, [4], dropout_p=0.25)
    assert flash_attn[0]["dropout_p"] == 0.25


def on_cuda(dtype=torch.bfloat16, channels=64):
    """What the choice looks at of a tensor on a CUDA device."""
    return SimpleNamespace(is_cuda=True, device=torch.device("cuda"), dtype=dtype, shape=(4, 2, channels))


def chosen(backend, q, dropout_p=0.0, **rule):
    return module.choose_backend(backend, q, module.Rule(True, 1.0, dropout_p, **rule))


def test_choice_of_backend(monkeypatch, flash_attn):
    everything = ["flash_attn", "torch_varlen", "sdpa", "reference"]
    plain = everything[2:]
    monkeypatch.setattr(module, "_runs_flash", lambda device: device.type == "cuda")
    assert usable_backends(on_cuda()) == everything and usable_backends(on_cuda(torch.float16)) == everything
    assert usable_backends(on_cuda(), dropout_p=0.1) == ["flash_attn", *plain]
    for q in (on_cuda(torch.float32), on_cuda(channels=260), on_cuda(channels=12), torch.empty(4, 2, 64).bfloat16()):
        assert usable_backends(q) == plain
    assert chosen(None, on_cuda()) == "flash_attn"
    assert chosen("torch", on_cuda()) == "torch_varlen"
    assert chosen("torch", on_cuda(), 0.1) == chosen("torch", on_cuda(torch.float32)) == "sdpa"
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # not installed
    module._flash_attn_function.cache_clear()
    assert usable_backends(on_cuda()) == everything[1:] and chosen(None, on_cuda()) == "torch_varlen"
    with pytest.raises(ValueError, match=r"'flash_attn' cannot run on cuda .* expected one of torch_varlen, sdpa"):
        chosen("flash_attn", on_cuda())


def test_windows_and_caps_choose_too(monkeypatch, flash_attn):
    """PyTorch's kernel has no cap, flash-attn no dropout beside one, and old versions have neither window nor cap."""
    monkeypatch.setattr(module, "_runs_flash", lambda device: True)
    assert usable_backends(on_cuda(), window=8) == ["flash_attn", "torch_varlen", "sdpa", "reference"]
    assert usable_backends(on_cuda(), softcap=50.0) == ["flash_attn", "sdpa", "reference"]
    assert usable_backends(on_cuda(), 0.1, softcap=50.0) == ["sdpa", "reference"]
    assert chosen(None, on_cuda(), window=8, softcap=50.0) == "flash_attn"
    assert chosen("torch", on_cuda(), softcap=50.0) == "sdpa" and chosen("torch", on_cuda(), window=8) == "torch_varlen"
    old = SimpleNamespace(flash_attn_varlen_func=lambda q, k, v, dropout_p=0.0, causal=False: None)
    monkeypatch.setitem(sys.modules, "flash_attn", old)
    module._flash_attn_function.cache_clear()
    assert chosen(None, on_cuda()) == "flash_attn" and chosen(None, on_cuda(), window=8) == "torch_varlen"
    assert chosen(None, on_cuda(), softcap=50.0) == "sdpa"
    with pytest.raises(ValueError, match=r"heads of 64 channels and softcap 50\.0; expected one of sdpa, reference"):
        chosen("flash_attn", on_cuda(), softcap=50.0)


@pytest.mark.parametrize(
    "capability, built, expected",
    [((8, 0), True, True), ((9, 0), True, True), ((7, 5), True, False), ((9, 0), False, False)],
)
def test_devices_of_the_kernels(monkeypatch, capability, built, expected):
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: built)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    module._runs_flash.cache_clear()
    assert ("torch_varlen" in usable_backends(on_cuda())) == expected
    module._runs_flash.cache_clear()


def test_backend_is_logged_once(caplog):
    module.log_once.cache_clear()
    q, k, v, _ = make([4])
    with caplog.at_level(logging.INFO, logger="llavavit.varlen_backends"):
        for _ in range(3):
            call(q, k, v, [4])
    assert [record.message for record in caplog.records] == ["variable-length attention on cpu in torch.float32: sdpa"]


BROKEN = {
    "wrong ABI": "raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda9SetDeviceEa')",
    "no CUDA library": "raise OSError('libcudart.so.12: cannot open shared object file')",
    "no extension": "import flash_attn_2_cuda",
    "an older version": "",
}


@pytest.mark.parametrize("code", BROKEN.values(), ids=BROKEN)
def test_a_flash_attn_that_does_not_load(code, tmp_path, monkeypatch, flash_attn, caplog):
    """It is installed, as its metadata say, and of no use: told in one line, and the next backend is taken."""
    import transformers.utils

    from llava.model.builder import best_attention

    (tmp_path / "flash_attn.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: True)
    assert best_attention(torch.bfloat16, on_cpu=False) == "flash_attention_2"  # the stand-in loads
    monkeypatch.delitem(sys.modules, "flash_attn")
    module._flash_attn_function.cache_clear()
    assert best_attention(torch.bfloat16, on_cpu=False) == "sdpa"
    assert best_attention(torch.bfloat16, on_cpu=False) == "sdpa"
    (line,) = caplog.messages
    assert line.startswith("flash-attn is installed and cannot be imported (") and "\n" not in line
