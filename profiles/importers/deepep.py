"""Read what DeepEP's own tests print: the best times of the normal kernels, and each rank's low-latency times.

Lines, by version of deepseek-ai/DeepEP (tests/test_intranode.py, test_internode.py, test_low_latency.py):

    [config] num_tokens=4096, hidden=7168, num_topk_groups=2, num_topk=8
    [tuning] Best dispatch (FP8): SMs 24, NVL chunk 28, RDMA chunk 24: 38.19 GB/s (RDMA), 124.92 GB/s (NVL)
      ... RDMA chunk 24, transmit: 2357.00 us, notify: 912.57 us, BW: 51.12 GB/s (RDMA), 95.21 GB/s (NVL)
      ... RDMA chunk 24: 912 + 2357 us, 51.12 GB/s (RDMA), 95.21 GB/s (NVL)
    [tuning] Best combine: SMs 24, NVL chunk 3: 332.57 GB/s (NVL), t: 499.58 us
    [rank 0] Dispatch bandwidth: 49.81 GB/s, avg_t=304.60 us | Combine bandwidth: 64.90 GB/s, avg_t=452.38 us

Several ranks may stand on one line. What else they print (every configuration tried, sums of dispatch and combine,
times with a receive hook) is counted and left out.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from moesim.errors import BadInput
from profiles.importers.printed import number, numbered, read_printed, whole

KEEP = "keep its lines as DeepEP's tests print them"
_PIECES = re.compile(r"(?=\[(?:rank \d+|tuning|config)\])")
_CONFIG = re.compile(r"^\[config\]\s+(\w+=\S+?(?:,\s*\w+=\S+?)*)\s*$")
CONFIG_NAMES = {
    "num_tokens": "tokens", "hidden": "hidden", "num_topk": "top_k", "num_topk_groups": "topk_groups",
    "num_experts": "experts", "num_ranks": "ep",
}  # fmt: skip
_BEST = re.compile(
    r"^\[tuning\] Best (dispatch|combine)(?: \((FP8|BF16)\))?: SMs (\S+), NVL chunk ([^\s,:]+)"
    r"(?:, RDMA chunk ([^\s,:]+))?[,:] (.*?)\s*$"
)
_RDMA, _NVL = r"(?P<rdma>\S+) GB/s \(RDMA\)", r"(?P<nvl>\S+) GB/s \(NVL\)"
_TIMES = (
    re.compile(rf"^(?:{_RDMA}, )?{_NVL}$"),
    re.compile(rf"^{_NVL}, (?:avg_)?t: (?P<transmit>\S+) us$"),
    re.compile(rf"^transmit: (?P<transmit>\S+) us, notify: (?P<notify>\S+) us, BW: {_RDMA}, {_NVL}$"),
    re.compile(rf"^(?P<notify>\S+) \+ (?P<transmit>\S+) us, {_RDMA}, {_NVL}$"),
)
_RANK = re.compile(
    r"^\[rank (\d+)\] Dispatch bandwidth: (\S+) GB/s, avg_t=(\S+) us \| "
    r"Combine bandwidth: (\S+) GB/s, avg_t=(\S+) us\s*$"
)
_LEFT_OUT = (
    ("[tuning]", "[tuning] lines of configurations that were not the best"),
    ("Dispatch + combine bandwidth", "sums of dispatch and combine"),
    ("send/recv time", "times with a receive hook"),
)


@dataclass(frozen=True)
class Setup:
    """What was exchanged: tokens of a rank, hidden size, top-k, experts, ranks, nodes, node-limited groups."""

    tokens: int | None = None
    hidden: int | None = None
    top_k: int | None = None
    experts: int | None = None
    ep: int | None = None
    nodes: int | None = None
    topk_groups: int | None = None


@dataclass(frozen=True)
class Best:
    """A best line of the normal kernels, figures as printed ("" where there is none); line: its number in the log."""

    step: str
    dtype: str
    sms: int
    rdma: str
    nvl: str
    transmit_us: str
    notify_us: str
    internode: bool
    line: int


@dataclass(frozen=True)
class RankTime:
    """A rank's low-latency dispatch or combine, figures as printed."""

    step: str
    rank: int
    rate: str
    time_us: str
    line: int


@dataclass(frozen=True)
class DeepEpLog:
    """One log: what it says of the setup, with the line, its best lines, its ranks' lines, and what is left out."""

    printed: Setup
    config_line: int
    best: tuple[Best, ...]
    ranks: tuple[RankTime, ...]
    left_out: dict[str, int]


def read_deepep_log(path: Path) -> DeepEpLog:
    """Read one log. Raises BadInput that names the file and the line."""
    return read_deepep_text(read_printed(path, "log of DeepEP's tests"), str(path))


def read_deepep_text(text: str, where: str) -> DeepEpLog:
    """The lines of a log; `where` names it in errors. Raises BadInput that names the line."""
    printed: dict[str, int] = {}
    config_line = 0
    best: list[Best] = []
    ranks: list[RankTime] = []
    left_out: Counter[str] = Counter()
    for at, line in numbered(text):
        for piece in _PIECES.split(line):
            place = f"{where}:{at}"
            if piece.startswith("[config]"):
                told = _config(piece, place)
                for name, value in told.items():
                    if printed.setdefault(name, value) != value:
                        raise BadInput(
                            f"{name} is {value}, but {printed[name]} in line {config_line}", where=place,
                            mend="cut the log into one file for each run",
                        )  # fmt: skip
                config_line = config_line or at
            elif piece.startswith("[tuning] Best"):
                best.append(_best(piece, at, place))
            elif piece.startswith("[rank ") and "] Dispatch bandwidth" in piece:
                ranks += _rank(piece, at, place)
            else:
                for mark, reason in _LEFT_OUT:
                    if mark in piece:
                        left_out[reason] += 1
                        break
    if not best and not ranks:
        told_of = "; ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise BadInput(
            f"no best time and no rank's time here{f' ({told_of})' if told_of else ''}", where=where,
            mend="give the whole output of test_intranode.py, test_internode.py or test_low_latency.py",
        )  # fmt: skip
    return DeepEpLog(Setup(**printed), config_line, tuple(best), tuple(ranks), dict(left_out))


def _config(piece: str, place: str) -> dict[str, int]:
    found = _CONFIG.match(piece)
    if not found:
        raise BadInput("this [config] is not DeepEP's", where=place, mend=KEEP)
    told = {}
    for part in found[1].split(","):
        name, _, text = part.strip().partition("=")
        if name in CONFIG_NAMES:
            value = whole(text)
            if not value:
                raise BadInput(f"{name} is {text[:20]!r}, no whole number above zero", where=place, mend=KEEP)
            told[CONFIG_NAMES[name]] = value
    return told


def _best(piece: str, at: int, place: str) -> Best:
    found = _BEST.match(piece)
    times = next((match for shape in _TIMES if (match := shape.match(found[6]))), None) if found else None
    if not found or not times:
        raise BadInput("this best line is not DeepEP's", where=place, mend=KEEP)
    step, dtype, sms, _, rdma_chunk, _ = found.groups()
    figures = {"rdma": "", "nvl": "", "transmit": "", "notify": "", **times.groupdict(default="")}
    for name, text in figures.items():
        if text and (number(text) is None or (name != "notify" and number(text) == 0)):
            raise BadInput(f"{name} is {text[:20]!r}, no finite figure above zero", where=place, mend=KEEP)
    if not whole(sms):
        raise BadInput(f"{sms[:20]!r} is no number of multiprocessors", where=place, mend=KEEP)
    if (step == "dispatch") != (dtype is not None) or bool(rdma_chunk) != bool(figures["rdma"]):
        raise BadInput("this best line is not DeepEP's", where=place, mend=KEEP)
    return Best(
        step, (dtype or "BF16").lower(), int(sms), figures["rdma"], figures["nvl"], figures["transmit"],
        figures["notify"], bool(rdma_chunk), at,
    )  # fmt: skip


def _rank(piece: str, at: int, place: str) -> list[RankTime]:
    found = _RANK.match(piece)
    rank = whole(found[1]) if found else None
    if not found or rank is None:
        raise BadInput("this line of a rank is not DeepEP's", where=place, mend=KEEP)
    times = []
    for step, rate, time in (("dispatch", found[2], found[3]), ("combine", found[4], found[5])):
        if not number(rate) or not number(time):
            raise BadInput(
                f"{step}: {rate[:20]} GB/s in {time[:20]} us are no figures above zero", where=place, mend=KEEP
            )
        times.append(RankTime(step, rank, rate, time, at))
    return times
