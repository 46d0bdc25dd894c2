"""Published rows priced by simulation, set beside what was reported, and the ratios of pairs of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from moesim.engine.draws import interval
from moesim.errors import MoesimError
from moesim.spec.scenario import Scenario, load_scenario
from validate.accuracy import errors
from validate.published.manifest import UNITS, Manifest, PublishedRatio, PublishedRow
from validate.published.step import StepSpec, TimedStep, time_step

Sign = Literal["right", "wrong", "open", "not priced"]


@dataclass(frozen=True)
class Predicted:
    """What is predicted of a row, in its own unit; reason: why nothing is. step_s: of the step behind it.

    span: low and high end of the 90 % interval over joint draws; none without draws.
    """

    row: PublishedRow
    value: float | None
    step_s: float | None = None
    span: tuple[float, float] | None = None
    reason: str = ""

    @property
    def error(self) -> float | None:
        """Signed: predicted over reported, less 1."""
        return None if self.value is None else self.value / self.row.reported - 1.0

    @property
    def inside(self) -> bool | None:
        """Whether the interval holds what was reported; None where there is none."""
        return None if self.span is None else self.span[0] <= self.row.reported <= self.span[1]

    @property
    def scored(self) -> bool:
        """Whether its error counts: priced, and no figure of the scenarios came from it."""
        return self.value is not None and not self.row.calibrated


@dataclass(frozen=True)
class SetBeside:
    """A ratio as reported and as predicted; sign: whether both lie on the same side of 1.

    `open` where the reported one lies within the scatter of its source's repeats: there is no sign to meet.
    """

    ratio: PublishedRatio
    reported: float
    predicted: float | None
    scatter: float
    calibrated: bool

    @property
    def sign(self) -> Sign:
        """Right, wrong, open or not priced."""
        if self.predicted is None:
            return "not priced"
        if abs(math.log(self.reported)) <= math.log1p(self.scatter):
            return "open"
        same = math.copysign(1.0, math.log(self.reported)) == math.copysign(1.0, math.log(self.predicted))
        return "right" if same and self.predicted != 1.0 else "wrong"

    @property
    def error(self) -> float | None:
        """Of its size, signed: predicted over reported, less 1."""
        return None if self.predicted is None else self.predicted / self.reported - 1.0

    @property
    def unexplained(self) -> bool:
        """A wrong sign without a word on why."""
        return self.sign == "wrong" and not self.ratio.why


def predict_rows(
    rows: Sequence[PublishedRow], *, draws: int = 0, progress: Callable[[float], None] | None = None
) -> list[Predicted]:
    """A prediction for each row, in order; equal scenarios and steps run once. draws: behind intervals."""
    known: dict[tuple[object, StepSpec], TimedStep] = {}
    found = []
    for index, row in enumerate(rows):
        found.append(_predict(row, known, draws))
        if progress is not None:
            progress((index + 1) / len(rows))
    return found


def _predict(row: PublishedRow, known: dict[tuple[object, StepSpec], TimedStep], draws: int) -> Predicted:
    if row.file is None:
        return Predicted(row, None, reason=row.refused)
    try:
        scenario = load_scenario(row.file)
        if row.step is None:
            return _trained(row, scenario, draws)
        key = (row.file, row.step)
        if key not in known:
            known[key] = time_step(scenario, row.step, draws)
        return _served(row, known[key])
    except MoesimError as error:
        return Predicted(row, None, reason=error.line())


def _trained(row: PublishedRow, scenario: Scenario, draws: int) -> Predicted:
    from moesim.engine.training import simulate_training
    from moesim.output.metrics import intervals

    run = simulate_training(scenario, draws=draws)
    spans = intervals([run.rates(one.step_s) for one in run.drawn])
    span = spans.get(row.metric)
    return Predicted(
        row,
        run.rates(run.step.step_s)[row.metric],
        run.step.step_s,
        None if span is None else (span["low"], span["high"]),
    )


def _served(row: PublishedRow, timed: TimedStep) -> Predicted:
    drawn = np.asarray([_own(row, one) for one in timed.drawn])
    return Predicted(row, _own(row, timed), timed.step_s, interval(drawn) if drawn.size else None)


def _own(row: PublishedRow, timed: TimedStep) -> float:
    """A step's figure as the row reports it."""
    scale = UNITS[row.metric][1]
    return scale * (
        timed.exchange_s["dispatch"] if row.metric == "dispatch_us" else timed.tokens_per_s_per_gpu * row.counts
    )


def set_beside(manifest: Manifest, found: Sequence[Predicted]) -> list[SetBeside]:
    """The manifest's ratios from the predictions of its rows, each side in the unit of one GPU."""
    by_id = {one.row.id: one for one in found}
    return [_ratio(ratio, by_id[ratio.over], by_id[ratio.under]) for ratio in manifest.ratios]


def _ratio(ratio: PublishedRatio, over: Predicted, under: Predicted) -> SetBeside:
    scale = UNITS[under.row.metric][1] / UNITS[over.row.metric][1]
    predicted = None
    if over.value is not None and under.value is not None:
        predicted = over.value / under.value * scale
    return SetBeside(
        ratio,
        reported=over.row.reported / under.row.reported * scale,
        predicted=predicted,
        scatter=max(over.row.scatter, under.row.scatter),
        calibrated=over.row.calibrated or under.row.calibrated,
    )


def summary(found: Sequence[Predicted], ratios: Sequence[SetBeside]) -> dict[str, Any]:
    """Errors over the rows that count, serving and training apart; the signs of ratios, and how far off they are."""
    parts = {
        name: [one for one in found if one.scored and (one.row.step is not None) == (name == "serving")]
        for name in ("serving", "training")
    }
    sized = [one for one in ratios if one.predicted is not None and not one.calibrated]
    spans = [one.inside for one in found if one.inside is not None and one.scored]
    return {
        "rows": len(found),
        "intervals": {"rows": len(spans), "inside": sum(spans)},
        "priced": sum(one.value is not None for one in found),
        "calibrated": sum(one.row.calibrated for one in found),
        "errors": {
            name: errors(
                np.asarray([one.value for one in part], dtype=np.float64),
                np.asarray([one.row.reported for one in part], dtype=np.float64),
            ).as_dict()
            for name, part in parts.items()
        },
        "signs_calibrated": sum(one.sign == "right" and one.calibrated for one in ratios),
        "signs": {sign: sum(one.sign == sign for one in ratios) for sign in ("right", "wrong", "open", "not priced")},
        "sizes": errors(
            np.asarray([one.predicted for one in sized], dtype=np.float64),
            np.asarray([one.reported for one in sized], dtype=np.float64),
        ).as_dict(),
        "unexplained": sum(one.unexplained for one in ratios),
    }
