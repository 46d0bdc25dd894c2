"""Prices of the exchanges that are plain all-to-alls: flat, two-level, TP-deduplicated, each compressed or not.

How each one copies: a token goes once to each expert that it picks ("by expert"), whatever its ranks share.

- `alltoall`: straight to the expert's GPU. Under TP each of a group's ranks sends its part of the group's tokens, which
  all of them hold, and gathers the others' results afterwards.
- `two_level`: gathered inside the domain, along the rails, scattered (`network.exchange`).
- `tp_dedup`: the tokens stay scattered over the TP group from attention to the gather after the experts, so that no
  rank sends what another one holds, too. With experts split over `expert_tp` = `tp` ranks, each rank exchanges with the
  ranks of its own place, and an all-gather inside the expert's group brings the parts together before the experts, a
  reduce-scatter takes them apart after (duplicate token dropping in DeepSpeed-TED, arXiv:2303.06318, section 4.2).

Compression writes each row once in fewer bytes before it travels and reads it back after: a kernel bound by memory on
either side of both exchanges.

A measured table of all-to-alls prices the flat exchange. What no table holds is a formula on the cluster's links.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from moesim.cost.estimate import CostModel, Estimate, Tag, estimate
from moesim.cost.ops import Collective, MemoryBound
from moesim.cost.reach import REL_SIGMA
from moesim.errors import OutsideProfile
from moesim.graph.batch import Floats
from moesim.network.exchange import Scheme
from moesim.network.instance import InstanceNetwork
from moesim.network.traffic import SCALE_BLOCK, SCALE_BYTES, pair_copies
from moesim.spec.model import ModelSpec
from moesim.spec.parallel import ParallelSpec
from moesim.spec.scenario import DispatchSpec, PrecisionSpec
from moesim.units import BYTES_PER_ELEMENT

Step = Literal["dispatch", "combine"]
# Plain all-to-alls.
ALL_TO_ALLS = ("alltoall", "two_level", "tp_dedup")
# Bytes between pairs of GPUs that are held at once: 2^22 float64 are 32 MiB.
MOST_PAIRS = 2**22


def element_bytes(step: Step, dispatch: DispatchSpec, precision: PrecisionSpec) -> float:
    """Bytes of one element on the wire of a plain all-to-all."""
    packed = dispatch.compression
    if packed is None:
        return BYTES_PER_ELEMENT[precision.dispatch if step == "dispatch" else precision.combine]
    if packed.factor is not None:
        return BYTES_PER_ELEMENT[precision.activations] / packed.factor
    assert packed.dtype is not None
    scales = SCALE_BYTES / SCALE_BLOCK if packed.dtype in ("fp8", "int8") else 0.0  # the other types hold theirs
    return BYTES_PER_ELEMENT[packed.dtype] + scales


def pair_bytes(tokens: Floats, arriving: Floats, parallel: ParallelSpec, row_bytes: float) -> Floats:
    """Bytes of a dispatch between GPUs [steps, layers, gpus, gpus], what stays on its GPU included.

    tokens: [steps, gpus], tokens that each GPU sends; arriving: [steps, layers, ep], copies that each EP rank gets.
    With experts split over several ranks, a GPU reaches the one of its own place in each group.
    """
    split = parallel.expert_tp
    if split == 1:
        return pair_copies(tokens[:, None, :], arriving) * row_bytes
    by_place = np.asarray(tokens).reshape(len(tokens), -1, split)  # [steps, groups, places]
    found = np.zeros((*arriving.shape[:-1], parallel.gpus, parallel.gpus))
    for place in range(split):
        one = pair_copies(by_place[:, None, :, place], arriving / split)
        found[..., place::split, place::split] = one * row_bytes
    return found


@dataclass(frozen=True)
class AllToAll:
    """The plain all-to-alls of a setup; fields as in `LayerSetup`."""

    model: ModelSpec
    parallel: ParallelSpec
    dispatch: DispatchSpec
    precision: PrecisionSpec
    network: InstanceNetwork | None
    nodes: int
    gpus_per_node: int

    def estimates(
        self, costs: CostModel, step: Step, sent: Floats, arriving: Floats, balanced: Floats | None
    ) -> tuple[Estimate, ...]:
        """One exchange of each layer with what goes with it: packing, and the parts of split experts brought together.

        sent: [steps, gpus], tokens that each GPU sends; arriving: [steps, layers, ep], copies that each EP rank gets;
        balanced: [steps, layers], tokens of the balanced exchange that is as busy, for one that a table may hold. All
        estimates are [steps, layers, 1]. Raises OutsideProfile.
        """
        hidden, split = self.model.hidden, self.parallel.expert_tp
        row_bytes = hidden * element_bytes(step, self.dispatch, self.precision)
        priced = PairPrice(self.network, self.parallel, step, sent, arriving, row_bytes)
        if balanced is None:
            assert self.network is not None  # `resolve` gives every deployment one
            exchanged = asked_formula(priced("two_level"), self.network, self.dispatch.backend)
        else:
            size = (balanced * self.model.moe.top_k * row_bytes)[..., None]
            whole = Collective(kind="all_to_all", bytes=size, gpus=self.parallel.ep, nodes=self.nodes)
            exchanged = flat_exchange(costs, self.network, whole, priced)
        each = arriving.max(axis=-1, keepdims=True) / split * hidden
        most = sent.max(axis=-1, keepdims=True)[:, None, :] * hidden
        rows = (most, each) if step == "dispatch" else (each, most * self.model.moe.top_k)
        found = (exchanged, *packing(costs, step, self.dispatch, self.precision, rows))
        if split == 1:
            return found
        gathered = Collective(
            kind="all_gather" if step == "dispatch" else "reduce_scatter",
            bytes=each * split * BYTES_PER_ELEMENT[self.precision.activations],
            gpus=split,
            nodes=-(-split // self.gpus_per_node),
        )
        return (*found, costs.estimate(gathered))


def flat_exchange(costs: CostModel, network: InstanceNetwork | None, op: Collective, priced: PairPrice) -> Estimate:
    """An all-to-all by its measured table; by formula where no table holds it. Raises OutsideProfile."""
    try:
        found = costs.estimate(op)
    except OutsideProfile:
        if network is None:
            raise
        by_links = priced("flat")
        if not (network.formula or _on_measured_links(by_links)):
            raise
        return by_links
    if network is None or op.gpus == 1 or not (found.tags == Tag.FORMULA).all():
        return found
    return priced("flat")


class PairPrice:
    """One exchange between pairs of GPUs, priced by formula under any scheme.

    tokens, arriving: as in `pair_bytes`. step: a combine runs backwards.
    """

    def __init__(
        self,
        network: InstanceNetwork | None,
        parallel: ParallelSpec,
        step: Step,
        tokens: Floats,
        arriving: Floats,
        row_bytes: float,
    ) -> None:
        self.network = network
        self.parallel = parallel
        self.step = step
        self.tokens = np.broadcast_to(tokens, (len(arriving), parallel.gpus))
        self.arriving = arriving
        self.row_bytes = row_bytes

    def __call__(self, scheme: Scheme) -> Estimate:
        """Seconds [steps, layers, 1], `formula` on measured links and `assumed` on a datasheet's."""
        assert self.network is not None
        exchange = self.network.exchange(scheme)
        steps, layers = self.arriving.shape[:2]
        block = max(1, MOST_PAIRS // (layers * self.parallel.gpus**2))
        seconds, tag = np.zeros((steps, layers)), Tag.FORMULA
        for first in range(0, steps, block):
            rows = slice(first, first + block)
            pairs = pair_bytes(self.tokens[rows], self.arriving[rows], self.parallel, self.row_bytes)
            timed = exchange.time(pairs, backwards=self.step == "combine")
            seconds[rows], tag = timed.seconds, max(tag, timed.tag)
        name = self.network.cluster.name
        return estimate(seconds[..., None], tag, "collective", REL_SIGMA, f"{scheme} exchange over the links of {name}")


def asked_formula(found: Estimate, network: InstanceNetwork, backend: str) -> Estimate:
    """A price by formula, where the scenario takes one. Raises OutsideProfile."""
    if network.formula or _on_measured_links(found):
        return found
    raise OutsideProfile(
        f"no table holds a {backend} exchange, and the links of {network.cluster.name} were not measured",
        where="policies.dispatch.backend",
        mend="measure them (`moesim profile fit-network`), or set cost.extrapolate to allow",
    )


def _on_measured_links(found: Estimate) -> bool:
    return int(np.max(found.tags)) <= Tag.FORMULA


def packing(
    costs: CostModel, step: Step, dispatch: DispatchSpec, precision: PrecisionSpec, rows: tuple[Floats, Floats]
) -> tuple[Estimate, ...]:
    """What compression costs around one exchange: packing what leaves, unpacking what arrives; nothing without it.

    rows: elements that the busiest rank packs and unpacks, each [steps, layers or 1, 1].
    """
    if dispatch.compression is None:
        return ()
    each = BYTES_PER_ELEMENT[precision.activations] + element_bytes(step, dispatch, precision)
    names = (f"{step} quantise", f"{step} dequantise")
    return tuple(
        costs.estimate(MemoryBound(bytes=size * each, name=name)) for size, name in zip(rows, names, strict=True)
    )
