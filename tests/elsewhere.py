"""A device that this machine lacks, for tests of code that is to run on GPUs: tensors on it are told from the host's.

An operation that mixes the two, or a collective on the host's tensors, fails as it would with CUDA and NCCL. The
numbers lie on the CPU all the same, so sizes that depend on them are real. One process stands for all ranks of a fake
process group: what others would send is this rank's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
# What brings tensors from one device to another.
BRINGS = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
# `barrier` is told no tensor by its caller; an index that is a list comes to the dispatcher as a tensor of the host.
NO_TENSORS = ("c10d.barrier.default",)


class Far(torch.Tensor):
    """A tensor that says it is on DEVICE."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Far:
        made: Far = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=DEVICE,
        )  # fmt: skip
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(func, args, kwargs or {})


class Elsewhere(TorchDispatchMode):
    """Lets tensors be made on DEVICE, and sees every operation."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(func, args, kwargs or {})


def dispatched(func: Any, args: Any, kwargs: Any) -> Any:
    found = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, torch.Tensor)]
    far = [one for one in found if isinstance(one, Far)]
    near = [one for one in found if not isinstance(one, Far)]
    assert all(one.device.type == "cpu" for one in near), (
        f"{func}: the device has a tensor that was not seen being made"
    )
    collective = str(func).startswith("c10d.")
    if collective and near and str(func) not in NO_TENSORS:
        raise AssertionError(f"{func} on tensors of the host")
    if far and any(one.dim() for one in near) and func not in BRINGS:
        raise AssertionError(f"{func} mixes tensors of the device and of the host")
    asked = kwargs.get("device")
    onto = DEVICE if asked is None and far else torch.device("cpu") if asked is None else torch.device(asked)
    given = {name: torch.device("cpu") if name == "device" else value for name, value in kwargs.items()}
    plain_args, plain_kwargs = tree_map(lambda one: one.inner if isinstance(one, Far) else one, (args, given))
    done = func(*plain_args, **plain_kwargs)
    if collective:
        exchanged(str(func), plain_args)
        return done
    if onto.type != DEVICE.type:
        return done
    out = tree_map(lambda one: Far(one) if isinstance(one, torch.Tensor) else one, done)
    return return_and_correct_aliasing(func, args, kwargs, out) if far else out


def exchanged(name: str, args: Any) -> None:
    """What a collective leaves where every rank is as this one."""
    kind = name.split(".")[1]
    if kind == "_allgather_base_":
        args[0].copy_(args[1].repeat(len(args[0]) // len(args[1]), *[1] * (args[1].dim() - 1)))
    elif kind == "_reduce_scatter_base_":
        args[0].copy_(args[1][: len(args[0])])
    elif kind == "alltoall_base_":
        args[0].zero_()
        rows = min(len(args[0]), len(args[1]))
        args[0][:rows].copy_(args[1][:rows])
    elif kind == "allgather_":
        for into, own in zip(args[0], args[1], strict=True):
            for one in into:
                one.copy_(own)
    elif kind == "recv_":
        for one in args[0]:
            one.normal_()


@contextlib.contextmanager
def ranks_elsewhere(ranks: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rank 0 of so many, all of them this process, with DEVICE at hand. Fused optimizers do not know the device."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    adam = torch.optim.AdamW

    def seen(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """As torch's own, which goes by the mode where it brings the numbers to the device."""
        return lambda data, *, device=None, **more: (
            make(data, **more) if device is None else make(data, **more).to(device)
        )

    for name in ("tensor", "as_tensor"):
        monkeypatch.setattr(torch, name, seen(getattr(torch, name)))
    monkeypatch.setattr(torch.optim, "AdamW", lambda params, *, fused, **more: adam(params, foreach=False, **more))
    torch.distributed.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        with Elsewhere():
            yield
    finally:
        torch.distributed.destroy_process_group()
