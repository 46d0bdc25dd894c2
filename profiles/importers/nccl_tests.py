"""Read the output of nccl-tests and rccl-tests: bytes and seconds of a collective.

Lines (NVIDIA/nccl-tests, doc/PERFORMANCE.md and src/common.cu): `size count type redop [root] time algbw busbw #wrong`,
the last four once out of place and once in place, times in microseconds; `#` starts comments, of which `# Rank …` lines
tell the ranks and their hosts; mpirun and srun put `0:` before each. The out-of-place times are taken.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from moesim.errors import BadInput
from moesim.units import MICRO

KINDS = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
}
_PREFIX = re.compile(r"^\s*\d+:\s*")
_RANK = re.compile(r"#\s*Rank\s+(\d+)\b.*?\bon\s+(\S+)\s+device")
_STARTS = re.compile(r"#\s*Collective test starting:\s*(\w+?)(?:_perf)?\s*$")
# Numbers behind `size count type redop`: root, and twice time, algbw, busbw and #wrong; older builds have no root, and
# builds without in-place runs print one half.
HALF = 4
FIXED = 4
BANDWIDTH_SLACK = 0.05  # algbw is printed with two decimals: size / time must be it within this share


@dataclass(frozen=True)
class NcclLog:
    """One run: the collective (None where the log does not name it), its ranks and hosts, and (bytes, seconds)."""

    kind: str | None
    ranks: int
    hosts: int
    points: tuple[tuple[float, float], ...]


def read_nccl_log(path: Path) -> NcclLog:
    """Read one log. Raises BadInput that names the file and the line."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"cannot be read ({error.strerror})", where=str(path), mend="give a log of nccl-tests") from None
    except UnicodeDecodeError:
        raise BadInput("not a text file", where=str(path), mend="give a log of nccl-tests") from None
    kind: str | None = None
    ranks: dict[int, str] = {}
    points: list[tuple[float, float]] = []
    for number, raw in enumerate(text.splitlines(), start=1):
        line = _PREFIX.sub("", raw).strip()
        if line.startswith("#"):
            rank, starts = _RANK.search(line), _STARTS.search(line)
            if rank:
                ranks[int(rank[1])] = rank[2]
            if starts:
                kind = KINDS.get(starts[1])
        elif line[:1].isdigit() and len(line.split()) > FIXED:
            points.append(_point(line.split(), f"{path}:{number}"))
    if not points:
        raise BadInput("no line with a size and a time", where=str(path), mend="give the whole output of nccl-tests")
    return NcclLog(kind, len(ranks), len(set(ranks.values())), tuple(points))


def _point(words: list[str], where: str) -> tuple[float, float]:
    rest = words[FIXED:]
    start = len(rest) % HALF  # a root stands before the halves
    if start > 1 or len(rest) - start not in (HALF, 2 * HALF):
        raise BadInput(f"{len(words)} columns are not nccl-tests'", where=where, mend="keep its lines as printed")
    try:
        size, time, algbw = float(words[0]), float(rest[start]), float(rest[start + 1])
    except ValueError:
        raise BadInput("size, time and algbw must be numbers", where=where, mend="keep its lines as printed") from None
    if not (math.isfinite(size) and math.isfinite(time) and math.isfinite(algbw) and size > 0 and time > 0):
        raise BadInput("size and time must be above zero", where=where, mend="leave out sizes of 0 (-b 8)")
    rate = size / (time * 1e3)
    if abs(rate - algbw) > BANDWIDTH_SLACK * max(rate, algbw) + 0.01:
        raise BadInput(
            f"{size:g} bytes in {time:g} us are {rate:.2f} GB/s, not {algbw:g}", where=where, mend="times are in us"
        )
    return size, time * MICRO
