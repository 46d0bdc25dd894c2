"""An expert placement: which replica of which expert of which layer sits in which slot of which rank."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import BadInput, Infeasible
from moesim.files import write_json

if TYPE_CHECKING:
    from moesim.spec.layer_cost import LayerCost

FORMAT = "moesim-placement"


@dataclass(frozen=True, eq=False)
class ExpertPlacement:
    """A placement of all MoE layers.

    physical_to_logical: int64 [layers, slots], the expert in each slot; slots lie contiguous by rank.
    layer_ids: int64 [layers], the absolute layer of each row. experts: experts of a layer. ranks: EP ranks.
    absolute_layers: rows of the model's absolute layer axis (dense layers included).
    Raises BadInput when a shape is off, Infeasible when the slots do not divide by the ranks or an expert has none.
    """

    physical_to_logical: NDArray[np.int64]
    layer_ids: NDArray[np.int64]
    experts: int
    ranks: int
    absolute_layers: int
    solver: str = "file"
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        table = self.physical_to_logical
        if table.ndim != 2 or table.shape[0] != len(self.layer_ids):
            raise BadInput(
                f"a map of shape {table.shape} does not fit {len(self.layer_ids)} layers",
                mend="give [layers, slots]",
            )
        if table.shape[1] % self.ranks:
            raise Infeasible(
                f"{table.shape[1]} slots do not divide by {self.ranks} ranks",
                mend=f"use {-(-table.shape[1] // self.ranks) * self.ranks} slots",
                reason="slots_not_divisible",
            )
        if table.size and (table.min() < 0 or table.max() >= self.experts):
            raise BadInput(f"an expert id lies outside 0 to {self.experts - 1}", mend="correct the map")
        lacking = np.nonzero((self.replica_counts() == 0).any(axis=1))[0]
        if len(lacking):
            row = int(lacking[0])
            expert = int(np.nonzero(self.replica_counts()[row] == 0)[0][0])
            raise BadInput(
                f"layer {int(self.layer_ids[row])} holds no replica of expert {expert}",
                mend="give every expert a slot",
            )

    @property
    def layers(self) -> int:
        """MoE layers."""
        return int(self.physical_to_logical.shape[0])

    @property
    def slots(self) -> int:
        """Slots of a layer over all ranks."""
        return int(self.physical_to_logical.shape[1])

    @property
    def slots_per_rank(self) -> int:
        """Slots of a layer on one rank."""
        return self.slots // self.ranks

    @property
    def redundant(self) -> int:
        """Slots beyond one for each expert."""
        return self.slots - self.experts

    def replica_counts(self) -> NDArray[np.int64]:
        """Replicas of each expert: [layers, experts]."""
        counts = np.zeros((self.layers, self.experts), dtype=np.int64)
        rows = np.repeat(np.arange(self.layers), self.slots)
        np.add.at(counts, (rows, self.physical_to_logical.ravel()), 1)
        return counts

    def slot_loads(self, counts: NDArray[np.float64], shares: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
        """Split of `counts` [..., layers, experts] over the replicas: [..., layers, slots].

        shares: [layers, slots], the part of its expert's tokens that each slot serves; equal parts without.
        """
        whole = counts if shares is not None else counts / self.replica_counts()
        index = (self.physical_to_logical + np.arange(self.layers)[:, None] * self.experts).ravel()
        slots = np.take(whole.reshape(*counts.shape[:-2], self.layers * self.experts), index, axis=-1)
        split = slots.reshape(*counts.shape[:-2], self.layers, self.slots)
        if shares is not None:
            split = np.multiply(split, shares, out=split if split.dtype == np.float64 else None)
        return np.asarray(split, dtype=np.float64)

    def rank_loads(self, counts: NDArray[np.float64], shares: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
        """Tokens of each rank: [..., layers, ranks]; shares as in `slot_loads`."""
        slots = self.slot_loads(counts, shares)
        return np.asarray(
            slots.reshape(*slots.shape[:-1], self.ranks, self.slots_per_rank).sum(axis=-1), dtype=np.float64
        )

    def duplicates_on_one_rank(self) -> int:
        """Slots wasted on a second replica of an expert that its rank already holds, over all layers."""
        local = np.sort(self.physical_to_logical.reshape(self.layers, self.ranks, self.slots_per_rank), axis=-1)
        return int((np.diff(local, axis=-1) == 0).sum())

    def to_json(self) -> dict[str, Any]:
        """The moesim format, ready for `json.dump`."""
        return {
            "format": FORMAT,
            "schema_version": 1,
            "experts": self.experts,
            "ranks": self.ranks,
            "absolute_layers": self.absolute_layers,
            "solver": self.solver,
            "layer_ids": self.layer_ids.tolist(),
            "physical_to_logical": self.physical_to_logical.tolist(),
            "notes": self.notes,
        }

    def write(self, path: Path) -> None:
        """Write the moesim format whole or not at all."""
        write_json(path, self.to_json())


@dataclass(frozen=True)
class PlacementRequest:
    """What a solver is asked for; every solver of `moesim.solvers` is a callable of this to an ExpertPlacement.

    loads: float64 [scenarios, layers, experts], each scaled to sum 1 in each layer; weights: [scenarios], sum 1.
    slots: per layer, over all ranks. groups: expert groups that must stay on one node (1 = no such constraint).
    nodes prices traffic only, unless groups > 1. cost: what a layer costs in time, for solvers on time; None = unknown.
    current: the placement that stands, of as many slots; None = none. effort: share of its usual work that a solver
    which searches for long may spend; the others take no notice.
    Where loads tell which experts a token picks together: coactivation,
    float64 [layers, experts, experts], the chance that a token picks both, symmetric, 0 on the diagonal; transitions,
    float64 [layers - 1, experts, experts], the chance that it picks one in a layer and the other in the next.
    dispersion: float64 [layers, experts, experts], covariance of the experts' shares from step to step.
    """

    loads: NDArray[np.float64]
    weights: NDArray[np.float64]
    layer_ids: NDArray[np.int64]
    absolute_layers: int
    slots: int
    ranks: int
    nodes: int = 1
    groups: int = 1
    seed: int = 0
    cost: LayerCost | None = None
    current: ExpertPlacement | None = None
    coactivation: NDArray[np.float64] | None = None
    transitions: NDArray[np.float64] | None = None
    dispersion: NDArray[np.float64] | None = None
    effort: float = 1.0

    def __post_init__(self) -> None:
        if self.loads.ndim != 3:
            raise BadInput(f"loads have {self.loads.ndim} axes", mend="give [scenarios, layers, experts]")
        layers, experts = self.loads.shape[1:]
        for name, table, rows in (
            ("coactivation", self.coactivation, layers),
            ("transitions", self.transitions, layers - 1),
            ("dispersion", self.dispersion, layers),
        ):
            if table is not None and table.shape != (rows, experts, experts):
                raise BadInput(f"{name} of shape {table.shape}", mend=f"give [{rows}, {experts}, {experts}]")
        if self.slots % self.ranks:
            raise Infeasible(
                f"{self.slots} slots do not divide by {self.ranks} ranks",
                mend=f"use {-(-max(self.slots, experts) // self.ranks) * self.ranks} slots",
                reason="slots_not_divisible",
            )
        if self.slots < experts:
            raise Infeasible(
                f"{self.slots} slots are fewer than the {experts} experts",
                mend=f"use at least {experts} slots",
                reason="too_few_slots",
            )
        if self.slots > experts * self.ranks:
            raise Infeasible(
                f"{self.slots} slots are more than one replica of {experts} experts on each of {self.ranks} ranks",
                mend=f"use at most {experts * self.ranks} slots",
                reason="too_many_slots",
            )
        stands = self.current
        if stands is not None and (
            (stands.experts, stands.slots, stands.ranks) != (experts, self.slots, self.ranks)
            or not np.array_equal(stands.layer_ids, self.layer_ids)
        ):
            raise BadInput(
                f"the current placement has {stands.layers} layers x {stands.experts} experts in {stands.slots} slots "
                f"on {stands.ranks} ranks, not {self.layers} x {experts} in {self.slots} on {self.ranks}",
                where="current",
                mend="give the placement that these loads ran under, with as many slots",
            )

    @property
    def experts(self) -> int:
        """Experts of a layer."""
        return int(self.loads.shape[2])

    @property
    def layers(self) -> int:
        """MoE layers."""
        return int(self.loads.shape[1])

    def mix(self) -> NDArray[np.float64]:
        """The weighted mean of the load scenarios: [layers, experts], each layer sums to 1."""
        return np.asarray(np.tensordot(self.weights, self.loads, axes=1), dtype=np.float64)

    def placement(self, physical_to_logical: NDArray[np.int64], solver: str, **notes: Any) -> ExpertPlacement:
        """Wrap a solver's table."""
        return ExpertPlacement(
            physical_to_logical=np.ascontiguousarray(physical_to_logical, dtype=np.int64),
            layer_ids=self.layer_ids,
            experts=self.experts,
            ranks=self.ranks,
            absolute_layers=self.absolute_layers,
            solver=solver,
            notes=dict(notes),
        )


def max_over_mean(rank_loads: NDArray[np.float64]) -> NDArray[np.float64]:
    """Largest over mean load along the last axis; 1 where there is no load at all."""
    mean = rank_loads.mean(axis=-1)
    return np.asarray(np.where(mean > 0, rank_loads.max(axis=-1) / np.where(mean > 0, mean, 1.0), 1.0))


def mean_over_max(rank_loads: NDArray[np.float64]) -> NDArray[np.float64]:
    """Balancedness as vLLM and SGLang define it: mean over largest load along the last axis."""
    return np.asarray(1.0 / max_over_mean(rank_loads))
