"""The engine's rules with the host times that a scenario gives, or that were calibrated against measured runs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

from moesim.cost.estimate import Tag
from moesim.cost.host import HostTime
from moesim.engine.rules import EngineRules, engine_rules
from moesim.errors import BadInput
from moesim.spec.overheads import NAMES, CalibrationSpec, HostTimeSpec, OverheadsSpec, read_calibration
from moesim.spec.scenario import Scenario

PARTS = dict(zip(NAMES, ("request", "step", "layer"), strict=True))
"""Key of a scenario or file -> field of EngineRules."""


def rules_of(scenario: Scenario, *, system: str) -> EngineRules:
    """The rules of a scenario's engine, with its `cost.overheads`. Raises BadInput.

    system: name of the cluster's GPUs. Calibrated times stay `measured` where engine, version, model and system are
    those that they were measured on; on any other model, version or system they are `extrapolated`; another engine's
    are refused.
    """
    rules = engine_rules(scenario.engine.name)
    given = scenario.cost.overheads
    if given is None:
        return rules
    if isinstance(given, OverheadsSpec):
        asked = {name: value for name, value in given.model_dump().items() if value is not None}
        sigma = rules.overhead_rel_sigma
        return _with(rules, {name: HostTime(value, sigma, Tag.ASSUMED, "scenario") for name, value in asked.items()})
    found = read_calibration(given)
    if found.engine.name != scenario.engine.name:
        raise BadInput(
            f"these overheads are of {found.engine.name}, the scenario runs {scenario.engine.name}",
            where=str(given),
            mend="calibrate against runs of this engine, or leave cost.overheads out",
        )
    here = (scenario.engine.version, Path(scenario.model).name, system)
    same = here == (found.engine.version, Path(found.model).name, found.system)
    source = f"{Path(given).name}, written {found.written[:10]}"
    return _with(rules, {name: _host_time(one, found, source, same) for name, one in found.overheads.items()})


def _host_time(one: HostTimeSpec, found: CalibrationSpec, source: str, same: bool) -> HostTime:
    tag = Tag[one.tag.upper()]
    return HostTime(one.value, _sigma(one, found.level), tag if same else max(tag, Tag.EXTRAPOLATED), source)


def _sigma(one: HostTimeSpec, level: float) -> float:
    """Standard deviation of the logarithm whose central interval is as wide as the fitted one; 0 for a value of 0."""
    if one.low is None or one.high is None or one.value == 0:
        return 0.0
    return math.log1p((one.high - one.low) / (2.0 * one.value)) / NormalDist().inv_cdf((1.0 + level) / 2.0)


def _with(rules: EngineRules, times: dict[str, HostTime]) -> EngineRules:
    return replace(rules, **{PARTS[name]: one for name, one in times.items()})  # type: ignore[arg-type]


def overheads_json(rules: EngineRules) -> dict[str, dict[str, object]]:
    """Each host time that a run used, with its tag and source."""
    return {
        name: {"value_s": one.seconds, "rel_sigma": one.rel_sigma, "tag": one.tag.label, "source": one.source}
        for name, one in ((name, getattr(rules, part)) for name, part in PARTS.items())
    }
