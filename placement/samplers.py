"""Optuna's samplers by the name in `search.sampler`, and which of them fit a search."""

from __future__ import annotations

from copy import copy

import optuna
from optuna.trial import FrozenTrial, Trial

from moesim.errors import BadInput, MissingPart
from moesim.spec.scenario import Scenario
from placement.space import Space

# Trials of a generation, and trials before a model-based sampler stops drawing at random.
POPULATION = STARTUP = 16
GENETIC = {"nsga2": "NSGAIISampler", "nsga3": "NSGAIIISampler"}


def refuse_sampler(scenario: Scenario) -> None:
    """Raises BadInput for a sampler that does not fit the search, MissingPart for one that is not installed."""
    name, where = scenario.search.sampler, "search.sampler"
    mend = "use auto, tpe, nsga2, nsga3, gp or random"
    slo = scenario.objective.slo.limits() if scenario.serving is not None else {}
    bound = "objective.slo" if slo else "objective.limits" if scenario.training is not None else ""
    if name in ("cmaes", "qmc") and bound:
        raise BadInput(f"{name} ignores constraints, and {bound} sets some", where=where, mend=mend)
    if name == "cmaes":
        raise BadInput(
            "cmaes takes one objective over numbers: here are two, over choices", where=where, mend=f"{mend}, or qmc"
        )
    if name == "gp":
        try:
            import torch  # noqa: F401
        except ImportError:
            raise MissingPart("search.sampler gp needs PyTorch", mend="pip install torch, or use auto") from None


def sampler_of(name: str, seed: int, told: int) -> optuna.samplers.BaseSampler:
    """The sampler of one batch. told: trials before it."""
    samplers = optuna.samplers
    if name == "tpe":
        return samplers.TPESampler(seed=seed, constant_liar=True, n_startup_trials=STARTUP)
    if name == "nsga2":
        return samplers.NSGAIISampler(seed=seed, population_size=POPULATION)
    if name == "nsga3":
        return samplers.NSGAIIISampler(seed=seed, population_size=POPULATION)
    if name == "gp":
        return samplers.GPSampler(seed=seed, n_startup_trials=STARTUP, deterministic_objective=True)
    if name == "qmc":
        return samplers.QMCSampler(seed=seed, scramble=True)
    return samplers.RandomSampler(seed=seed)


def suggested(trial: Trial, space: Space, name: str) -> tuple[str, ...]:
    """The values that the sampler asks for, in the order of `space.choices`; a quasi-random one takes numbers."""
    if name == "qmc":
        return tuple(
            choices[trial.suggest_int(f"{key}, by number", 0, len(choices) - 1)]
            for key, choices in space.choices.items()
        )
    return tuple(trial.suggest_categorical(key, choices) for key, choices in space.choices.items())


def generation_of(stored: FrozenTrial, number: int, name: str) -> FrozenTrial:
    """The trial as a genetic sampler left it: in its generation; others as they are."""
    if name not in GENETIC:
        return stored
    found = copy(stored)
    found.system_attrs = {**stored.system_attrs, f"{GENETIC[name]}:generation": number // POPULATION}
    return found
