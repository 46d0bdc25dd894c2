"""How far a price between two measured points may lie off: more where more happens between them.

The error of an interpolated price grows with the gap that it bridges, the ln ratio of the measured seconds on either
side, and never falls below the scatter of repeated timings. Points that were left out and predicted tell both: their
errors are ordered by gap, and the 90 % quantile within each class of gaps is the law. A price between two points that
nearly agree is thus surer than one across a step. The leave-out over whole tables (`every_second`) judges this law; a
price of the store still carries one figure for its family.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Classes of gaps, as many as leave each so many errors that the ninth of ten is not the last.
CLASSES, LEAST_ERRORS = 16, 20
QUANTILE = 0.9
# Half the width of a normal 90 % interval in standard deviations.
NINETY = 1.645


@dataclass(frozen=True)
class ErrorLaw:
    """The 90 % quantile of |ln(predicted / true)| at rising gaps; straight between, held beyond the first and last.

    gaps, errors: float64 [classes], both rising.
    """

    gaps: Floats
    errors: Floats

    def half_width(self, gap: Floats) -> Floats:
        """Half the 90 % interval in ln seconds, in the shape of `gap` (ln ratios of the seconds on either side)."""
        found: Floats = np.interp(np.abs(gap), self.gaps, self.errors)
        return found


def fit_law(gaps: Floats, errors: Floats) -> ErrorLaw | None:
    """The law of left-out points; None where there are none.

    gaps: [points], ln ratios, of either sign. errors: [points], ln(predicted / measured); what is not finite is passed
    over. Within a class the quantile is taken as found; classes are made to rise by the nearest rising sequence.
    """
    from profiles.monotone import least_squares

    use = np.isfinite(gaps) & np.isfinite(errors)
    size, miss = np.abs(gaps[use]), np.abs(errors[use])
    if not len(size):
        return None
    classes = int(np.clip(len(size) // LEAST_ERRORS, 1, CLASSES))
    parts = np.array_split(np.argsort(size, kind="stable"), classes)
    middle = np.array([np.median(size[part]) for part in parts])
    ninth = np.array([np.quantile(miss[part], QUANTILE) for part in parts])
    return ErrorLaw(np.maximum.accumulate(middle), least_squares(ninth))
