"""Axes that a search adds by key: any scalar of the scenario, with the values to try."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel

from moesim.errors import BadInput
from moesim.spec.scenario import Scenario

Scalar = str | int | float | bool | None
_S = TypeVar("_S", bound=BaseModel)

# Keys with axes of their own, and keys that say what is asked for rather than how it is run.
_OWN = {
    "parallel": "search.parallel",
    "placement": "search.solvers and search.redundant_experts",
    "policies.schedule": "search.schedules",
    "policies.dispatch.backend": "search.parallel",
}
_FIXED = (
    "schema_version", "model", "cluster", "engine.name", "cost", "routing", "objective", "search", "seed", "faults",
    "system", "serving.workload", "serving.roles",
)  # fmt: skip


@dataclass(frozen=True)
class Axis:
    """One key of the scenario and the values to try; the scenario's own comes first."""

    key: str
    values: tuple[Scalar, ...]

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rpartition(".")[2]


def axes_of(scenario: Scenario) -> tuple[Axis, ...]:
    """The axes of `search.axes`, every value checked where it goes. Raises BadInput with the key and the mend."""
    return tuple(axis_of(scenario, key, values) for key, values in (scenario.search.axes or {}).items())


def axis_of(scenario: Scenario, key: str, values: Sequence[Scalar]) -> Axis:
    """One axis, its values checked, the scenario's own first. Raises BadInput with the key and the mend."""
    where = f"search.axes.{key}"
    for held, instead in _OWN.items():
        if key == held or key.startswith(f"{held}."):
            raise BadInput(f"{key} has an axis of its own", where=where, mend=f"use {instead}")
    if any(key == held or key.startswith(f"{held}.") for held in _FIXED):
        raise BadInput(f"{key} says what is asked for, not how it runs", where=where, mend="leave it out of the search")
    own = value_at(scenario, key, where=where)
    if isinstance(own, BaseModel | tuple | list | Mapping):
        raise BadInput(f"{key} is no single value", where=where, mend="name a key below it")
    if not values:
        raise BadInput("there is no value to try", where=where, mend="list at least one")
    return Axis(key, tuple(dict.fromkeys([own, *(_checked(scenario, key, value, where) for value in values)])))


def _checked(scenario: Scenario, key: str, value: Scalar, where: str) -> Scalar:
    """The value as the scenario's own field reads it. Raises BadInput."""
    if isinstance(value, float) and not math.isfinite(value):
        raise BadInput(f"{value} is no value to try", where=where, mend="list numbers, words, true or false")
    data = scenario.model_dump(mode="json", exclude_none=True)
    node = data
    *parents, last = key.split(".")
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = value
    found: Scalar = value_at(Scenario.read(data, where=where), key, where=where)
    return found


def value_at(scenario: Scenario, key: str, *, where: str) -> Any:
    """What stands under a dotted key. Raises BadInput where there is no such key, or nothing above it."""
    node: Any = scenario
    for part in key.split("."):
        if not isinstance(node, BaseModel) or part not in type(node).model_fields:
            raise BadInput(f"the scenario has no key {key}", where=where, mend="see docs/reference/scenario.md")
        node = getattr(node, part)
    return node


def with_value(scenario: Scenario, key: str, value: Scalar) -> Scenario:
    """The scenario with another value under a dotted key that `axes_of` has checked."""
    return _set(scenario, key.split("."), value)


def _set(spec: _S, path: Sequence[str], value: Scalar) -> _S:
    if len(path) == 1:
        return spec.model_copy(update={path[0]: value})
    return spec.model_copy(update={path[0]: _set(getattr(spec, path[0]), path[1:], value)})
