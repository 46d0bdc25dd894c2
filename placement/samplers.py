"""Optuna's samplers by the name in `search.sampler`, and which of them fit a search."""

from __future__ import annotations

import warnings
from copy import copy

import numpy as np
import optuna
from optuna.trial import FrozenTrial
from scipy.stats.qmc import Sobol

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


def sampler_of(name: str, seed: int) -> optuna.samplers.BaseSampler:
    """Optuna's sampler of one batch."""
    samplers = optuna.samplers
    if name == "tpe":
        return samplers.TPESampler(seed=seed, constant_liar=True, n_startup_trials=STARTUP)
    if name == "nsga2":
        return samplers.NSGAIISampler(seed=seed, population_size=POPULATION)
    if name == "nsga3":
        return samplers.NSGAIIISampler(seed=seed, population_size=POPULATION)
    if name == "gp":
        return samplers.GPSampler(seed=seed, n_startup_trials=STARTUP, deterministic_objective=True)
    return samplers.RandomSampler(seed=seed)


def quasi_random(space: Space, seed: int, first: int, count: int) -> list[tuple[str, ...]]:
    """Values of the choices at points `first` onwards of one scrambled Sobol sequence, in the order of the choices."""
    sequence = Sobol(len(space.choices), rng=np.random.default_rng([seed, 12]))
    sequence.fast_forward(first)
    sizes = [len(choices) for choices in space.choices.values()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # balance needs powers of two; a search takes what it takes
        indices = (sequence.random(count) * sizes).astype(int)
    choices = list(space.choices.values())
    return [tuple(named[index] for named, index in zip(choices, row, strict=True)) for row in indices]


def generation_of(stored: FrozenTrial, number: int, name: str) -> FrozenTrial:
    """The trial as a genetic sampler left it: in its generation; others as they are."""
    if name not in GENETIC:
        return stored
    found = copy(stored)
    found.system_attrs = {**stored.system_attrs, f"{GENETIC[name]}:generation": number // POPULATION}
    return found
