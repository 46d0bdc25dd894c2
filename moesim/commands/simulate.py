"""The command `simulate`."""
from __future__ import annotations
def simulate() -> None:
    """Simulate a scenario: throughput, latencies, step time and memory, with intervals."""
