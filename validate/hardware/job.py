"""What a hardware validation is asked to run, as one frozen value that travels to every rank as JSON."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from moesim.errors import BadInput
from moesim.spec.base import Spec
from moesim.spec.placement_file import read_placement

# Spread of ln(share) of the synthetic expert profile: the hottest half of the experts then holds 84 % of the draws
# (the normal distribution function at one sigma), enough for a bad placement to be visibly slower than a good one.
SYNTHETIC_SIGMA = 1.0

Backend = Literal["gloo", "nccl"]
Replica = Literal["local_first", "equal"]
Kernel = Literal["auto", "loop", "grouped"]


class LayerShape(Spec):
    """The MoE layer: SwiGLU experts of `hidden` x `intermediate`, `top_k` of `experts` for each token."""

    hidden: int = Field(gt=0)
    intermediate: int = Field(gt=0)
    experts: int = Field(gt=0)
    top_k: int = Field(gt=0)


class PlacedCase(Spec):
    """One placement of the layer's experts: the expert in each slot, slots contiguous by rank."""

    name: str
    slots: tuple[int, ...]
    replicas: int = Field(ge=0, description="slots beyond one for each expert")


class Job(Spec):
    """One validation run; `profile` holds the share of each expert, `tokens` the tokens of a rank."""

    backend: Backend
    ranks: int = Field(gt=0)
    shape: LayerShape
    tokens: tuple[Annotated[int, Field(gt=0)], ...] = Field(min_length=1)
    profile: tuple[float, ...]
    profile_source: str
    placements: tuple[PlacedCase, ...] = Field(min_length=1)
    replica: Replica = "local_first"
    kernel: Kernel = "auto"
    repeats: int = Field(default=20, ge=4, description="timed repeats of each case")
    warmup: int = Field(default=3, ge=1)
    seed: int = Field(default=0, ge=0)
    out: str
    stall_limit_s: float = Field(default=60.0, gt=0)

    @model_validator(mode="after")
    def _agrees(self) -> Job:
        if len(self.profile) != self.shape.experts:
            raise ValueError(f"the load profile has {len(self.profile)} experts, the layer {self.shape.experts}")
        return self

    def cases(self) -> list[tuple[PlacedCase, int]]:
        """Every placement at every token count, in the order of the result arrays."""
        return [(placement, tokens) for tokens in self.tokens for placement in self.placements]


def copies_held(job: Job) -> list[Counter[int]]:
    """Copies of each expert that a rank holds for all placements, by rank: the most that any of them asks for."""
    found = []
    for rank in range(job.ranks):
        most: Counter[int] = Counter()
        for case in job.placements:
            share = len(case.slots) // job.ranks
            most |= Counter(case.slots[rank * share : (rank + 1) * share])  # the larger count of each
        found.append(most)
    return found


def synthetic_profile(experts: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """A skewed lognormal share of each expert: [experts], sum 1."""
    shares = rng.lognormal(sigma=SYNTHETIC_SIGMA, size=experts)
    return np.asarray(shares / shares.sum(), dtype=np.float64)


def file_profile(path: Path, layer: int | None) -> tuple[NDArray[np.float64], int]:
    """Share of each expert in one layer of a load file ([experts], sum 1), and that absolute layer.

    Without `layer`, the layer whose profile is the most skewed of the file. Raises BadInput.
    """
    from moesim.routing.readers import read_loads

    counts = read_loads(path)
    profiles = counts.profile()
    if layer is None:
        row = int(profiles.max(axis=1).argmax())
    else:
        rows = np.nonzero(counts.layer_ids == layer)[0]
        if not len(rows):
            known = f"{int(counts.layer_ids.min())} to {int(counts.layer_ids.max())}"
            raise BadInput(f"layer {layer} is not in the loads", where=str(path), mend=f"use a MoE layer of {known}")
        row = int(rows[0])
    return np.asarray(profiles[row], dtype=np.float64), int(counts.layer_ids[row])


def case_of_file(path: Path, *, experts: int, ranks: int, layer: int | None, taken: tuple[str, ...]) -> PlacedCase:
    """The row of a placement file for `layer` (its first row if none is named), under the file's name.

    Raises BadInput when the file is of another model or another number of ranks.
    """
    placement = read_placement(path)
    if placement.experts != experts or placement.ranks != ranks:
        raise BadInput(
            f"{placement.experts} experts on {placement.ranks} ranks, but the run has {experts} on {ranks}",
            where=str(path),
            mend=f"pass --experts {placement.experts} --ranks {placement.ranks}, or place again",
        )
    row = 0
    if layer is not None:
        rows = np.nonzero(placement.layer_ids == layer)[0]
        if not len(rows):
            raise BadInput(f"layer {layer} is not in the placement", where=str(path), mend="name one that it holds")
        row = int(rows[0])
    name = path.stem
    while name in taken:
        name += "+"
    return PlacedCase(name=name, slots=tuple(placement.physical_to_logical[row].tolist()), replicas=placement.redundant)
