"""The layouts of one instance: tensor parallelism, attention DP, expert parallelism and the dispatch that goes with."""

from __future__ import annotations

from collections.abc import Iterator

from moesim.spec.parallel import ParallelSpec

_BACKEND_NAMES = {"deepep": "DeepEP", "allreduce": "AR", "allgather_reducescatter": "AG+RS", "alltoall": "A2A"}


def layout_name(parallel: ParallelSpec, backend: str) -> str:
    """Short name of parallelism and dispatch: `DP32 EP32 DeepEP`."""
    return f"{parallel.label()} {_BACKEND_NAMES.get(backend, backend)}"


def divisors(number: int) -> list[int]:
    """Every size that divides a number, itself included."""
    return [size for size in range(1, number + 1) if number % size == 0]


def layouts(gpus: int) -> Iterator[tuple[ParallelSpec, str]]:
    """Layouts of instances of every size that divides the GPUs: 1, 2, 4 ... of them."""
    for size in divisors(gpus):
        yield from layouts_of(size)


def layouts_of(size: int) -> Iterator[tuple[ParallelSpec, str]]:
    """Attention DP and EP under DeepEP, tensor parallelism, and mixes of them, on instances of `size` GPUs."""
    for tp in divisors(size):
        dp = size // tp
        if size > 1:
            yield ParallelSpec(tp=tp, attention_dp=dp, ep=size), "deepep"
        if dp == 1:
            for ep in divisors(size):
                yield ParallelSpec(tp=tp, ep=ep, expert_tp=size // ep), "allreduce"
        else:
            for ep in sorted({1, size}):
                parallel = ParallelSpec(tp=tp, attention_dp=dp, ep=ep, expert_tp=size // ep)
                yield parallel, "allgather_reducescatter"
