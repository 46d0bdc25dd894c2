"""The same step model under other host times: what was priced stays, only the engine's overheads change."""

from __future__ import annotations

from dataclasses import replace

from moesim.engine.rules import EngineRules
from moesim.engine.stepmodel import StepModel, TimedModel
from moesim.engine.steptable import PricedGrid
from moesim.graph.plan_pricer import PlanPricer
from moesim.graph.priced_step import Part, PricedStep


def with_host_times(model: StepModel, rules: EngineRules) -> StepModel:
    """A model that times steps with the host times of `rules`; grids are priced once, by the model that is given."""
    return _Other(model, rules)


class _Other(StepModel):
    """A StepModel that takes its priced grids from another one."""

    def __init__(self, priced: StepModel, rules: EngineRules) -> None:
        vars(self).update(vars(priced))
        setup = replace(priced.deployment.setup, step=rules.step, layer=rules.layer)
        self.priced = priced
        self.deployment = replace(priced.deployment, rules=rules, setup=setup)
        self.pricer = PlanPricer(setup, priced.deployment.ground.costs)
        self.grids = {}
        self.base = TimedModel(self, None)

    def grid(self, kind: str) -> PricedGrid:
        """The other model's grid with this one's host times."""
        if kind not in self.grids:
            found = self.priced.grid(kind)
            self.grids[kind] = replace(found, priced=self._hosted(found.priced))
        return self.grids[kind]

    def _hosted(self, priced: PricedStep) -> PricedStep:
        rules = self.deployment.rules
        return replace(
            priced,
            overhead=Part((rules.step.estimate(),)),
            eager=Part((rules.layer.estimate(),)) if priced.eager.estimates else Part(),
            others=tuple(self._hosted(other) for other in priced.others),
        )
