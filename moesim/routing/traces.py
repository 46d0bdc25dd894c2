"""Per-token routing traces: which experts each token picked, counted by step."""

from __future__ import annotations

from pathlib import Path

from moesim.errors import BadInput
from moesim.routing.parquet import FORMATS
from moesim.routing.readers import read_loads
from moesim.routing.trace import RoutingCounts


def read_trace(
    path: Path, *, phase: str = "any", weight: float = 1.0, experts: int | None = None, tokens: bool = False
) -> RoutingCounts:
    """Count a per-token trace by step; `tokens` as `read_loads` takes it.

    Raises BadInput that names the formats, MissingPart where `.pt` needs torch.
    """
    path = Path(path)
    if path.suffix not in (".parquet", ".pt"):
        raise BadInput(
            f"{path.suffix!r} is no format of traces",
            where=str(path),
            mend=f"give {FORMATS}; or SGLang's per_token .pt",
        )
    return read_loads(path, phase=phase, weight=weight, experts=experts, tokens=tokens)
