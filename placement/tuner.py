"""The search: Optuna asks, the simulator answers, in batches of fixed size that are durable when they end."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.exc import SQLAlchemyError

from moesim.errors import BadInput, MoesimError
from moesim.spec.scenario import Scenario
from placement.executors import Workers
from placement.objective import Outcome
from placement.space import Plan, Space

# Trials of a batch: told together, in order, so that any number of workers gives the same study.
BATCH = 8
STUDY = "moesim"
# Searches of more trials than this take a first look at each plan; those of fewer simulate each in full.
FIRST_LOOK_ABOVE = 64
_OUTCOME = "outcome"
_ASKS = 2  # a sampler that keeps asking for plans already tried gives way to a random untried one
# Trials that the sampler learns from: its time for a question grows with them (TPE: 11 ms at 200, 73 at 5,000), and
# the best ones and the newest say most. Fewer than these are all shown to it.
SHOWN_BEST, SHOWN_NEWEST = 24, 40


@dataclass(frozen=True)
class Trial:
    """A finished trial."""

    number: int
    plan: Plan
    outcome: Outcome


@dataclass(frozen=True)
class Search:
    """A finished search. exhausted: every legal plan was evaluated.

    settled: numbers of the trials that were simulated in full after a first look at all; None = all were in full.
    """

    trials: tuple[Trial, ...]
    exhausted: bool
    resumed: int
    settled: frozenset[int] | None = None

    @property
    def answers(self) -> list[Trial]:
        """Trials that ran in full: those that an answer may rest on."""
        return [
            trial
            for trial in self.trials
            if trial.outcome.status == "ok" and (self.settled is None or trial.number in self.settled)
        ]

    def infeasible(self) -> dict[str, int]:
        """Trials that could not run, by reason."""
        return dict(Counter(trial.outcome.status for trial in self.trials if trial.outcome.status != "ok"))


def open_study(scenario: Scenario, out: Path | None, storage: str | None, resume: bool) -> optuna.Study:
    """The study of a run: in a journal file of the run folder, at a storage URL, or in memory.

    Raises BadInput when there is one already and `resume` was not asked for, or when it cannot be opened.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    fingerprint = scenario.model_dump_json()
    try:
        study = optuna.create_study(
            study_name=STUDY, storage=_storage(out, storage), load_if_exists=resume, directions=["maximize", "minimize"]
        )
    except optuna.exceptions.DuplicatedStudyError:
        raise BadInput(
            "there is a search here already", where=str(storage or out), mend="add --resume, or choose another --out"
        ) from None
    except (OSError, ValueError, KeyError, ImportError, SQLAlchemyError) as error:
        raise BadInput(
            f"the stored search cannot be opened ({type(error).__name__})",
            where=str(storage or out),
            mend="choose another --out",
        ) from None
    stored = study.user_attrs.get("scenario")
    if stored is not None and stored != fingerprint:
        raise BadInput(
            "the stored search is of another scenario", where=str(storage or out), mend="choose another --out"
        )
    if stored is None:
        study.set_user_attr("scenario", fingerprint)
    return study


def takes_first_look(study: optuna.Study, trials: int) -> bool:
    """Whether the search takes a first look at each plan: decided once, when it begins, by the trials asked for."""
    stored = study.user_attrs.get("first_look")
    if stored is None:
        stored = trials > FIRST_LOOK_ABOVE
        study.set_user_attr("first_look", stored)
    return bool(stored)


def _storage(out: Path | None, storage: str | None) -> Any:
    if storage is not None:
        return storage
    if out is None:
        return None
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    out.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(str(out / "study.journal")))


def search(
    study: optuna.Study,
    space: Space,
    scenario: Scenario,
    workers: Workers,
    *,
    trials: int,
    recipes: Sequence[Plan],
    progress: Callable[[float], None] | None = None,
) -> Search:
    """Run the search up to `trials` finished trials in all, those of a resumed study included.

    Recipes come first; then the sampler, seeded by batch. Where the whole space is no larger than `trials`, all of it
    is evaluated in order instead.
    """
    finished = list(_stored(study, space))
    frozen = [_frozen(trial.plan, trial.outcome, space) for trial in finished]
    resumed = len(finished)
    target = min(trials, space.size)
    whole = not space.estimated and trials >= space.size
    while len(finished) < target:
        # A batch follows from the trials before it alone, so that one cut short by a crash goes on as it was.
        start = len(finished) - len(finished) % BATCH
        before = finished[:start]
        rng = np.random.default_rng([scenario.seed, 9, start])
        seen = {trial.plan for trial in before}
        first = [plan for plan in (space.plans if whole else recipes) if plan not in seen]
        batch = list(dict.fromkeys(first))[:BATCH]
        if len(batch) < BATCH:
            stored = [frozen[trial.number] for trial in _telling(before)]
            batch += _ask(stored, scenario, space, seen | set(batch), BATCH - len(batch), rng)
        batch = batch[len(finished) - start : target - start]
        outcomes = workers.evaluate(batch)
        for plan, outcome in zip(batch, outcomes, strict=True):
            frozen.append(_frozen(plan, outcome, space))
            _store(study, frozen[-1])
            finished.append(Trial(len(finished), plan, outcome))
        if not batch:
            break  # a large space in which no untried legal plan is found any more
        if progress is not None:
            progress(len(finished) / target)
    return Search(tuple(finished), not space.estimated and len(finished) >= space.size, resumed)


def _telling(trials: list[Trial]) -> list[Trial]:
    """The trials that the sampler learns from, in order: the best and the newest."""
    if len(trials) <= SHOWN_BEST + SHOWN_NEWEST:
        return trials

    def rank(trial: Trial) -> tuple[float, ...]:
        if trial.outcome.status != "ok":
            return (math.inf,)
        maximised, minimised = trial.outcome.goals()
        return (max(trial.outcome.violation, 0.0), -maximised, minimised)

    best = sorted(trials[:-SHOWN_NEWEST], key=rank)[:SHOWN_BEST]
    return sorted([*best, *trials[-SHOWN_NEWEST:]], key=lambda trial: trial.number)


def _ask(
    stored: list[FrozenTrial],
    scenario: Scenario,
    space: Space,
    seen: set[Plan],
    room: int,
    rng: np.random.Generator,
) -> list[Plan]:
    """Plans that the sampler asks for and nobody has tried; untried ones at random where it repeats itself."""
    seed = int(rng.integers(2**31))
    sampler: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler(seed=seed)
    if scenario.search.sampler == "tpe":
        sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True, n_startup_trials=2 * BATCH)
    scratch = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    scratch.add_trials(stored)
    found: list[Plan] = []
    # Over half of the space is tried: a sampler would mostly ask for the same plans again.
    asks = _ASKS * room if 2 * len(seen) < space.size else 0
    for _ in range(asks):
        if len(found) == room:
            return found
        trial = scratch.ask()
        values = tuple(trial.suggest_categorical(name, choices) for name, choices in space.choices.items())
        plan = space.find(values)
        if plan is not None and plan not in seen and plan not in found:
            found.append(plan)
    return found + space.untried(seen | set(found), room - len(found), rng)


def _frozen(plan: Plan, outcome: Outcome, space: Space) -> FrozenTrial:
    """The trial as it is stored; a plan that could not run is complete with the worst values."""
    good = outcome.status == "ok"
    values = list(outcome.goals()) if good else [0.0, 1e6]
    violation = outcome.violation if good else 1e6
    return create_trial(
        state=TrialState.COMPLETE,
        params=dict(plan.params()),
        distributions={name: CategoricalDistribution(choices) for name, choices in space.choices.items()},
        values=values,
        user_attrs={_OUTCOME: outcome.to_json()},
        constraints={"slo": violation},
    )


def _store(study: optuna.Study, trial: FrozenTrial) -> None:
    """Add a finished trial; raises MoesimError where the storage fails (a full disk, a lost database)."""
    try:
        study.add_trial(trial)
    except (OSError, SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise MoesimError(
            f"the search cannot be stored any more ({type(error).__name__}); finished batches are kept",
            mend="mend the storage and go on with --resume",
        ) from None


def _stored(study: optuna.Study, space: Space) -> list[Trial]:
    """Finished trials of a resumed study, in order. Raises BadInput when they are not of this space."""
    found: list[Trial] = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        plan = space.find([str(trial.params.get(name)) for name in space.choices])
        outcome = trial.user_attrs.get(_OUTCOME)
        if plan is None or outcome is None:
            raise BadInput("the stored trials are of another search", mend="choose another --out")
        found.append(Trial(len(found), plan, Outcome.from_json(outcome)))
    return found
