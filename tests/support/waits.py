"""Counts how often the host would wait for the device, in a run on the CPU.

    with Waits() as waits:
        model, batch = waits.to_device(model), waits.to_device(batch)
        model(**batch).loss.backward()
    waits.where  # a line of each wait: operation, file and line

Inside, "cuda" is pretended: a tensor is on the device where its storage is marked. Marked are what `to_device` was
given, what `.to("cuda")` or a factory with `device="cuda"` makes, and the results of every operation on marked
tensors; `.device` and `.is_cuda` say so. All of it is computed on the CPU. An operation that mixes both sides raises,
as on a GPU. What counts as a wait: a read (`.item()`, `.tolist()`, `.cpu()`, `if tensor:`), an operation whose
result's shape depends on values (`nonzero`, a boolean index, `unique`, `repeat_interleave` of counts alone, ...), and a
blocking copy to the device, which `torch.tensor(..., device="cuda")` is too. Not seen: the waits of the allocator, of
collectives, and within operations that are not in the lists below.
"""

import traceback
from collections import Counter
from pathlib import Path

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

ROOT = Path(__file__).parents[2]
aten = torch.ops.aten
CUDA = torch.device("cuda", 0)

# operations that read values in order to know the shape of their result, or whose result is the host's
SHAPED_BY_VALUES = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.unique_dim_consecutive.default,
    aten.bincount.default,
    aten.equal.default,
}
INDEXED = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}


class Waits:
    """See above. `where` holds a line for each wait so far."""

    def __init__(self):
        self.where: list[str] = []
        self._marked: dict[int, StorageWeakRef] = {}  # a weak reference keeps the address from being used again
        self._modes = (_Functions(self), _Operations(self))

    def __enter__(self):
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error):
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def to_device(self, value):
        """A module, marked in place, or anything with tensors in it, of which new ones are made; no wait is counted."""
        if isinstance(value, torch.nn.Module):
            for tensor in (*value.parameters(), *value.buffers()):
                self.mark(tensor)
            return value
        with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
            return tree_map(lambda x: self.mark(x.clone()) if isinstance(x, torch.Tensor) else x, value)

    def mark(self, tensor):
        reference = StorageWeakRef(tensor.untyped_storage())
        self._marked[reference.cdata] = reference
        return tensor

    def on_device(self, value) -> bool:
        return isinstance(value, torch.Tensor) and value.untyped_storage()._cdata in self._marked

    def count(self, name: str) -> None:
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
        last = frames[-1] if frames else None
        ours = next((f for f in reversed(frames) if "/llava" in f.filename and "/tests/" not in f.filename), None)
        places = dict.fromkeys(f"{Path(f.filename).name}:{f.lineno}" for f in (last, ours) if f is not None)
        self.where.append(f"{name} at {' in '.join(places)}")

    def __str__(self):
        return "\n".join(f"{times} x {line}" for line, times in Counter(self.where).items())


class _Functions(TorchFunctionMode):
    """What Python code says about devices."""

    def __init__(self, waits: Waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        waits, kwargs = self.waits, dict(kwargs or {})
        name, first = getattr(func, "__name__", ""), args[0] if args else None
        if name == "__get__":
            owner = getattr(func, "__self__", None)
            for attribute, value in (("device", CUDA), ("is_cuda", True), ("is_cpu", False)):
                if owner is getattr(torch.Tensor, attribute) and waits.on_device(first):
                    return value
        if func is torch.Tensor.pin_memory:
            return first
        if func in (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda):
            return self._moved(func, *args, **kwargs)
        if func in (torch.Tensor.tolist, torch.Tensor.numpy) and waits.on_device(first):
            waits.count(name)
            return func(*args, **kwargs)
        given = kwargs.get("device")
        to_cuda = given is not None and torch.device(given).type == "cuda"
        if to_cuda or given is not None:
            kwargs["device"] = "cpu"
        if kwargs.pop("pin_memory", False):
            pass  # pinned is as good as any here
        made = func(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor, torch.from_numpy):
            to_cuda = to_cuda or (given is None and waits.on_device(first))
            if to_cuda and not (func is torch.as_tensor and waits.on_device(first)):
                waits.count(name)
                made = waits.mark(made.clone() if made is first else made)
        elif to_cuda:
            tree_map(lambda x: waits.mark(x) if isinstance(x, torch.Tensor) else x, made)
        elif given is not None and isinstance(first, torch.Tensor) and waits.on_device(first):
            waits._marked.pop(made.untyped_storage()._cdata, None)  # new_zeros(..., device="cpu")
        return made

    def _moved(self, func, tensor, *args, non_blocking=False, **kwargs):
        """`.to`, `.cpu`, `.cuda`: the dtype changes where the tensor is, then it is copied."""
        waits, device = self.waits, {torch.Tensor.cpu: "cpu", torch.Tensor.cuda: "cuda"}.get(func)
        rest = []
        for value in args:
            if isinstance(value, (str, torch.device)) or (isinstance(value, int) and not isinstance(value, bool)):
                device = value
            elif isinstance(value, torch.Tensor):
                device, kwargs["dtype"] = value.device, value.dtype
                device = CUDA if waits.on_device(value) else device
            elif isinstance(value, torch.dtype):
                kwargs["dtype"] = value
            elif isinstance(value, bool):
                non_blocking = value
        device = kwargs.pop("device", None) if kwargs.get("device") is not None else device
        kwargs.pop("device", None)
        here = waits.on_device(tensor)
        there = here if device is None else torch.device(device).type == "cuda"
        out = torch.Tensor.to(tensor, *rest, **kwargs) if kwargs else tensor
        if here == there:
            return out
        out = out.clone() if out is tensor or out.untyped_storage()._cdata == tensor.untyped_storage()._cdata else out
        if here:
            waits._marked.pop(out.untyped_storage()._cdata, None)
        else:
            waits.mark(out)
        if not non_blocking:
            waits.count("copy to the host" if here else "blocking copy to the device")
        return out


class _Operations(TorchDispatchMode):
    """What is done with tensors, in forward and backward passes alike."""

    def __init__(self, waits: Waits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits, kwargs = self.waits, kwargs or {}
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        marked = [waits.on_device(x) for x in given]
        if any(marked):
            self._look(func, args, kwargs, given, marked)
        out = func(*args, **kwargs)
        # a backward pass knows by itself where the zeros go that it begins with
        if any(marked) or (not given and torch._C._current_graph_task_id() != -1):
            tree_map(lambda x: waits.mark(x) if isinstance(x, torch.Tensor) else x, out)
        return out

    def _look(self, func, args, kwargs, given, marked):
        waits = self.waits
        name = func.name().removeprefix("aten::")
        if func in SHAPED_BY_VALUES or (
            func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None and len(args) < 2
        ):
            waits.count(name)
        if func in INDEXED:
            indices = [x for x in args[1] if x is not None]
            if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
                waits.count(f"{name} (boolean)")
            for x in indices:
                if not waits.on_device(x):
                    waits.count(f"{name} (index on the host)")
            given, marked = [args[0], *args[2:3]], [waits.on_device(x) for x in (args[0], *args[2:3])]
        elsewhere = [x for x, on in zip(given, marked, strict=True) if not on and x.ndim > 0]
        if elsewhere and not func.name().startswith("aten::copy_"):
            raise RuntimeError(f"{name}: found tensors of {[tuple(x.shape) for x in elsewhere]} on the host")
        to_host = func is aten.copy_.default and marked[1] and not marked[0]
        if to_host or (func is aten.copy_.default and not marked[1] and not (len(args) > 2 and args[2])):
            waits.count("copy_")
