"""Whether predictions are still those on record, and which family of costs moved them if they are not.

The record holds, for each row, the share of each family of costs in the prediction. A family whose costs were scaled by
f moves a prediction by (f - 1) x its share, so the drift of many rows, regressed on the shares, gives the factor of
every family, whatever the predictions' errors are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from validate.silicon.causes import FRONT_END, PARTS, SCALED
from validate.silicon.price import Prediction

Floats = NDArray[np.float64]

# Another machine's arithmetic moves a prediction by less; a change of the model or of the costs by more.
TOLERANCE = 0.005
# A family is named where its factor is this far from 1, and so many standard errors.
NAMED, SIGMAS = 0.02, 3.0
# What regression must explain of the drift (of the sum of squares) before families are blamed.
EXPLAINED = 0.8
# Beyond this, a single row's drift says no more (requests that meet at other steps).
CLIP = 0.02


@dataclass(frozen=True)
class Drift:
    """How far fresh predictions are from those on record.

    rows: compared. moved: rows of which TTFT or TPOT moved by more than TOLERANCE, or whose status changed. status:
    rows that became priced or unsupported. most: the largest move. factors: part -> (factor of its costs, standard
    error), of parts that moved. explained: share of the drift's sum of squares that the factors account for.
    """

    rows: int
    moved: int
    status: int
    most: float
    factors: dict[str, tuple[float, float]]
    explained: float

    @property
    def holds(self) -> bool:
        """Whether no row moved."""
        return self.moved == 0

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        factors = {name: {"factor": value, "standard_error": error} for name, (value, error) in self.factors.items()}
        return {**self.__dict__, "factors": factors, "holds": self.holds}


def drift(fresh: Sequence[Prediction], recorded: Sequence[Prediction]) -> Drift:
    """Compare predictions of the same rows, in the same order; those on record with their causes."""
    both = [(new, old) for new, old in zip(fresh, recorded, strict=True) if not (new.reason or old.reason)]
    status = sum(bool(new.reason) != bool(old.reason) for new, old in zip(fresh, recorded, strict=True))
    moves = np.array([(_move(new.ttft_s, old.ttft_s), _move(new.tpot_s, old.tpot_s)) for new, old in both])
    moves = moves.reshape(-1, 2)
    moved = int((np.abs(moves).max(axis=1, initial=0.0) > TOLERANCE).sum())
    most = float(np.abs(moves).max(initial=0.0))
    if not moved:
        return Drift(len(fresh), status, status, most, {}, 0.0)
    factors, explained = _factors([old for _, old in both], moves)
    return Drift(len(fresh), moved + status, status, most, factors, explained)


def _move(new: float | None, old: float | None) -> float:
    assert new is not None
    assert old is not None
    return new / old - 1.0 if old > 0.0 else 0.0


def _factors(recorded: Sequence[Prediction], moves: Floats) -> tuple[dict[str, tuple[float, float]], float]:
    """Factors of the parts that moved, and what they explain. moves: [rows, 2], of TTFT and TPOT."""
    from scipy.optimize import least_squares

    names = (*PARTS, FRONT_END)
    lines, sizes = [], []
    for one, (ttft, tpot) in zip(recorded, moves, strict=True):
        if one.causes is None:
            continue
        for of, move in ((one.causes.ttft, ttft), (one.causes.tpot, tpot)):
            lines.append([of[name] for name in names])
            sizes.append(move)
    shares, size = np.array(lines).reshape(-1, len(names)), np.array(sizes)
    if len(size) < 2 * len(names):
        return {}, 0.0
    fit = least_squares(
        lambda more: shares @ more - size, np.zeros(len(names)), bounds=(-1.0, np.inf), loss="soft_l1", f_scale=CLIP
    )
    left = size - shares @ fit.x
    typical = np.median(np.abs(left)) / 0.6745  # of a normal's absolute deviations
    errors = np.sqrt(np.diag(np.linalg.pinv(shares.T @ shares))) * max(float(typical), 1e-6)
    explained = 1.0 - float((left**2).sum() / (size**2).sum())
    found = {
        name: (1.0 + float(more), float(error))
        for name, more, error in zip(names, fit.x, errors, strict=True)
        if abs(more) > max(NAMED, SIGMAS * error)
    }
    return found, explained


def words(found: Drift) -> str:
    """The drift in a line: what moved, by how much, and which costs explain it."""
    if found.holds:
        return f"{found.rows} rows priced again: as on record (the largest move {found.most:.2%})."
    told = f"{found.moved} of {found.rows} rows moved, by up to {found.most:.1%}"
    if found.status:
        told += f" ({found.status} became priced or unsupported)"
    if found.explained < EXPLAINED or not found.factors:
        return (
            f"{told}; no scale of any family of costs explains it ({found.explained:.0%}): a rule or a setting changed"
        )
    if set(SCALED) <= found.factors.keys():
        low, high = (pick(found.factors[name][0] for name in SCALED) for pick in (min, max))
        return f"{told}; all costs are {low:.2f} to {high:.2f} times those on record ({found.explained:.0%} explained)"
    named = ", ".join(
        f"{name} x {factor:.2f} (+-{error:.2f})"
        for name, (factor, error) in sorted(found.factors.items(), key=lambda item: -abs(item[1][0] - 1.0))
    )
    return f"{told}; the costs that moved: {named} ({found.explained:.0%} explained)"
