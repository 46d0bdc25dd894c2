"""The search: Optuna asks, the simulator answers, in batches of fixed size; each trial is durable when it ends."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from placement.claims import Claims, NoLocks, hidden
from placement.executors import Workers
from placement.interrupts import unbroken
from placement.journal import journal_storage
from placement.objective import Outcome
from placement.plans import Plan
from placement.samplers import GENETIC, generation_of, quasi_random, sampler_of
from placement.space import Space
from placement.surrogate import Surrogate

# Trials of a batch: told together, in order, so that any number of workers gives the same study.
BATCH = 8
STUDY = "moesim"
# Searches of more trials than this take a first look at each plan; those of fewer simulate each in full.
FIRST_LOOK_ABOVE = 64
_OUTCOME, _NUMBER = "outcome", "number"
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
    interrupted: Ctrl-C came before the last trial.
    """

    trials: tuple[Trial, ...]
    exhausted: bool
    resumed: int
    settled: frozenset[int] | None = None
    interrupted: bool = False

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
    where = str(out) if storage is None else hidden(storage)
    try:
        study = optuna.create_study(
            study_name=STUDY, storage=_storage(out, storage), load_if_exists=resume, directions=["maximize", "minimize"]
        )
    except optuna.exceptions.DuplicatedStudyError:
        raise BadInput(
            "there is a search here already",
            where=where,
            mend="add --resume (to join it, too), or choose another --out",
        ) from None
    except (OSError, ValueError, KeyError, ImportError, SQLAlchemyError) as error:
        raise BadInput(
            f"the stored search cannot be opened ({type(error).__name__})",
            where=where,
            mend="choose another --out",
        ) from None
    stored = study.user_attrs.get("scenario")
    if stored is not None and stored != fingerprint:
        raise BadInput("the stored search is of another scenario", where=where, mend="choose another --out")
    if stored is None:
        with _storing():
            study.set_user_attr("scenario", fingerprint)
    return study


def takes_first_look(study: optuna.Study, trials: int) -> bool:
    """Whether the search takes a first look at each plan: decided once, when it begins, by the trials asked for."""
    stored = study.user_attrs.get("first_look")
    if stored is None:
        stored = trials > FIRST_LOOK_ABOVE
        with _storing():
            study.set_user_attr("first_look", stored)
    return bool(stored)


def _storage(out: Path | None, storage: str | None) -> Any:
    if storage is not None:
        return storage
    return None if out is None else journal_storage(out)


def search(
    study: optuna.Study,
    space: Space,
    scenario: Scenario,
    workers: Workers,
    *,
    trials: int,
    recipes: Sequence[Plan],
    progress: Callable[[float], None] | None = None,
    claims: Claims | None = None,
) -> Search:
    """Run the search up to `trials` finished trials in all, those of a resumed study included.

    Recipes come first; then the sampler, seeded by batch. Where the whole space is no larger than `trials`, all of it
    is evaluated in order instead. Processes with `claims` on the same study share each batch out among them. Ctrl-C
    ends the search with what has finished.
    """
    claims = claims or Claims(NoLocks())
    kept, surrogate = _Kept(study, space), Surrogate(space)
    kept.read()
    resumed = len(kept.in_order())
    target = min(trials, space.size)
    whole = not space.estimated and trials >= space.size
    interrupted = False
    try:
        claims.sit()
        while len(finished := kept.in_order()) < target:
            # A batch follows from the trials before it alone, so that one cut short by a crash goes on as it was.
            start = len(finished) - len(finished) % BATCH
            before = finished[:start]
            rng = np.random.default_rng([scenario.seed, 9, start])
            seen = {trial.plan for trial in before}
            first = [plan for plan in (space.plans if whole else recipes) if plan not in seen]
            batch = list(dict.fromkeys(first))[:BATCH]
            if len(batch) < BATCH:
                batch += _asked(before, kept, surrogate, scenario, seen | set(batch), BATCH - len(batch), rng)
            asked = _missing(batch, kept.trials, start, target)
            if not asked:
                break  # a large space in which no untried legal plan is found any more
            _finish(asked, kept, workers, claims)
            if progress is not None:
                progress(len(kept.in_order()) / target)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        claims.leave()
    done = tuple(kept.in_order())
    return Search(done, not space.estimated and len(done) >= space.size, resumed, interrupted=interrupted)


def _missing(batch: list[Plan], done: dict[int, Trial], start: int, target: int) -> dict[int, Plan]:
    """Trials of a batch that are still to be evaluated, by number."""
    numbers = range(start, min(start + len(batch), target))
    planned = dict(zip(numbers, batch, strict=False))
    open_ = [number for number in numbers if number not in done]
    if all(planned[number] == done[number].plan for number in numbers if number in done):
        return {number: planned[number] for number in open_}
    # Part of the batch was stored under another --trials: what is left of it, no plan twice.
    tried = {trial.plan for trial in done.values()}
    return dict(zip(open_, [plan for plan in batch if plan not in tried], strict=False))


def _finish(asked: dict[int, Plan], kept: _Kept, workers: Workers, claims: Claims) -> None:
    """Evaluate and store these trials, those that other processes claimed left to them."""
    while missing := [number for number in asked if number not in kept.trials]:
        mine = claims.take(missing, workers.count)
        try:
            kept.read()  # what another has stored before it let go
            left = [number for number in mine if number not in kept.trials]
            for number, outcome in zip(left, workers.evaluate([asked[number] for number in left]), strict=True):
                kept.store(Trial(number, asked[number], outcome))
        finally:
            claims.drop(mine)
        if not mine:
            claims.wait()


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


def _asked(
    before: list[Trial],
    kept: _Kept,
    surrogate: Surrogate,
    scenario: Scenario,
    seen: set[Plan],
    room: int,
    rng: np.random.Generator,
) -> list[Plan]:
    """The next plans by the scenario's sampler."""
    space = kept.space
    if scenario.search.sampler == "auto":
        return surrogate.propose([(trial.plan, trial.outcome) for trial in before], room, seen, rng)
    if scenario.search.sampler == "qmc":
        asks = quasi_random(space, scenario.seed, _ASKS * len(before), _ASKS * room)
        wanted = dict.fromkeys(plan for values in asks if (plan := space.find(values)) is not None)
        found = [plan for plan in wanted if plan not in seen][:room]
        return found + space.untried(seen | set(found), room - len(found), rng)
    told = before if scenario.search.sampler in GENETIC else _telling(before)
    return _ask([kept.frozen(trial.number) for trial in told], scenario, space, seen, room, rng)


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
    sampler = sampler_of(scenario.search.sampler, seed)
    scratch = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    scratch.add_trials([generation_of(one, number, scenario.search.sampler) for number, one in enumerate(stored)])
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


def _frozen(plan: Plan, outcome: Outcome, distributions: dict[str, CategoricalDistribution]) -> FrozenTrial:
    """The trial as it is stored; a plan that could not run is complete with the worst values."""
    good = outcome.status == "ok"
    values = list(outcome.goals()) if good else [0.0, 1e6]
    violation = outcome.violation if good else 1e6
    return create_trial(
        state=TrialState.COMPLETE,
        params=dict(plan.params()),
        distributions=dict(distributions),
        values=values,
        user_attrs={_OUTCOME: outcome.to_json()},
        constraints={"slo": violation},
    )


class _Values(tuple[str, ...]):
    """The values of a choice; every stored trial has the same object, however often Optuna copies it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Values:
        return self


def _distributions(space: Space) -> dict[str, CategoricalDistribution]:
    found = {}
    for name, choices in space.choices.items():
        found[name] = CategoricalDistribution(choices)
        found[name].choices = _Values(choices)
    return found


class _Kept:
    """The finished trials of a study by number, its own and those of other processes as they come in."""

    def __init__(self, study: optuna.Study, space: Space) -> None:
        self.study = study
        self.space = space
        self.trials: dict[int, Trial] = {}
        self._frozen: dict[int, FrozenTrial] = {}

    @functools.cached_property
    def _distributions(self) -> dict[str, CategoricalDistribution]:
        return _distributions(self.space)

    def in_order(self) -> list[Trial]:
        """The trials from the first one to the last before a gap."""
        found: list[Trial] = []
        while (trial := self.trials.get(len(found))) is not None:
            found.append(trial)
        return found

    def read(self) -> None:
        """Take in what was stored meanwhile. Raises BadInput when it is not of this space."""
        with _storing():
            stored = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        for one in stored:
            number = int(one.user_attrs.get(_NUMBER, one.number))
            if number in self.trials:  # those of this process among them
                continue
            plan = self.space.find([str(one.params.get(name)) for name in self.space.choices])
            outcome = one.user_attrs.get(_OUTCOME)
            if plan is None or outcome is None:
                raise BadInput("the stored trials are of another search", mend="choose another --out")
            self._take(Trial(number, plan, Outcome.from_json(outcome)))

    def store(self, trial: Trial) -> None:
        """Add a finished trial. Raises MoesimError where the storage fails (a full disk, a lost database)."""
        frozen = _frozen(trial.plan, trial.outcome, self._distributions)
        frozen.set_user_attr(_NUMBER, trial.number)
        with unbroken(), _storing():
            self.study.add_trial(frozen)
            self._take(trial)

    def _take(self, trial: Trial) -> None:
        self.trials.setdefault(trial.number, trial)  # of two under one number, the first stored counts, for everybody

    def frozen(self, number: int) -> FrozenTrial:
        """A trial as the samplers of Optuna take it; made when first asked for."""
        if number not in self._frozen:
            trial = self.trials[number]
            self._frozen[number] = _frozen(trial.plan, trial.outcome, self._distributions)
        return self._frozen[number]


@contextmanager
def _storing() -> Iterator[None]:
    try:
        yield
    except (OSError, SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise MoesimError(
            f"the search cannot be stored any more ({type(error).__name__}); finished trials are kept",
            mend="mend the storage and go on with --resume",
        ) from None
