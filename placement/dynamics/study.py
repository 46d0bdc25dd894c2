"""A recorded series under every policy: what each takes, how sure the saving is, and what to do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moesim.errors import BadInput
from moesim.routing.trace import RoutingCounts
from moesim.spec.plan import PlacementRequest
from placement.dynamics.adaptive import Adaptive
from placement.dynamics.hindsight import best_in_hindsight
from placement.dynamics.policies import EVERY, Every, Never, SkiRental, Threshold
from placement.dynamics.series import Floats, Ints, Policy, Prices, Run, run
from placement.judge import DRAWS, LEVEL, Figure
from placement.migrate import fitter
from placement.verdict import DONT, GAIN, TIE, Verdict, sign

BLOCKS = 10
"""The bootstrap draws blocks of a tenth of the series: loads of neighbouring steps are alike, and a re-layout and what
it brings should mostly lie in one block."""

FEWEST_STEPS = 20
"""Two steps for each block."""

MOST_ROWS = 320
"""Tables that the best in hindsight may choose from; where a policy had more, evenly spread ones of them."""


@dataclass(frozen=True)
class Study:
    """runs: by policy, `never` first, the adaptive one last. hindsight_s: least seconds over the adaptive one's tables.

    saved: share of never's time that the adaptive policy saves; over_once: of the best single re-layout's. free: the
    saving if moving and solving were free. break_even: step from which on it stays ahead of never; None = not at the
    end. fixed: the best of never and every-n in hindsight; once: the best single re-layout.
    """

    prices: Prices
    runs: dict[str, Run]
    hindsight_s: float
    saved: Figure
    over_once: Figure
    free: Figure
    break_even: int | None
    fixed: str
    once: str
    verdict: Verdict

    def to_json(self) -> dict[str, Any]:
        """What `place --drift --json` prints."""
        never, adaptive = self.runs["never"], self.runs["adaptive"]
        return {
            "schema_version": 1,
            "steps": len(never.step_s),
            "prices": {
                "token_s": self.prices.token_s,
                "move_s": {"inside": self.prices.near_s, "between": self.prices.far_s},
                "solve_s": self.prices.solve_s,
                "other_s": self.prices.other_s,
                "tag": self.prices.tag,
            },
            "policies": {name: one.to_json() for name, one in self.runs.items()},
            "best_fixed": self.fixed,
            "best_once": self.once,
            "saved": {
                "against": "never",
                **self.saved.to_json(),
                "over_once": self.over_once.to_json(),
                "if_free": self.free.to_json(),
            },
            "regret": {
                "over_best_fixed": adaptive.total_s / self.runs[self.fixed].total_s - 1.0,
                "over_hindsight": adaptive.total_s / self.hindsight_s - 1.0,
                "hindsight_s": self.hindsight_s,
            },
            "break_even_steps": self.break_even,
            "verdict": self.verdict.to_json(),
        }


def check_series(load: RoutingCounts) -> None:
    """Raise BadInput unless the counts are steps, and enough of them."""
    steps = len(load.counts)
    if not load.per_step or steps < FEWEST_STEPS:
        raise BadInput(
            f"{steps} step{'s' * (steps != 1)} of counts are no series to lay experts out anew on",
            where=load.name,
            mend=f"give one file of at least {FEWEST_STEPS} steps, e.g. an .npz with counts [steps, layers, experts]",
        )


def study(counts: Floats, request: PlacementRequest, start: Ints, prices: Prices, *, length_known: bool) -> Study:
    """Run every policy over counts [steps, layers, experts], from the table `start` [layers, slots].

    request: of the placement, its loads not looked at. length_known: the adaptive policy knows how many steps come, as
    a training run does. No policy sees a count before its step is over.
    """
    steps = len(counts)
    node_ranks = request.ranks // request.nodes if request.groups > 1 else request.ranks
    fit = fitter(request, node_ranks)

    def adaptive(at: Prices) -> Run:
        return run(Adaptive(at, fit, node_ranks, steps if length_known else None), counts, start, at)

    intervals = [n for n in EVERY if n < steps]
    policies: list[Policy] = [Never()]
    policies += [Every(n, fit) for n in intervals]
    policies += [Every(n, fit, once=True) for n in intervals]
    policies += [Threshold(fit, request.ranks), SkiRental(prices, node_ranks)]
    runs = {policy.name: run(policy, counts, start, prices) for policy in policies}
    mine = runs["adaptive"] = adaptive(prices)
    unpaid = adaptive(replace(prices, near_s=0.0, far_s=0.0, solve_s=0.0))
    fixed = min((name for name in runs if name == "never" or name.startswith("every")), key=lambda n: runs[n].total_s)
    once = min((name for name in runs if name.startswith("once")), key=lambda n: runs[n].total_s)
    tables = [table for _, table in mine.tables]
    chosen = np.unique(np.linspace(0, len(tables) - 1, min(len(tables), MOST_ROWS)).astype(int))
    rng = np.random.default_rng(request.seed)
    saved, over_once, free = (
        saving(base.by_step_s, other.by_step_s, generator)
        for (base, other), generator in zip(
            ((runs["never"], mine), (runs[once], mine), (runs["never"], unpaid)), rng.spawn(3), strict=True
        )
    )
    found = Study(
        prices=prices,
        runs=runs,
        hindsight_s=best_in_hindsight(counts, [tables[index] for index in chosen], prices),
        saved=saved,
        over_once=over_once,
        free=free,
        break_even=break_even(runs["never"].by_step_s, mine.by_step_s),
        fixed=fixed,
        once=once,
        verdict=Verdict(TIE, ""),
    )
    return replace(found, verdict=judge(found))


def saving(base_s: Floats, other_s: Floats, rng: np.random.Generator) -> Figure:
    """1 - other / base, both [steps], with a block bootstrap's interval, the same blocks of steps for both.

    Moving blocks, wrapped around the end (D. Politis and J. Romano, 1992: circular block bootstrap).
    """
    steps = len(base_s)
    size = -(-steps // BLOCKS)
    first = rng.integers(0, steps, (DRAWS, BLOCKS))
    index = (first[:, :, None] + np.arange(size)) % steps
    ratio = 1.0 - other_s[index].sum(axis=(1, 2)) / base_s[index].sum(axis=(1, 2))
    low, high = np.quantile(ratio, [(1.0 - LEVEL) / 2.0, (1.0 + LEVEL) / 2.0])
    return Figure(1.0 - float(other_s.sum() / base_s.sum()), float(low), float(high), LEVEL)


def break_even(base_s: Floats, other_s: Floats) -> int | None:
    """Steps after which the other has taken no more than the base, and so to the end; None = not so at the end."""
    behind = np.flatnonzero(other_s.cumsum() > base_s.cumsum() * (1.0 + 1e-12))
    if len(behind) and behind[-1] == len(base_s) - 1:
        return None
    return int(behind[-1]) + 2 if len(behind) else 1


def judge(found: Study) -> Verdict:
    """What to do, in a sentence."""
    mine, never, once, fixed = (found.runs[name] for name in ("adaptive", "never", found.once, found.fixed))
    steps = len(never.step_s)
    saved = f"{found.saved.value:.1%} ({LEVEL:.0%} interval {found.saved.low:.1%} to {found.saved.high:.1%})"
    if sign(found.saved) <= 0:
        code = DONT if mine.relayouts == 0 or sign(found.saved) < 0 else TIE
        lead = "Don't lay experts out anew" if code == DONT else "Tie"
        if sign(found.free) <= 0:
            why = "even if moving were free, no saving could be told: there is nothing to gain from these loads"
        else:
            why = f"moving costs more than it brings (it would save {found.free.value:.1%} if it were free)"
        return Verdict(code, f"{lead}: {why}. The adaptive policy saves {saved} of the time of {steps} steps.")
    text = (
        f"Re-layout pays: the adaptive policy saves {saved} of the time, with {mine.relayouts} re-layouts that move "
        f"{int(mine.moved.sum()):,} experts in {steps} steps; it stays ahead of never from step {found.break_even} on."
    )
    if sign(found.over_once) <= 0 and once.total_s < never.total_s:
        text += (
            f" One is enough: a single re-layout {found.once.removeprefix('once ')} steps saves "
            f"{1 - once.total_s / never.total_s:.1%}, and what moving again adds cannot be told "
            f"({found.over_once.value:+.1%}, {found.over_once.low:+.1%} to {found.over_once.high:+.1%})."
        )
    elif found.fixed != "never":
        text += (
            f" Of fixed intervals {found.fixed} steps is best in hindsight and saves "
            f"{1 - fixed.total_s / never.total_s:.1%}."
        )
    else:
        text += " No fixed interval pays: each of them moves too much."
    return Verdict(GAIN, text)
