"""Read the output of nccl-tests and rccl-tests: runs of a collective with their ranks, bytes and seconds.

Lines (NVIDIA/nccl-tests, src/util.cu and src/common.cu; ROCm/rccl-tests prints the same): `# Rank 0 Group 0 Pid 7 on
HOST device 0 [0000:1b:00] NAME` for each rank, then `size count type [redop] [root]` and, once out of place and once
in place, `time algbw busbw #wrong`, times in microseconds, rates in 1e9 bytes/s. The out-of-place times are taken: in
place an all-to-all is not checked, and its `#wrong` is N/A. Sizes of 0, which an all-to-all over more ranks than
elements prints, are counted and left out. Newer builds print their own and NCCL's version, older ones no name of the
program.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from moesim.errors import BadInput
from moesim.units import MICRO
from profiles.importers.printed import agree, number, numbered, read_printed, rounding, whole

# Programs -> kinds of the store; the others of the suites price nothing.
KINDS = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
    "sendrecv": "send_recv",
}
# Names of the store and of the programs, without their underscores -> kinds of the store.
WRITTEN = {name.replace("_", ""): kind for pair in KINDS.items() for name, kind in (pair, (pair[1], pair[1]))}
OTHERS = ("alltoallv", "broadcast", "gather", "hypercube", "reduce", "scatter")
# busbw / algbw by kind and ranks (NVIDIA/nccl-tests, doc/PERFORMANCE.md).
BUS_SHARE: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda ranks: 2.0 * (ranks - 1) / ranks,
    "all_gather": lambda ranks: (ranks - 1) / ranks,
    "reduce_scatter": lambda ranks: (ranks - 1) / ranks,
    "all_to_all": lambda ranks: (ranks - 1) / ranks,
    "send_recv": lambda ranks: 1.0,
}
RATE_SLACK = 0.01  # both rates are computed from the time before it is rounded, so only roundings should differ
TYPES = {
    "int8", "uint8", "int32", "uint32", "int64", "uint64", "half", "float", "double", "bfloat16",
    "f8e4m3", "f8e5m2", "fp8_e4m3", "fp8_e5m2",
}  # fmt: skip
HALF, HALF_BY_ITERATION = 4, 8  # columns of one half; with per-iteration figures four more
LEAST, MOST = 3, 5  # columns before the halves: size, count, type, and in some builds redop and root
KEEP = "keep its lines as printed"


def kind_meant(written: str) -> str:
    """The kind that a word means, as the store names it or as its program is called; an unknown word as it stands."""
    word = re.sub(r"(_perf)?(_mpi)?$", "", written.strip().lower())
    return WRITTEN.get(word.replace("_", "").replace("-", ""), written)


_PREFIX = re.compile(r"^\s*(?:\[[\d,]+\](?:<stdout>:)?\s*|\d+:\s*)")
_STARTS = re.compile(r"^#\s*Collective test starting:\s*(\w+?)(?:_perf)?(?:_mpi)?\s*$")
_CALLED = re.compile(rf"\b({'|'.join([*KINDS, *OTHERS])})_perf(?:_mpi)?\b")
_THREADS = re.compile(r"^#\s*nThreads?:?\s+(\d+)\s+nGpus:?\s+(\d+)\b")
_RANK = re.compile(
    r"^#\s*Rank\s+(\d+)(?:\s+Group\s+(\d+))?\s+Pid\s+(\d+)\s+on\s+(\S+)\s+device\s+(\d+)\s*\[[^\]]*\]\s*(\S.*)?$"
)
_LOOKS_LIKE_A_RANK = re.compile(r"^#\s*Rank\b.*\bdevice\b")
_SUITE = re.compile(r"^#\s*nccl-tests version (\S+).*?\bnccl-library=(\d+)")
_LIBRARY = re.compile(r"\b([NR])CCL version\s*:?\s*(\d+\.\d+\.\d+)")
_RCCL_SUITE = re.compile(r"^#?\s*rccl-tests: Version (\S+)")
_STAMP = re.compile(r"\s(\d{4}-\d{2}-\d{2}) \d{2}:\d{2}:\d{2}\s*$")


@dataclass(frozen=True)
class NcclRun:
    """One run. What the log does not tell is None, 0 or "": kind and program, ranks and hosts, versions, device, date.

    points: (bytes, seconds) of each line. empty_sizes: lines of 0 bytes, left out. lines: the number of each point's.
    """

    kind: str | None
    program: str
    ranks: int
    hosts: int
    engine: str
    version: str
    suite_version: str
    device: str
    date: str
    points: tuple[tuple[float, float], ...]
    lines: tuple[int, ...]
    empty_sizes: int
    bus: tuple[tuple[str, str], ...]

    def fits(self, kind: str, ranks: int) -> int | None:
        """The line whose bus rate contradicts this kind over so many ranks; None where all of them fit."""
        share = BUS_SHARE[kind](ranks)
        for line, (algbw, busbw) in zip(self.lines, self.bus, strict=True):
            near = float(algbw) * share
            if not agree(near, busbw, RATE_SLACK, rounding(algbw) / max(float(algbw), 1e-9)):
                return line
        return None


@dataclass
class _Run:
    """A run while its lines come in."""

    program: str = ""
    called: str = ""
    processes: int = 0
    ranks: dict[int, tuple[str, str, int, str]] = field(default_factory=dict)
    groups: set[str] = field(default_factory=set)
    library: str = ""
    suite: str = ""
    rccl: bool = False
    date: str = ""
    by_iteration: bool = False
    by_processor: bool = False
    points: list[tuple[float, float]] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    bus: list[tuple[str, str]] = field(default_factory=list)
    empty_sizes: int = 0


def read_nccl_log(path: Path) -> tuple[NcclRun, ...]:
    """Read one log, which may hold several runs. Raises BadInput that names the file and the line."""
    return read_nccl_text(read_printed(path, "log of nccl-tests"), str(path))


def read_nccl_text(text: str, where: str) -> tuple[NcclRun, ...]:
    """The runs of a log; `where` names it in errors. Raises BadInput that names the line."""
    runs = [_Run()]
    for at, raw in numbered(text):
        line = _PREFIX.sub("", raw).strip()
        place = f"{where}:{at}"
        if runs[-1].points and _begins(line):
            runs.append(_Run())
        if line.startswith("#") or line.startswith("rccl-tests:"):
            _header(runs[-1], line, place)
        elif _is_point(line.split()):
            _point(runs[-1], line, at, place)
        else:
            _said(runs[-1], line)
    done = tuple(_finished(run, where) for run in runs if run.points)
    if not done:
        raise BadInput("no line with a size and a time", where=where, mend="give the whole output of nccl-tests")
    return done


def _begins(line: str) -> bool:
    """Whether another run begins here: its first header lines, or the shell that shows its command."""
    if line.startswith("#"):
        return any(pattern.match(line) for pattern in (_SUITE, _STARTS, _THREADS))
    return not _is_point(line.split()) and bool(_CALLED.search(line))


def _header(run: _Run, line: str, place: str) -> None:
    if found := _STARTS.match(line):
        run.program = found[1]
    elif found := _THREADS.match(line):
        run.processes = (whole(found[1]) or 0) * (whole(found[2]) or 0)
    elif found := _SUITE.match(line):
        run.suite, run.library = found[1], _decoded(found[2])
    elif found := _RCCL_SUITE.match(line):
        run.rccl, run.suite = True, found[1]
    elif _LOOKS_LIKE_A_RANK.match(line):
        _rank(run, line, place)
    elif "algbw" in line and "size" in line:
        run.by_iteration, run.by_processor = "i_min" in line, "cputime" in line


def _decoded(code: str) -> str:
    """NCCL_VERSION_CODE as text: 2.8 and before X*1000 + Y*100 + Z, since then X*10000 + Y*100 + Z (nccl.h)."""
    value = whole(code) or 0
    unit = 10000 if value >= 10000 else 1000
    return f"{value // unit}.{value % unit // 100}.{value % 100}" if value else ""


def _said(run: _Run, line: str) -> None:
    """Lines of NCCL itself, of the launcher, or of the shell: the library's version, and which program was called."""
    if found := _LIBRARY.search(line):
        run.rccl = run.rccl or found[1] == "R"
        run.library = run.library or found[2]
    elif found := _CALLED.search(line):
        run.called = found[1]


def _rank(run: _Run, line: str, place: str) -> None:
    found = _RANK.match(line)
    if not found or whole(found[1]) is None or whole(found[5]) is None:
        raise BadInput("this line of a rank is not nccl-tests'", where=place, mend=KEEP)
    rank, told = int(found[1]), (found[4], found[3], int(found[5]), (found[6] or "").strip())
    if run.ranks.get(rank, told) != told:
        raise BadInput(
            f"rank {rank} stands twice: these are {len(run.ranks) + 1} runs beside each other, not one over all ranks",
            where=place,
            mend="build nccl-tests with MPI=1 and run it again",
        )
    run.ranks[rank] = told
    run.groups.add(found[2] or "0")


def _is_point(words: list[str]) -> bool:
    return len(words) >= LEAST + HALF and (words[2] in TYPES or (words[0].isdigit() and words[1].isdigit()))


def _point(run: _Run, line: str, at: int, place: str) -> None:
    if stamp := _STAMP.search(line):
        run.date, line = run.date or stamp[1], line[: stamp.start()]
    words = line.split()
    half = HALF_BY_ITERATION if run.by_iteration else HALF
    start = LEAST + (len(words) - LEAST) % half
    if start > MOST or len(words) - start not in (half, 2 * half):
        raise BadInput(f"{len(words)} columns are not nccl-tests'", where=place, mend=KEEP)
    if run.by_processor:
        raise BadInput("these are times of the CPU's calls", where=place, mend="run nccl-tests without -C")
    size, (time, algbw, busbw, wrong) = words[0], words[start : start + 4]
    figures = [number(word) for word in (size, time, algbw, busbw)]
    if any(figure is None for figure in figures) or whole(size) is None:
        raise BadInput("size, time, algbw and busbw must be finite figures", where=place, mend=KEEP)
    if wrong != "N/A" and number(wrong) is None:
        raise BadInput(f"{wrong[:20]!r} is no count of wrong values", where=place, mend=KEEP)
    if wrong != "N/A" and float(wrong) > 0:
        raise BadInput(f"{wrong} values were wrong", where=place, mend="mend the machine, then measure again")
    if int(size) == 0:
        run.empty_sizes += 1
        return
    if float(time) <= 0:
        raise BadInput("the time must be above zero", where=place, mend="measure again with more iterations (-n)")
    rate = float(size) / (float(time) * 1e3)
    if not agree(rate, algbw, RATE_SLACK, rounding(time) / float(time)):
        raise BadInput(
            f"{size} bytes in {time} us are {rate:.4g} GB/s, not {algbw}", where=place,
            mend="times must be in us and rates in GB/s, as nccl-tests prints them",
        )  # fmt: skip
    run.points.append((float(size), float(time) * MICRO))
    run.lines.append(at)
    run.bus.append((algbw, busbw))


def _finished(run: _Run, where: str) -> NcclRun:
    """The run as a value. Raises BadInput where its ranks cannot be one communicator over equal nodes."""
    program = run.program or run.called
    place = f"{where}:{run.lines[0]}"
    if len(run.groups) > 1:
        raise BadInput(
            f"{len(run.groups)} groups of ranks ran at once", where=place, mend="run without NCCL_TESTS_SPLIT_MASK"
        )
    if run.ranks and set(run.ranks) != set(range(len(run.ranks))):
        lacking = min(set(range(max(run.ranks) + 1)) - set(run.ranks))
        raise BadInput(f"the line of rank {lacking} is missing above", where=place, mend=KEEP)
    if run.ranks and run.processes and len(run.ranks) % run.processes:
        raise BadInput(
            f"{len(run.ranks)} ranks stand above, but a process runs {run.processes}", where=place, mend=KEEP
        )
    places = Counter((host, number) for host, _, number, _ in run.ranks.values())
    for (host, at), count in places.items():
        if count > 1:
            raise BadInput(f"{count} ranks share device {at} of {host}", where=place, mend="run one rank a GPU")
    by_host = Counter(host for host, *_ in run.ranks.values())
    if len(set(by_host.values())) > 1:
        raise BadInput(
            f"{max(by_host.values())} ranks on one host and {min(by_host.values())} on another",
            where=place,
            mend="run as many ranks on each host",
        )
    devices = sorted({name for _, _, _, name in run.ranks.values() if name})
    if len(devices) > 1:
        raise BadInput(f"the ranks ran on {' and on '.join(devices)}", where=place, mend="measure GPUs of one kind")
    device = devices[0] if devices else ""
    engine = "rccl" if run.rccl or device.startswith("AMD ") else "nccl"
    return NcclRun(
        kind=KINDS.get(program), program=program, ranks=len(run.ranks), hosts=len(by_host), engine=engine,
        version=run.library, suite_version=run.suite, device=device, date=run.date, points=tuple(run.points),
        lines=tuple(run.lines), empty_sizes=run.empty_sizes, bus=tuple(run.bus),
    )  # fmt: skip
