"""Expert counts as they come from a router: one aggregate, or one record for each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from moesim.errors import BadInput
from moesim.routing.records import Records

if TYPE_CHECKING:
    from moesim.routing.picks import TokenPicks


@dataclass(frozen=True)
class RoutingCounts:
    """Tokens that each expert got: counts float64 [steps, layers, experts]; an aggregate has one step.

    layer_ids: int64 [layers], absolute layers of the rows (MoE layers only). absolute_layers: rows of the source's
    absolute layer axis, dense ones included. per_step: the steps are separate forward passes (else one aggregate).
    law, picks: how an expert's count in a step is distributed (moesim/routing/gates/registry.py), and the mean
    number of experts that a token picks (None: the model's top-k). records: the same counts by request, where the
    source tells requests apart. tokens: the same picks by token, where they were read (`read_tokens`). prompt_tokens:
    mean length of the prompts, where the user told it.
    """

    counts: NDArray[np.float64]
    layer_ids: NDArray[np.int64]
    absolute_layers: int
    name: str
    phase: str = "any"
    weight: float = 1.0
    per_step: bool = False
    law: Literal["top_k", "even", "variable"] = "top_k"
    picks: float | None = None
    records: Records | None = None
    tokens: TokenPicks | None = None
    prompt_tokens: float | None = None

    def __post_init__(self) -> None:
        if self.counts.ndim != 3:
            raise BadInput(
                f"counts have {self.counts.ndim} axes", where=self.name, mend="give [steps, layers, experts]"
            )
        if self.counts.size == 0:
            raise BadInput("there are no counts", where=self.name, mend="record a loaded server")
        if not np.isfinite(self.counts).all() or (self.counts < 0).any():
            raise BadInput("a count is negative or not a number", where=self.name, mend="record the counts again")
        empty = np.nonzero(self.counts.sum(axis=(0, 2)) == 0)[0]
        if len(empty):
            raise BadInput(
                f"layer {int(self.layer_ids[empty[0]])} counts no token at all",
                where=self.name,
                mend="record a loaded server",
            )

    @property
    def experts(self) -> int:
        """Experts of a layer."""
        return int(self.counts.shape[2])

    def profile(self) -> NDArray[np.float64]:
        """Share of each expert in its layer: [layers, experts], each row sums to 1."""
        total = self.counts.sum(axis=0)
        return np.asarray(total / total.sum(axis=1, keepdims=True))


def stack_profiles(loads: Sequence[RoutingCounts]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Profiles [scenarios, layers, experts] and weights [scenarios] (sum 1); each file counts by its weight alone.

    Raises BadInput when the files disagree in layers or experts, which says in what.
    """
    first = loads[0]
    for other in loads[1:]:
        alike = other.counts.shape[1:] == first.counts.shape[1:]
        if alike and not np.array_equal(other.layer_ids, first.layer_ids):
            raise BadInput(
                f"its layers are {_numbers(other)}, those of {first.name} {_numbers(first)}",
                where=other.name,
                mend="number layers alike (absolute, the dense ones too, which count nothing), or give a scenario, "
                "whose model tells them",
            )
        if not alike:
            raise BadInput(
                f"{other.counts.shape[1]} layers x {other.experts} experts, but {first.name} has "
                f"{first.counts.shape[1]} x {first.experts}",
                where=other.name,
                mend="give files of one model",
            )
    weights = np.asarray([load.weight for load in loads], dtype=np.float64)
    return np.stack([load.profile() for load in loads]), weights / weights.sum()


def at_most(shares: NDArray[np.float64], most: float) -> NDArray[np.float64]:
    """Shares [..., experts], rows of sum 1, none above `most`: what one has beyond it goes to the others in proportion.

    most: at least one share of the experts; one pick of every token's k is 1 / k.
    """
    if most * shares.shape[-1] <= 1.0:  # all of them are full, and nobody is left to give to
        return np.full(shares.shape, 1.0 / shares.shape[-1])
    while (shares > most * (1.0 + 1e-12)).any():
        full = shares >= most
        rest = np.where(full, 0.0, shares)
        rest = np.where(rest.sum(axis=-1, keepdims=True) > 0, rest, ~full)  # nobody else had any: all of them alike
        left = 1.0 - most * full.sum(axis=-1, keepdims=True)
        shares = np.where(full, most, rest * left / rest.sum(axis=-1, keepdims=True))
    return np.asarray(shares)


def _numbers(loads: RoutingCounts) -> str:
    """The layers as 3 to 60, or one by one where some between are left out; at most four of those."""
    ids = loads.layer_ids.tolist()
    if len(ids) > 1 and ids[-1] - ids[0] == len(ids) - 1:
        return f"{ids[0]} to {ids[-1]}"
    return ", ".join(map(str, ids[:4])) + (f", ... {ids[-1]}" if len(ids) > 4 else "")
