"""The compact form of a validation on record: what ran, on what, what it covers, predicted and measured, and checks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from pydantic import Field, model_validator

from moesim.errors import BadInput
from moesim.spec.base import Spec
from moesim.spec.evidence import Claim, Evidence, Trait

FORMAT, SCHEMA_VERSION = "moesim-validation", 2
MICROSECOND_DIGITS = 7  # decimals of a second that are kept


class Covers(Spec):
    """What the cases of one name show: of which claim, under which traits (see moesim.spec.evidence)."""

    name: str = ""
    claim: Claim
    traits: dict[str, Trait]
    figure: str = Field(default="", description="whose error, for a person")


class MeasuredCase(Spec):
    """One case: predicted and measured median with p10 and p90, in seconds (None: not told).

    covers: names of what it is a case of. group: cases of one group are alternatives to each other.
    """

    case: str
    covers: tuple[str, ...] = ()
    group: str = ""
    predicted_s: float = Field(gt=0)
    predicted_p10_s: float | None = None
    predicted_p90_s: float | None = None
    measured_s: float = Field(gt=0)
    measured_p10_s: float | None = None
    measured_p90_s: float | None = None

    @property
    def error(self) -> float:
        """Signed relative error."""
        return self.predicted_s / self.measured_s - 1.0


class CountedCase(Spec):
    """Cases that are counted instead of timed: how many there are, what both sides count, and how many differ."""

    case: str
    covers: tuple[str, ...] = ()
    cases: int = Field(gt=0)
    simulated: int = Field(ge=0)
    executed: int = Field(ge=0)
    differ: int = Field(ge=0)


class HeldCheck(Spec):
    """One figure of the comparison, its limit in words, and whether it holds."""

    goal: str
    told: str
    limit: str
    holds: bool


class ValidationRecord(Spec):
    """One validation; written is when the predictions were, before measured_from; sha256 is of their file.

    Where cases are counted both sides answer the same questions, and nothing is predicted beforehand: no `written`.
    code: the commit of moesim that ran, where it is known. Of version 1, which does not say what it covers, nothing is
    cited.
    """

    format: str
    schema_version: int
    command: str
    date: str
    what: str
    hardware: dict[str, Any]
    versions: dict[str, str]
    code: str | None = None
    repeats: int | None = None
    written: str | None = None
    measured_from: str | None = None
    predictions_sha256: str | None = None
    reliability: float | None = None
    core_share: dict[str, float | None] = Field(default_factory=dict)  # of computing ranks: phase -> share of a core
    pace_s: dict[str, float] = Field(default_factory=dict)  # phase -> seconds of one sample that stays the same
    covers: tuple[Covers, ...] = ()
    cases: tuple[MeasuredCase, ...] = ()
    counted: tuple[CountedCase, ...] = ()
    checks: tuple[HeldCheck, ...]

    @model_validator(mode="after")
    def _whole(self) -> ValidationRecord:
        if self.pace_s and (set(self.pace_s) != {"profile", "measured"} or min(self.pace_s.values()) <= 0.0):
            raise ValueError("`pace_s` needs profile and measured, both above 0")
        if not self.cases and not self.counted:
            raise ValueError("there are no cases")
        if self.cases and (self.written is None or self.measured_from is None or self.predictions_sha256 is None):
            raise ValueError("timed cases need written, measured_from and predictions_sha256")
        known = {one.name for one in self.covers}
        if len(known) < len(self.covers):
            raise ValueError("two of `covers` have one name")
        asked = {name for case in self.cases for name in case.covers}
        lost = (asked | {name for case in self.counted for name in case.covers}) - known
        if lost:
            raise ValueError(f"a case covers {min(lost)!r}, which `covers` does not tell")
        return self

    @property
    def errors(self) -> tuple[float, ...]:
        """Signed relative error of each timed case."""
        return tuple(case.error for case in self.cases)

    def evidence(self, name: str) -> list[Evidence]:
        """What the record, of this name, shows: one for each of `covers` that has cases."""
        found = []
        missed = tuple(f"{name}: {one.goal}: {one.told} ({one.limit})" for one in self.checks if not one.holds)
        for one in self.covers:
            timed = [case for case in self.cases if one.name in case.covers]
            counted = [case for case in self.counted if one.name in case.covers]
            if not timed and not counted:
                continue
            cases = len(timed) + sum(case.cases for case in counted)
            differ = sum(case.differ for case in counted)
            found.append(
                Evidence(
                    claim=one.claim, record=name, command=self.command, date=self.date, versions=self.versions,
                    traits=one.traits, cases=cases, figure=one.figure, errors=tuple(case.error for case in timed),
                    between=_between(timed), mean_absolute=differ / cases if counted else None,
                    checks=len(self.checks), missed=missed,
                )
            )  # fmt: skip
        return found


def _between(cases: list[MeasuredCase]) -> tuple[float, ...]:
    """How far differences between alternatives are off: ln(predicted / measured) less its mean over the group."""
    groups: dict[str, list[float]] = {}
    for case in cases:
        if case.group:
            groups.setdefault(case.group, []).append(math.log(case.predicted_s / case.measured_s))
    return tuple(
        one - sum(found) / len(found) for found in groups.values() if len(found) > 1 for one in found
    )  # fmt: skip


def compact_of(kind: str, make: Callable[[dict[str, Any]], dict[str, Any]], record: dict[str, Any]) -> ValidationRecord:
    """The compact form that `make` makes of a command's own record. Raises BadInput where it is not a whole one."""
    try:
        made = make(record)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise BadInput(
            f"not a whole record of `{kind}` ({type(error).__name__}: {str(error)[:80]})",
            where="record",
            mend="run the command again",
        ) from None
    head = {
        "format": FORMAT, "schema_version": SCHEMA_VERSION, "command": kind, "code": record.get("code"),
        "date": record.get("date"),
    }  # fmt: skip
    return ValidationRecord.read({**head, **made}, where="record")


def timed_head(record: dict[str, Any]) -> dict[str, Any]:
    """What every record with predictions of its own tells in the same way."""
    return {
        "hardware": record["hardware"],
        "versions": record["versions"],
        "written": record["predictions"]["written"],
        "measured_from": record["measured_from"],
        "predictions_sha256": record["predictions"]["sha256"],
    }


def kept_checks(goals: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Checks as a command's comparison has them."""
    return [{name: goal[name] for name in ("goal", "told", "limit", "holds")} for goal in goals]


def check(goal: str, told: str, limit: str, holds: bool) -> dict[str, Any]:
    """One check."""
    return {"goal": goal, "told": told, "limit": limit, "holds": bool(holds)}


def short(seconds: float) -> float:
    """Seconds to the microsecond and a digit."""
    return round(float(seconds), MICROSECOND_DIGITS)
