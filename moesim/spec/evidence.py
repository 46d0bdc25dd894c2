"""What validations on record show, and what a verdict leans on: one vocabulary for both, compared trait by trait."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from pydantic import Field

from moesim.spec.base import Spec
from moesim.spec.parallel import ParallelSpec

Claim = Literal[
    "serving_time", "placement_gain", "exchange_time", "expert_time", "capacity_drops", "training_step"
]  # fmt: skip
CLAIMS: tuple[Claim, ...] = get_args(Claim)
# What must agree for a record to cover a claim, what matters most first. `cluster` counts over several
# nodes: GPUs of one name meet over networks of many kinds.
TRAITS: dict[Claim, tuple[str, ...]] = {
    "serving_time": ("gpu", "model", "engine", "layout", "experts_dtype", "drafts", "isl", "osl", "concurrency"),
    "placement_gain": ("gpu", "exchange", "nodes", "cluster", "ranks", "layer", "experts_dtype", "tokens_per_rank"),
    "exchange_time": ("gpu", "exchange", "nodes", "cluster", "ranks", "rank_bytes"),
    "expert_time": ("gpu", "layer", "experts_dtype", "tokens_per_rank"),
    "capacity_drops": ("rule", "drop", "backup", "pad"),
    "training_step": ("gpu", "exchange", "nodes", "cluster", "ranks", "model", "layout"),
}
# A name, a number, or the range from the least to the most that was run, or that is asked for.
Trait = str | int | tuple[float, float]


class Evidence(Spec):
    """What one record shows of one claim.

    record: its name. traits: of what ran, by the names of TRAITS; one that is left out is not told and agrees with
    nothing. errors: predicted over measured less 1, of each case; or only their mean absolute value. between: the
    same with the error that alternatives share taken out. others: mean absolute errors of further figures. missed:
    limits that the record was held to and missed.
    """

    claim: Claim
    record: str = Field(min_length=1)
    command: str = ""
    date: str = ""
    versions: dict[str, str] = Field(default_factory=dict)
    traits: dict[str, Trait]
    cases: int = Field(gt=0)
    figure: str = Field(default="", description="whose error, for a person: `TPOT`, `layer time`")
    errors: tuple[float, ...] = ()
    between: tuple[float, ...] = ()
    mean_absolute: float | None = Field(default=None, ge=0)
    others: dict[str, float] = Field(default_factory=dict)
    checks: int = Field(default=0, ge=0)
    missed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Leaning:
    """One thing that a verdict leans on: of what, for a person, and the traits that a record must have to cover it."""

    claim: Claim
    of: str
    traits: dict[str, Trait] = field(default_factory=dict)


def differences(leaning: Leaning, ran: Mapping[str, Trait]) -> list[str]:
    """The traits in which what ran differs from what is asked, in the order of TRAITS.

    A name or number must be equal; a range must lie inside what ran. What is not told agrees with nothing.
    """
    asked = leaning.traits
    return [name for name in TRAITS[leaning.claim] if name in asked and not _covers(ran.get(name), asked[name])]


def _covers(ran: Trait | None, asked: Trait) -> bool:
    if isinstance(asked, tuple) and isinstance(ran, tuple):
        return ran[0] <= asked[0] and asked[1] <= ran[1]
    if isinstance(asked, int) and isinstance(ran, tuple):
        return ran[0] <= asked <= ran[1]
    return ran == asked


def trait_words(value: Trait) -> str:
    """`4`, `DeepEP`, `8 to 512`."""
    if isinstance(value, tuple):
        low, high = (f"{one:,.0f}" for one in value)
        return low if low == high else f"{low} to {high}"
    return str(value)


def device_trait(name: str) -> str:
    """A GPU by its driver's name without the maker's; any processor is `CPU`."""
    plain = re.sub(r"^nvidia\s+", "", name.strip(), flags=re.IGNORECASE)
    return "CPU" if re.search(r"xeon|epyc|intel|amd ryzen|\bcpu\b|neoverse|processor", plain, re.IGNORECASE) else plain


def layout_trait(parallel: ParallelSpec, backend: str, schedule: str = "sequential") -> str:
    """Parallelism, dispatcher and overlap in words."""
    return f"{parallel.label()} {backend}" + ("" if schedule == "sequential" else f" {schedule}")


def training_layout_trait(
    parallel: ParallelSpec, backend: str, schedule: str, pipeline: str, virtual_stages: int
) -> str:
    """`layout_trait` with the pipeline's schedule: `PP2 alltoall, interleaved by 3`."""
    stages = "" if pipeline == "1f1b" else f", {pipeline}" + (f" by {virtual_stages}" if virtual_stages > 1 else "")
    return layout_trait(parallel, backend, schedule) + stages


def layer_trait(experts: int, hidden: int, intermediate: int, top_k: int) -> str:
    """A layer's shape in words."""
    return f"{experts} experts of {hidden} x {intermediate}, top-{top_k}"
