"""A scenario as a search problem: its space, the plans tried first, and a search of it by any sampler and workers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moesim.engine.deployment import Groundwork, groundwork
from moesim.spec.scenario import Scenario, load_scenario
from placement.objective import Outcome
from placement.plans import Plan
from placement.space import Space, enumerate_space
from placement.tune_command import known_recipes
from placement.tuner import open_study, search


@dataclass(frozen=True)
class Problem:
    """A scenario with its space and the plans that every search tries first."""

    ground: Groundwork
    scenario: Scenario
    space: Space
    recipes: tuple[Plan, ...]

    def afresh(self) -> Problem:
        """The same problem with nothing worked out yet beyond which plans there are."""
        return replace(self, ground=groundwork(self.scenario), space=replace(self.space))


def problem_of(path: Path) -> Problem:
    """The search problem of a scenario file. Raises MoesimError."""
    ground = groundwork(load_scenario(path))
    space = enumerate_space(ground, ground.scenario)
    return Problem(ground, ground.scenario, space, tuple(known_recipes(ground, ground.scenario, space)))


def searched(problem: Problem, workers: Any, sampler: str, trials: int, seed: int) -> dict[Plan, Outcome]:
    """What a search of so many trials tried, in order."""
    chosen = problem.scenario.search.model_copy(update={"sampler": sampler})
    scenario = problem.scenario.model_copy(update={"seed": seed, "search": chosen})
    study = open_study(scenario, None, None, False)
    found = search(study, problem.space, scenario, workers, trials=trials, recipes=problem.recipes)
    return {trial.plan: trial.outcome for trial in found.trials}
