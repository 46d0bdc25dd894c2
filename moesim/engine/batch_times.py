"""How long a batch takes on its way through pipeline stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from moesim.engine.batch_state import Plan


@dataclass(frozen=True)
class BatchTimes:
    """host_s: the engine's own time before the first stage; stages_s: of each stage; transfers_s: between them."""

    host_s: float
    stages_s: Sequence[float]
    transfers_s: Sequence[float]

    @property
    def alone_s(self) -> float:
        """From forming the batch to its end, where nothing else is under way."""
        return self.host_s + sum(self.stages_s) + sum(self.transfers_s)


class Staged(Protocol):
    """Times planned batches by stage."""

    def stages(self, plan: Plan) -> BatchTimes:
        """Raises OutsideProfile."""
        ...
