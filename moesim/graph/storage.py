"""Where expert weights wait, and what a step fetches of them over PCIe before the experts can run.

`offload`: a layer's experts come from the host while earlier layers compute, two layers' buffers in turn (double
buffering, as ZeRO-Inference prefetches layers, arXiv:2207.00032). `pregated`: only those that a gate one layer
ahead picked (Pre-gated MoE, arXiv:2308.12066). `cached`: some experts stay on the GPU, the others are fetched when
their own gate picks them (Mixtral-offloading, arXiv:2312.17238; MoE-Infinity, arXiv:2401.14361).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.cost.estimate import Estimate, Tag, estimate

Floats = NDArray[np.float64]

# Share of the datasheet's PCIe rate that a pinned copy from host to device reaches: 55.63 GB/s in the example run of
# NVIDIA's blog on NVbandwidth (host_to_device_memcpy_ce), of the 64 GB/s of PCIe Gen5 x16.
PCIE_FRACTION = 55.63 / 64.0
# Assumed: how far a host copy is off (one standard deviation of ln); neighbours on a switch or the host's memory
# shorten the rate.
HOST_COPY_REL_SIGMA = 0.2
FAMILY = "host_copy"
STAGED_LAYERS = 2


@dataclass(frozen=True)
class HitRates:
    """Share of the picked experts that a cache holds, by load: hits float64 [sizes, layers, ranks].

    tokens: [sizes] of the whole instance in a step, rising; between sizes linear in the logarithm, constant beyond.
    """

    tokens: Floats
    hits: Floats

    def at(self, tokens: Floats) -> Floats:
        """Hit rates of steps with `tokens` [steps] tokens: [steps, layers, ranks]."""
        places = np.interp(np.log(np.maximum(tokens, 1.0)), np.log(self.tokens), np.arange(len(self.tokens)))
        low = np.minimum(np.floor(places).astype(np.int64), max(len(self.tokens) - 2, 0))
        high = np.minimum(low + 1, len(self.tokens) - 1)
        share = (places - low)[:, None, None]
        return np.asarray(self.hits[low] * (1.0 - share) + self.hits[high] * share)


@dataclass(frozen=True)
class ExpertStorage:
    """Storage of one deployment's expert weights; kind: "offload", "pregated" or "cached".

    expert_bytes: of one expert on one rank. pcie_bytes_per_s: datasheet rate of a GPU's host link. shared_with_nic:
    share of that rate which the GPU's NIC uses when it sends at its best, 0 = the exchange stays off PCIe.
    """

    kind: str
    expert_bytes: float
    pcie_bytes_per_s: float
    shared_with_nic: float = 0.0
    hits: HitRates | None = None

    def fetch(self, slot_tokens: Floats, group_tokens: Floats) -> Estimate:
        """Seconds to fetch each layer's weights on each rank: [steps, layers, ranks].

        slot_tokens: [steps, layers, ranks, slots], tokens that each slot gets. group_tokens: [steps], of the instance.
        A slot of fewer than one token in the mean is picked with that chance.
        """
        if self.kind == "offload":
            fetched = np.full((1, *slot_tokens.shape[1:3]), float(slot_tokens.shape[3]))
        else:
            fetched = np.minimum(slot_tokens, 1.0).sum(axis=-1)
        if self.hits is not None:
            fetched = fetched * (1.0 - self.hits.at(group_tokens))
        seconds = fetched * self.expert_bytes / (PCIE_FRACTION * self.pcie_bytes_per_s)
        return estimate(seconds, Tag.FORMULA, FAMILY, HOST_COPY_REL_SIGMA, "bytes over PCIe at its best")


class Fetches:
    """Adds the fetches of one step to a task list as its layers are built.

    add(row, after) appends the fetch of MoE layer `row` and returns its index. `before_experts` is what the experts of
    a layer wait for; the builder tells of each gate and each layer's last use of its weights.
    """

    def __init__(self, kind: str, layers: int, add: Callable[[int, tuple[int, ...]], int]) -> None:
        self.kind = kind
        self.layers = layers
        self.add = add
        self.fetched: dict[int, int] = {}
        self.freed: dict[int, int] = {}

    def begin(self) -> None:
        """The step starts, with nothing staged."""
        if self.kind == "offload":
            for row in range(min(STAGED_LAYERS, self.layers)):
                self.fetched[row] = self.add(row, ())

    def gated(self, row: int, gate: int) -> None:
        """The gate of MoE layer `row` has run: under `pregated` it also picked for the next layer."""
        if self.kind == "cached" or (self.kind == "pregated" and row == 0):
            self.fetched[row] = self.add(row, (gate,))
        if self.kind == "pregated" and row + 1 < self.layers:
            buffer = (self.freed[row - 1],) if row > 0 else ()
            self.fetched[row + 1] = self.add(row + 1, (gate, *buffer))

    def before_experts(self, row: int) -> tuple[int, ...]:
        """What the experts of MoE layer `row` wait for."""
        return (self.fetched[row],) if row in self.fetched else ()

    def used(self, row: int, experts: int) -> None:
        """The experts of MoE layer `row` have run: their buffer is free."""
        self.freed[row] = experts
        if self.kind == "offload" and row + STAGED_LAYERS < self.layers:
            self.fetched[row + STAGED_LAYERS] = self.add(row + STAGED_LAYERS, (experts,))
