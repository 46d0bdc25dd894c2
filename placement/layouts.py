"""The layouts of one instance: tensor parallelism, attention DP, expert parallelism and the dispatch that goes with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from moesim.spec.model import AttentionSpec
from moesim.spec.parallel import ParallelSpec
from moesim.spec.scenario import SearchSpec

_BACKEND_NAMES = {"deepep": "DeepEP", "allreduce": "AR", "allgather_reducescatter": "AG+RS", "alltoall": "A2A"}


def layout_name(parallel: ParallelSpec, backend: str) -> str:
    """Short name of parallelism and dispatch: `DP32 EP32 DeepEP`."""
    return f"{parallel.label()} {_BACKEND_NAMES.get(backend, backend)}"


def divisors(number: int) -> list[int]:
    """Every size that divides a number, itself included."""
    return [size for size in range(1, number + 1) if number % size == 0]


# Most pipeline stages that a search tries by itself: beyond a node's worth every token waits for as many transfers.
MOST_STAGES = 8


def layouts(gpus: int, stages: Iterable[int] = (1,)) -> Iterator[tuple[ParallelSpec, str]]:
    """Layouts of instances of every size that divides the GPUs: 1, 2, 4 ... of them, in each number of stages."""
    for pp in stages:
        for size in divisors(gpus // pp) if gpus % pp == 0 else ():
            for parallel, backend in layouts_of(size):
                yield parallel if pp == 1 else parallel.model_copy(update={"pp": pp}), backend


def stages_to_try(search: SearchSpec, gpus: int, layers: int) -> tuple[int, ...]:
    """Numbers of pipeline stages in a search: one, and with `search.pp` those it names, or 2, 4 and 8 for `auto`."""
    if search.pp == "off":
        return (1,)
    if search.pp != "auto":
        return tuple(dict.fromkeys(search.pp))
    found = [1]
    while found[-1] * 2 <= min(MOST_STAGES, layers) and gpus % (found[-1] * 2) == 0:
        found.append(found[-1] * 2)
    return tuple(found)


def with_split_contexts(
    found: Iterable[tuple[ParallelSpec, str]], search: SearchSpec, attention: AttentionSpec
) -> Iterator[tuple[ParallelSpec, str]]:
    """Each layout with whole contexts, and with `search.decode_cp` with those that its TP groups may split.

    TP keeps MLA's latent on every rank and a KV head on tp / KV heads of them: what divides the copies can split them.
    """
    for parallel, backend in found:
        yield parallel, backend
        if search.decode_cp == "off":
            continue
        asked = (
            divisors(attention.copies(parallel.tp)) if search.decode_cp == "auto" else dict.fromkeys(search.decode_cp)
        )
        for parts in asked:
            if parts > 1 and parallel.tp % parts == 0:
                yield parallel.model_copy(update={"decode_cp": parts}), backend


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
