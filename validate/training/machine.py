"""How much of a machine other processes use, told from the kernel's own clock of its processors."""

from __future__ import annotations

import os
from pathlib import Path

STAT = Path("/proc/stat")
# Fields of the line `cpu` of a working processor: user, nice, system, irq, softirq (proc_stat(5)); user holds guest.
WORKING = (0, 1, 2, 5, 6)


def busy_s(path: Path = STAT) -> float | None:
    """Seconds that all processors together have worked since the machine started; None where nothing tells it."""
    try:
        fields = path.read_text(encoding="ascii").splitlines()[0].split()
        if fields[0] != "cpu":
            return None
        return sum(int(fields[1 + index]) for index in WORKING) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None


def others_cores(busy_before: float | None, busy_after: float | None, own_s: float, wall_s: float) -> float | None:
    """Cores that other processes kept busy over a time of which the own ones worked `own_s`; None where not told."""
    if busy_before is None or busy_after is None or wall_s <= 0:
        return None
    return max(0.0, (busy_after - busy_before - own_s) / wall_s)
