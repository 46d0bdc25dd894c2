"""Which validations on record cover what a verdict leans on; what none covers is `not validated`, and told so."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesim.plugins import RECORDS, available, load
from moesim.spec.evidence import TRAITS, Evidence, Leaning, Trait, differences, trait_words
from moesim.spec.scenario import Scenario

# Covered by records that agree in every trait; by none, but there are records of the claim; no record of the claim.
VALIDATED, NEAREST, NOT_VALIDATED = "validated", "nearest", "not_validated"
OVER_NODES = ("placement_gain", "exchange_time", "training_step")


@dataclass(frozen=True)
class Covered:
    """What records say of one leaning. evidence: those cited, all as near; differs: trait -> in what they differ."""

    leaning: Leaning
    evidence: tuple[Evidence, ...] = ()
    differs: tuple[str, ...] = ()

    @property
    def status(self) -> str:
        """VALIDATED, NEAREST or NOT_VALIDATED."""
        if not self.evidence:
            return NOT_VALIDATED
        return NEAREST if self.differs else VALIDATED

    def error(self) -> dict[str, Any] | None:
        """How far the predictions of the records cited were off, all their cases together; None where none is told."""
        single = np.abs([error for one in self.evidence for error in one.errors])
        told = [one for one in self.evidence if one.errors or one.mean_absolute is not None]
        if not told:
            return None
        cases = sum(one.cases for one in told)
        means = [one.mean_absolute if one.mean_absolute is not None else _mean(one.errors) for one in told]
        between = np.abs([error for one in self.evidence for error in one.between])
        whole = all(one.errors for one in told)
        return {
            "figure": told[0].figure,
            "cases": cases,
            "mean": sum(mean * one.cases for mean, one in zip(means, told, strict=True)) / cases,
            "median": float(np.median(single)) if whole else None,
            "largest": float(single.max()) if whole else None,
            "between_median": float(np.median(between)) if between.size else None,
            "others": self._others(),
        }

    def _others(self) -> dict[str, float]:
        """Mean absolute errors of further figures, over all cases that tell them."""
        found: dict[str, tuple[float, int]] = {}
        for one in self.evidence:
            for name, mean in one.others.items():
                total, cases = found.get(name, (0.0, 0))
                found[name] = total + mean * one.cases, cases + one.cases
        return {name: total / cases for name, (total, cases) in found.items()}

    def _versions(self) -> dict[str, list[str]]:
        """Versions of what ran; they are told and compared with nothing."""
        names = sorted({name for one in self.evidence for name in one.versions})
        return {name: sorted({one.versions[name] for one in self.evidence if name in one.versions}) for name in names}

    def ran(self, trait: str) -> str:
        """What ran, of one trait, over all that is cited: `2 to 4`, `Qwen3 or DeepSeek`; empty where it is not told."""
        return _merged([one.traits[trait] for one in self.evidence if trait in one.traits])

    def to_json(self) -> dict[str, Any]:
        """Ready for JSON. `records` are names; `differs` says how they differ from what is asked."""
        return {
            "claim": self.leaning.claim,
            "of": self.leaning.of,
            "nodes": self.leaning.traits.get("nodes", 1),
            "status": self.status,
            "records": list(dict.fromkeys(one.record for one in self.evidence)),
            "commands": sorted({one.command for one in self.evidence if one.command}),
            "dates": sorted({one.date[:10] for one in self.evidence if one.date}),
            "versions": self._versions(),
            "error": self.error(),
            "differs": [
                f"{name}: {self.ran(name) or 'not told'} instead of {trait_words(self.leaning.traits[name])}"
                for name in self.differs
            ],
            "missed": sorted({missed for one in self.evidence for missed in one.missed}),
        }


def _mean(errors: Sequence[float]) -> float:
    return float(np.abs(errors).mean())


def _merged(values: Sequence[Trait]) -> str:
    """Numbers and ranges as one range, names side by side, at most three of them."""
    ends: list[float] = []
    for value in values:
        ends += value if isinstance(value, tuple) else [value] if isinstance(value, int) else []
    names = sorted({value for value in values if isinstance(value, str)})
    more = [f"{len(names) - 3} others"] if len(names) > 3 else []
    return " or ".join(([trait_words((min(ends), max(ends)))] if ends else []) + names[:3] + more)


def evidence_of(scenario: Scenario | None) -> list[Evidence]:
    """All that validations show, of every registered source (group `moesim.records`).

    Raises BadInput for records that the scenario names and that cannot be read.
    """
    return [one for name in available(RECORDS) for one in load(RECORDS, name)(scenario)]


def cover(leanings: Iterable[Leaning], evidence: Sequence[Evidence]) -> list[Covered]:
    """What covers each leaning, each once, in order.

    The records that differ in nothing; else those that agree in what matters most, by the order of TRAITS. All that are
    as near are cited, the good and the bad.
    """
    found = {}
    for leaning in leanings:
        key = (leaning.claim, tuple(sorted(leaning.traits.items(), key=str)))
        if key not in found:
            found[key] = _cover(leaning, evidence)
    return list(found.values())


def _cover(leaning: Leaning, evidence: Sequence[Evidence]) -> Covered:
    order = TRAITS[leaning.claim]
    near: dict[tuple[str, ...], list[Evidence]] = {}
    for runs in _alike(one for one in evidence if one.claim == leaning.claim):
        near.setdefault(tuple(differences(leaning, _together(runs))), []).extend(runs)
    if not near:
        return Covered(leaning)
    least = min(near, key=lambda names: [name in names for name in order])
    return Covered(leaning, tuple(near[least]), least)


def _alike(evidence: Iterable[Evidence]) -> list[list[Evidence]]:
    """Pieces that differ in their ranges alone: each adds to what the others ran."""
    found: dict[tuple[tuple[str, str], ...], list[Evidence]] = {}
    for one in evidence:
        key = tuple(
            sorted((name, "" if isinstance(value, tuple) else str(value)) for name, value in one.traits.items())
        )
        found.setdefault(key, []).append(one)
    return list(found.values())


def _together(runs: Sequence[Evidence]) -> dict[str, Trait]:
    """Their traits, ranges from the least to the most of all."""
    found = dict(runs[0].traits)
    for name, value in found.items():
        if isinstance(value, tuple):
            lows, highs = zip(*(other for one in runs if isinstance(other := one.traits[name], tuple)), strict=True)
            found[name] = (min(lows), max(highs))
    return found


def validated_over_nodes(found: Iterable[Covered]) -> bool:
    """Whether there is something that happens between nodes, and records cover all of it."""
    return told_over_nodes(
        (one.leaning.claim, nodes if isinstance(nodes := one.leaning.traits.get("nodes"), int) else 1, one.status)
        for one in found
    )


def told_over_nodes(rows: Iterable[tuple[str, int, str]]) -> bool:
    """`validated_over_nodes` of what was kept of each claim: its name, nodes and status."""
    over = [status for claim, nodes, status in rows if claim in OVER_NODES and nodes > 1]
    return bool(over) and all(status == VALIDATED for status in over)


def validation_json(found: Iterable[Covered]) -> list[dict[str, Any]]:
    """The list under `validation`."""
    return [one.to_json() for one in found]


def validation_keys(found: Sequence[Covered]) -> dict[str, Any]:
    """What a report says of it: the list, and the same for a person."""
    return {"validation": validation_json(found), "validation_text": validation_text(found)}


# How a claim reads in a sentence.
_WORDS = {
    "serving_time": "serving time",
    "placement_gain": "placement gain",
    "exchange_time": "exchanges",
    "expert_time": "expert time",
    "capacity_drops": "dropped tokens",
    "training_step": "training step",
}


def validation_text(found: Sequence[Covered]) -> str:
    """One or two lines for a person, each claim once; empty where nothing is leaned on."""
    sure, rest = ([one for one in found if (one.status == VALIDATED) is want] for want in (True, False))
    lines = []
    if sure:
        lines.append(f"Validated by records: {', '.join(f'{_claim(one)} ({_by(one)})' for one in _once(sure))}.")
    if rest:
        near = [f"{_claim(one)} (nearest: {_by(one)})" for one in _once(rest) if one.evidence]
        bare = [f"{_claim(one)} (nothing on record)" for one in _once(rest) if not one.evidence]
        lines.append(f"Not validated on hardware: {', '.join(near + bare)}.")
    return "\n".join(lines)


def _once(found: Sequence[Covered]) -> list[Covered]:
    """Of each claim the one over the most nodes, or else the first."""
    chosen: dict[str, Covered] = {}
    for one in found:
        before = chosen.get(one.leaning.claim)
        if before is None or _nodes(one) > _nodes(before):
            chosen[one.leaning.claim] = one
    return list(chosen.values())


def _nodes(found: Covered) -> int:
    nodes = found.leaning.traits.get("nodes", 1)
    return nodes if isinstance(nodes, int) else 1


def _claim(found: Covered) -> str:
    nodes = _nodes(found)
    return _WORDS[found.leaning.claim] + (f" over {nodes} nodes" if nodes > 1 else "")


# What tells a record's run from what is asked, in a sentence; the number of nodes is told wherever there are several.
_TELLING = ("gpu", "exchange", "model", "engine", "layout", "nodes", "ranks", "rule")


def _by(found: Covered) -> str:
    """`validate fabric, CPU, gloo, 4 nodes, 8 ranks: median error 1.4%`."""
    where = []
    for name in _TELLING:
        ran = found.ran(name)
        if not ran or (name not in found.differs and (name != "nodes" or ran == "1")):
            continue
        if name == "exchange":
            exchanges = {str(one.traits[name]).partition(" ")[0] for one in found.evidence if name in one.traits}
            ran = " or ".join(sorted(exchanges))
        if name in ("nodes", "ranks"):
            ran = f"{ran} {name.removesuffix('s') if ran == '1' else name}"
        where.append(ran)
    commands = " and ".join(sorted({one.command for one in found.evidence if one.command}))
    error = found.error()
    told = f"{sum(one.cases for one in found.evidence)} cases"
    if error is not None and found.leaning.claim == "capacity_drops":
        told += f", {error['mean']:.1%} of them differ"
    elif error is not None:
        kind, value = ("mean", error["mean"]) if error["median"] is None else ("median", error["median"])
        told = f"{kind} {error['figure']} error {value:.1%}".replace("  ", " ")
        told += "".join(f", {name} {mean:.1%}" for name, mean in error["others"].items())
        if found.leaning.claim == "placement_gain" and error["between_median"] is not None:
            told += f", {error['between_median']:.1%} between placements"
    missed = {missed for one in found.evidence for missed in one.missed}
    wrong = f", {len(missed)} limit{'s' if len(missed) > 1 else ''} missed" if missed else ""
    return f"{', '.join([commands, *where] if commands else where)}: {told}{wrong}"
