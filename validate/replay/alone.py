"""A rank played by a process that is alone: it knows its number among the others, and meets nobody."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from validate.hardware.group import CoreShare, Group


class Alone(Group):
    """What one process needs of a group while it plays rank `rank` of `ranks`; exchanges are refused."""

    def wait(self, call: Callable[[], Any]) -> None:
        """Nobody is there to meet."""
        raise NotImplementedError("a rank that is played alone exchanges nothing")

    def gather(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """The process's own values: [...] -> [1, ...]."""
        return np.asarray(values, dtype=np.float64)[None]

    def core_share(self, share: CoreShare) -> float | None:
        """The share of a core that it had; None where a device does the work."""
        return share.worked_s / share.passed_s if share.passed_s > 0 else None

    def start_together(self) -> None:
        """Start at once, when the device is idle."""
        if self._cuda:
            self.torch.cuda.synchronize()
