"""Why the best plan is the best: what each choice of it is worth, and what stands closest to a limit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moesim.spec.scenario import Scenario
from placement.pools import NONE
from placement.ranking import LATENCY, level_metrics, order
from placement.tuner import Search, Trial

BINDS = 0.05
"""A limit with less room than this share of it is said to bind."""


def choices_json(search: Search, scenario: Scenario, best: Trial) -> list[dict[str, Any]]:
    """What each choice of the best plan is worth: the best trial found without it, the costliest choice first.

    loss: by what share the objective falls when this one choice is forbidden and all others are free again; latency:
    by what share the median time per output token then grows. Both None where every trial without it misses a service
    level, could not run, or was not simulated in full. `exact` where the whole space was evaluated: else better plans
    may be left, and the loss is at most this. tried: trials without the choice that ran.
    """
    metric = scenario.objective.maximize
    mine = best.plan.params()
    found = []
    for name, value in mine.items():
        if value == NONE and name in ("prefill", "prefill_placement"):
            continue  # without roles, `split` says all
        if name == "placement" and not best.plan.spread:
            continue  # plans with another one have another layout
        ran = [trial for trial in search.answers if trial.plan.params()[name] != value]
        good = order([trial for trial in ran if trial.outcome.recommendable], metric)
        other = good[0] if good else None
        values = sorted({trial.plan.params()[name] for trial in search.trials})
        if len(values) < 2:
            continue  # there was nothing to choose
        entry: dict[str, Any] = {"choice": name, "value": value, "values": len(values), "tried": len(ran)}
        if other is None:
            entry |= {"loss": None, "latency": None, "instead": None, "plan": None}
        else:
            now, then = best.outcome.metrics, other.outcome.metrics
            entry |= {
                "loss": 1.0 - then[metric] / now[metric],
                "latency": then[LATENCY] / now[LATENCY] - 1.0,
                "instead": other.plan.params()[name],
                "plan": other.plan.label(),
            }
        found.append(entry | {"exact": search.exhausted and search.settled is None})

    def dearest(entry: dict[str, Any]) -> tuple[float, float]:
        if entry["loss"] is None:
            return (-2.0, 0.0)
        return (-max(entry["loss"], 0.0), -entry["latency"])

    return sorted(found, key=dearest)


def binding_json(trial: Trial, scenario: Scenario) -> list[dict[str, Any]]:
    """How far a plan that ran is from each limit, the closest first.

    room: what is left, as a share of the limit; negative where it is missed. The KV cache binds where requests waited
    for it.
    """
    metrics = trial.outcome.metrics
    rooms = {name: 1.0 - metrics[name] / limit for name, limit in level_metrics(scenario).items()}
    if "kv_cache_share" in metrics:
        rooms["kv_cache"] = 1.0 - metrics["kv_cache_share"]
    return [
        {"limit": name, "room": room, "binds": room < BINDS}
        for name, room in sorted(rooms.items(), key=lambda pair: pair[1])
    ]


def choices_text(choices: Sequence[dict[str, Any]], metric: str, *, levels: bool) -> str:
    """The choices in one sentence. levels: whether the objective has service levels."""
    name = metric.removesuffix("_per_gpu").replace("_per_s", "/s").replace("_", " ") + "/GPU"
    fails = "nothing else tried meets the service levels" if levels else "all else tried leans on extrapolated costs"
    told = []
    for entry in choices:
        short = f"{entry['choice'].rpartition('.')[2]} {entry['value']}"
        if entry["loss"] is None:
            told.append(f"without {short}, {fails if entry['tried'] else 'nothing else tried ran'}")
            continue
        loss, latency = entry["loss"], entry["latency"]
        if loss > 0.005:
            worth = f"{loss:.1%} less {name}"
        else:
            worth = f"median TPOT {abs(latency):.1%} {'longer' if latency >= 0 else 'shorter'}"
        told.append(f"without {short}, {worth} ({entry['instead']} instead)")
    return "What its choices are worth, by the best plan tried without each: " + "; ".join(told) + "." if told else ""
