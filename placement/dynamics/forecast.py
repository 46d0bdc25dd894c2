"""The loads to come, as the mean of the last steps: of how many, earlier forecasts tell."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from placement.dynamics.series import Floats


@dataclass
class Forecast:
    """The mean of the last 1, 2, 4 ... steps, whichever has come closest to the steps that followed.

    Distance: sum of squares over layers and experts between a window's mean and that of the next 1, 2, 4 ... steps; it
    is added up over all past steps, for each pair of window and horizon.
    """

    _sums: list[Floats] = field(default_factory=list)
    _errors: dict[tuple[int, int], float] = field(default_factory=dict)

    def next_steps(self, past: Floats, horizon: float) -> Floats:
        """Mean load [layers, experts] of the next `horizon` steps; past: [steps, layers, experts], all steps so far."""
        self._take_in(past)
        now = len(past)
        ahead = 1
        while 2 * ahead <= horizon and 4 * ahead <= now:
            ahead *= 2
        windows = [window for window in _doublings(now) if (window, ahead) in self._errors]
        if not windows:
            return self._mean(max(now - 1, 0), now)
        best = min(windows, key=lambda window: self._errors[window, ahead])
        return self._mean(now - best, now)

    def _mean(self, first: int, last: int) -> Floats:
        return np.asarray((self._sums[last] - self._sums[first]) / (last - first))

    def _take_in(self, past: Floats) -> None:
        if not self._sums:
            self._sums.append(np.zeros(past.shape[1:]))
        for now in range(len(self._sums), len(past) + 1):
            self._sums.append(self._sums[-1] + past[now - 1])
            for ahead in _doublings(now // 2):
                origin = now - ahead
                came = self._mean(origin, now)
                # A window joins with all errors counted from when it was first long enough: compare like with like.
                for window in _doublings(origin):
                    miss = float(np.square(self._mean(origin - window, origin) - came).sum())
                    self._add(window, ahead, miss)

    def _add(self, window: int, ahead: int, miss: float) -> None:
        if (window, ahead) in self._errors:
            self._errors[window, ahead] += miss
            return
        shorter = self._errors.get((window // 2, ahead), miss)
        # As if it had missed like the next shorter window before.
        self._errors[window, ahead] = shorter if window > 1 else miss


def _doublings(limit: int) -> list[int]:
    found, one = [], 1
    while one <= limit:
        found.append(one)
        one *= 2
    return found
