"""What computing and communicating at once on one GPU costs: two slowdowns, and the multiprocessors that are taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from moesim.cost.estimate import Tag

# Multiprocessors that DeepEP's normal kernels take unless told otherwise (deepseek-ai/DeepEP, deep_ep/buffer.py,
# `Buffer.num_sms = 20`). Its low-latency kernels take none while data travels: what receives is a hook that is called
# after the overlap (README, low-latency kernels with a receiving hook).
DEEPEP_NORMAL_MULTIPROCESSORS = 20


@dataclass(frozen=True)
class Slowdown:
    """Time beside the other kind of work over time alone, each at least 1.

    compute: of a computation while a communication of the same GPU runs. communication: of a communication while a
    computation runs. multiprocessors: that the communication's kernels take, 0 = none or not told. source: in words.
    """

    compute: float
    communication: float
    multiprocessors: int
    tag: Tag
    source: str


NOTHING = Slowdown(1.0, 1.0, 0, Tag.ASSUMED, "work at once costs nothing")


@dataclass(frozen=True)
class StreamOverlap:
    """The slowdown of each mode of the exchange ("normal", "low_latency"); a mode that is not named has none."""

    by_mode: Mapping[str, Slowdown] = field(default_factory=dict)

    def of(self, mode: str) -> Slowdown:
        """The slowdown in a mode."""
        return self.by_mode.get(mode, NOTHING)


@runtime_checkable
class MeasuresOverlap(Protocol):
    """A cost model that also knows how much work at once slows down."""

    def overlap(self, work: str, gpus: int, nodes: int) -> Slowdown | None:
        """The measured slowdown of a transfer (`work`: a collective's kind) and of a product beside it.

        gpus, nodes: that the transfer spans. None where nothing like it was measured.
        """
        ...


def by_multiprocessors(taken: int, whole: int) -> Slowdown:
    """The slowdown of a computation that keeps its pace on each of the multiprocessors that are left.

    An upper end: work that waits for memory feels less. Communication is not slowed.
    """
    return Slowdown(
        whole / (whole - taken),
        1.0,
        taken,
        Tag.FORMULA,
        f"{taken} of {whole} multiprocessors run the exchange (DeepEP, Buffer.num_sms)",
    )
