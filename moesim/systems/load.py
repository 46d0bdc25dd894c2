"""Named systems of the literature: presets of a scenario's `policies`."""

from __future__ import annotations

import difflib
import functools
from importlib import resources
from typing import Any

from moesim.errors import BadInput
from moesim.spec.base import Spec
from moesim.spec.scenario import PoliciesSpec, Scenario
from moesim.spec.yaml_text import parse_yaml


class NamedSystem(Spec):
    """A choice on each policy axis, as a published system makes it."""

    name: str
    title: str
    source: str
    notes: str = ""
    policies: PoliciesSpec


@functools.cache
def systems() -> dict[str, NamedSystem]:
    """All named systems, in order of name."""
    found = {}
    for entry in sorted(resources.files("moesim.systems").iterdir(), key=lambda item: item.name):
        if entry.name.endswith(".yaml"):
            name = entry.name.removesuffix(".yaml")
            data = {"name": name, **parse_yaml(entry.read_text(encoding="utf-8"))}
            found[name] = NamedSystem.read(data, where=entry.name)
    return found


def load_system(name: str, *, where: str = "system") -> NamedSystem:
    """One named system. Raises BadInput for an unknown name."""
    found = systems().get(name.strip().lower())
    if found is None:
        near = difflib.get_close_matches(name, systems(), n=1, cutoff=0.5)
        guess = f"did you mean {near[0]}? " if near else ""
        raise BadInput(f"unknown system {name!r}", where=where, mend=f"{guess}use one of {', '.join(systems())}")
    return found


def apply_system(scenario: Scenario) -> Scenario:
    """The scenario with its named system's policies; keys that it writes under `policies` itself win.

    The result names no system any more. Raises BadInput for an unknown name.
    """
    if scenario.system is None:
        return scenario
    preset = load_system(scenario.system).policies.model_dump()
    written = scenario.policies.model_dump(exclude_unset=True)
    policies = PoliciesSpec.read(_merged(preset, written), where="policies")
    return scenario.model_copy(update={"policies": policies, "system": None})


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        result[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result
