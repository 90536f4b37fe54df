"""A second device for machines that have none: tensors that live "elsewhere", and a list of what is read back.

To torch they are on its device "meta", which every build knows; beneath each lies an ordinary tensor, so that numbers
are right. As with a GPU an operation on tensors of both places is an error, and values can only be had by a read-back,
which waits for the device. What a GPU's kernels lack or do otherwise is not seen.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
THERE = torch.device("meta")
# Operations whose result, or the size of it, the host has to know.
READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero, aten._unique2}
# A tensor of the host may index one of the device, or be copied there.
MIXING = {aten.index, aten.index_put_, aten.index_put, aten._index_put_impl_, aten.copy_}


class Elsewhere(torch.Tensor):
    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype,
                                                   storage_offset=inner.storage_offset(), device=THERE)

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self):
        return f"Elsewhere({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        with Device():
            return func(*args, **kwargs or {})


class Device(TorchDispatchMode):
    """Within it `device="meta"` means elsewhere. `reads` names the operations that read a value back."""

    def __init__(self):
        super().__init__()
        self.reads = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        there, given = any(isinstance(t, Elsewhere) for t in tensors), kwargs.get("device")
        if there and func.overloadpacket not in MIXING:
            for t in tensors:
                if not isinstance(t, Elsewhere) and t.dim():
                    raise RuntimeError(f"{func}: tensors of two devices, one of the host has shape {tuple(t.shape)}")
        leaves = given is not None and torch.device(given) != THERE
        chosen = tree_leaves(args[1]) if func.overloadpacket in MIXING - {aten.copy_} else []  # by these indices
        counts = any(isinstance(t, Elsewhere) and t.dtype == torch.bool for t in chosen)  # how many are true
        leaves |= func.overloadpacket is aten.copy_ and not isinstance(args[0], Elsewhere)
        if there and (leaves or counts or func.overloadpacket in READS):
            self.reads.append(str(func))
        wrap = there if given is None else torch.device(given) == THERE
        inner = {**kwargs, "device": torch.device("cpu")} if given is not None else kwargs
        plain = lambda x: tree_map_only(Elsewhere, lambda t: t.inner, x)  # noqa: E731
        out = func(*plain(args), **plain(inner))
        if not wrap:
            return out
        out = tree_map_only(torch.Tensor, lambda t: t if isinstance(t, Elsewhere) else Elsewhere(t), out)
        return return_and_correct_aliasing(func, args, kwargs, out) if there else out
