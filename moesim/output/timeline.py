"""Timelines as gzip-compressed Chrome trace JSON, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

Format: "Trace Event Format" (Google, 2016): complete events "X" with `ts` and `dur` in microseconds, counters "C",
spans "b" to "e" that may overlap, flow arrows "s" to "f", and metadata "M" that name processes and threads. Written by
hand, a piece at a time: a trace of a million slices is never a Python object, and the same input gives the same bytes.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterable, Iterator
from itertools import chain, pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from moesim.engine.critical import CriticalPath
from moesim.errors import BadInput
from moesim.files import whole_file
from moesim.graph.task import StepTimes, Stream, Task, TaskGraph
from moesim.units import MICRO

# process, thread, name, start_s, duration_s
Slice = tuple[str, str, str, float, float]
# process, name, time_s, value
Counter = tuple[str, str, float, float]
# process, id, name, start_s, end_s: spans of one process may overlap; those of one id nest
Span = tuple[str, int, str, float, float]

# zlib's level: 1,000,000 slices of a simulated step whose times are random on every rank take 9.1 MB and 2.2 s of CPU
# at level 7, 9.5 MB and 2.0 s at level 6. (The order of an event's fields is worth as much: it puts a slice's
# duration next to its rank, and the start, which ranks that met share, last.)
COMPRESSION = 7
# Resolution of a step's slices and of named tracks. Starts and ends are rounded to it, not durations, so that slices
# that follow each other on a thread never overlap (viewers drop those that do).
STEP_RESOLUTION_S = 1e-9
TRACK_RESOLUTION_S = MICRO  # the unit of `ts`, so these are whole numbers
# The process that repeats the critical path.
CRITICAL = "critical path"
# Slices that are formatted and compressed at once.
BATCH = 2048


def write_timeline(
    path: Path,
    graph: TaskGraph,
    times: StepTimes,
    *,
    step: int = 0,
    offset_s: float = 0.0,
    critical: CriticalPath | None = None,
    arrows: bool = False,
    slices: Iterable[Slice] = (),
    counters: Iterable[Counter] = (),
    spans: Iterable[Span] = (),
) -> int:
    """Write one step: ranks as processes, streams as threads, a slice for each task with its layer and operation.

    times: with start_s and end_s, as the executors give when asked for a timeline; step: which of its steps; offset_s:
    when it begins. critical: its critical path, whose slices are marked and repeated in a process of their own. arrows:
    draw dependencies between streams, and from rank to rank along the critical path. `slices`, `counters` and `spans`
    add tracks of their own, in named processes. Returns the number of slices. The file is written whole
    or not at all. Raises BadInput where the times hold no timeline, no such step, or do not fit the graph.
    """
    if times.start_s is None or times.end_s is None:
        raise BadInput("these step times hold no timeline", where=str(path), mend="run the executor with timeline=True")
    tasks, steps, ranks = times.start_s.shape
    if (tasks, ranks) != (len(graph.tasks), graph.ranks):
        raise BadInput(
            f"times of {tasks} tasks on {ranks} ranks for a graph of {len(graph.tasks)} tasks on {graph.ranks} ranks",
            where=str(path),
            mend="give the times of this graph",
        )
    if not 0 <= step < steps:
        raise BadInput(f"step {step} of a timeline of {steps} steps", where=str(path), mend="count steps from 0")
    with whole_file(path) as temporary, temporary.open("wb") as raw:
        writer = _Writer(raw, where=str(path))
        for rank in range(ranks):
            writer.name_process(rank, f"rank {rank}")
            for stream in sorted({task.stream for task in graph.tasks}):
                writer.name_thread(rank, int(stream), Stream(stream).name.lower())
        start_s, end_s = times.start_s[:, step] + offset_s, times.end_s[:, step] + offset_s
        _write_tasks(writer, graph, start_s, end_s, critical)
        if arrows:
            _write_arrows(writer, graph, start_s, end_s, critical)
        own = () if critical is None else _critical_slices(graph, start_s, end_s, critical)
        _write_tracks(writer, chain(own, slices), counters, spans, first_process=ranks)
        return writer.close()


def write_tracks(
    path: Path, slices: Iterable[Slice], counters: Iterable[Counter] = (), spans: Iterable[Span] = ()
) -> int:
    """Write named tracks alone, of requests for example; the iterables are read once, as the file is written.

    slices: (process, thread, name, start_s, duration_s); counters: (process, name, time_s, value); spans: (process, id,
    name, start_s, end_s). Returns the number
    of slices. The file is written whole or not at all. Raises BadInput for a time or value that is not finite.
    """
    with whole_file(path) as temporary, temporary.open("wb") as raw:
        writer = _Writer(raw, where=str(path))
        _write_tracks(writer, slices, counters, spans, first_process=0)
        return writer.close()


def _write_tasks(
    writer: _Writer,
    graph: TaskGraph,
    start_s: NDArray[np.float64],
    end_s: NDArray[np.float64],
    critical: CriticalPath | None,
) -> None:
    ranks = graph.ranks
    marked: dict[int, set[int]] = {}
    for index, rank in zip(*((critical.task, critical.rank) if critical is not None else ((), ())), strict=True):
        marked.setdefault(int(index), set()).add(int(rank))
    values = np.empty((ranks, 3))
    values[:, 0] = np.arange(ranks)
    for index, task in enumerate(graph.tasks):
        first, last = (np.rint(times_s[index] / STEP_RESOLUTION_S) for times_s in (start_s, end_s))
        values[:, 1] = (last - first) * (STEP_RESOLUTION_S / MICRO)
        values[:, 2] = first * (STEP_RESOLUTION_S / MICRO)
        told = {"layer": task.layer, "operation": task.operation}
        if index not in marked:
            writer.slices(_task_template(task, told), values)
            continue
        on_path = np.zeros(ranks, dtype=bool)
        on_path[list(marked[index])] = True
        writer.slices(_task_template(task, told), values[~on_path])
        writer.slices(_task_template(task, {**told, "critical": True}), values[on_path])


def _task_template(task: Task, arguments: dict[str, Any]) -> str:
    """A slice of a task, with places for its rank, duration and start; chrome://tracing shows critical ones red."""
    colour = ',"cname":"terrible"' if "critical" in arguments else ""
    name, told = json.dumps(task.name), json.dumps(arguments)
    same = f'"ph":"X","name":{name},"args":{told}{colour},"tid":{int(task.stream)}'.replace("%", "%%")
    return f'{{"pid":%d,"dur":%.3f,{same},"ts":%.3f}},\n'


def _critical_slices(
    graph: TaskGraph, start_s: NDArray[np.float64], end_s: NDArray[np.float64], critical: CriticalPath
) -> Iterator[Slice]:
    """The critical path as a track of its own, which every viewer shows."""
    for index, rank in zip(critical.task.tolist(), critical.rank.tolist(), strict=True):
        task = graph.tasks[index]
        layer = f" of layer {task.layer}" if task.layer >= 0 else ""
        start, end = float(start_s[index, rank]), float(end_s[index, rank])
        yield CRITICAL, "chain of tasks", f"{task.name}{layer}, rank {rank}", start, end - start


def _write_arrows(
    writer: _Writer,
    graph: TaskGraph,
    start_s: NDArray[np.float64],
    end_s: NDArray[np.float64],
    critical: CriticalPath | None,
) -> None:
    """Dependencies between streams on each rank, and the critical path where it changes the rank."""
    middle = (start_s + end_s) / 2  # inside the slice, to which viewers tie an arrow's end
    long = end_s - start_s > 2 * STEP_RESOLUTION_S
    for index, task in enumerate(graph.tasks):
        for other in task.depends_on:
            if graph.tasks[other].stream == task.stream:
                continue
            for rank in np.flatnonzero(long[index] & long[other]).tolist():
                ends = (middle[other, rank], middle[index, rank])
                writer.arrow("dependency", (rank, graph.tasks[other].stream), (rank, task.stream), ends)
    if critical is None:
        return
    path = list(zip(critical.task.tolist(), critical.rank.tolist(), strict=True))
    for (other, other_rank), (index, rank) in pairwise(path):
        if rank != other_rank and long[index, rank] and long[other, other_rank]:
            places = (other_rank, graph.tasks[other].stream), (rank, graph.tasks[index].stream)
            writer.arrow("critical", *places, (middle[other, other_rank], middle[index, rank]))


def _write_tracks(
    writer: _Writer,
    slices: Iterable[Slice],
    counters: Iterable[Counter],
    spans: Iterable[Span],
    *,
    first_process: int,
) -> None:
    processes: dict[str, int] = {}
    threads: dict[tuple[str, str], tuple[int, int]] = {}
    names: dict[str, str] = {}

    def process_of(process: str) -> int:
        if process not in processes:
            processes[process] = first_process + len(processes)
            writer.name_process(processes[process], process)
        return processes[process]

    for process, thread, name, start_s, duration_s in slices:
        place = threads.get((process, thread))
        if place is None:
            number = process_of(process)
            place = threads[process, thread] = (number, sum(owner == process for owner, _ in threads))
            writer.name_thread(*place, thread)
        if name not in names:
            names[name] = json.dumps(name)
        writer.slice(names[name], place, start_s, duration_s)
    for process, name, time_s, value in counters:
        writer.counter(process_of(process), name, time_s, value)
    for process, number, name, start_s, end_s in spans:
        writer.span(process_of(process), number, name, start_s, end_s)


class _Writer:
    """Writes events into a gzip stream; no name and no time of its own in the header."""

    def __init__(self, raw: IO[bytes], *, where: str) -> None:
        self._out = gzip.GzipFile(filename="", mode="wb", compresslevel=COMPRESSION, fileobj=raw, mtime=0)
        self._where = where
        self._pending: list[str] = []
        self._slices = 0
        self._arrows = 0
        self._out.write(b'{"displayTimeUnit":"ms","traceEvents":[\n')

    def name_process(self, process: int, name: str) -> None:
        arguments = json.dumps({"name": name})
        self._add(f'{{"ph":"M","name":"process_name","pid":{process},"args":{arguments}}},\n')
        # Perfetto sorts processes by name unless told the order.
        self._add(f'{{"ph":"M","name":"process_sort_index","pid":{process},"args":{{"sort_index":{process}}}}},\n')

    def name_thread(self, process: int, thread: int, name: str) -> None:
        arguments = json.dumps({"name": name})
        self._add(f'{{"ph":"M","name":"thread_name","pid":{process},"tid":{thread},"args":{arguments}}},\n')

    def slice(self, name: str, place: tuple[int, int], start_s: float, duration_s: float) -> None:
        """One slice; `name` is JSON already, the place is (process, thread)."""
        if not (-math.inf < start_s < math.inf and 0.0 <= duration_s < math.inf):
            self._refuse(name)
        first = round(start_s / TRACK_RESOLUTION_S)
        length = round((start_s + duration_s) / TRACK_RESOLUTION_S) - first
        self._add(f'{{"ph":"X","name":{name},"pid":{place[0]},"tid":{place[1]},"ts":{first},"dur":{length}}},\n')
        self._slices += 1

    def slices(self, template: str, values: NDArray[np.float64]) -> None:
        """One slice for each row of `values`, all formatted at once."""
        if not np.isfinite(values).all():
            self._refuse(template)
        self._add((template * len(values)) % tuple(values.ravel().tolist()))
        self._slices += len(values)

    def span(self, process: int, number: int, name: str, start_s: float, end_s: float) -> None:
        """A span that may overlap others of its process."""
        if not -math.inf < start_s <= end_s < math.inf:
            self._refuse(name)
        same = f'"cat":"span","id":{number},"name":{json.dumps(name)},"pid":{process},"tid":0'
        first, last = (round(time_s / TRACK_RESOLUTION_S) for time_s in (start_s, end_s))
        self._add(f'{{"ph":"b",{same},"ts":{first}}},\n{{"ph":"e",{same},"ts":{last}}},\n')

    def arrow(self, name: str, tail: tuple[int, int], head: tuple[int, int], times_s: tuple[float, float]) -> None:
        """An arrow from a slice to a later one, each named by its (process, thread) and a time inside it."""
        self._arrows += 1
        same = f'"cat":"{name}","id":{self._arrows},"name":"{name}"'
        (process, thread), (other, lane) = tail, head
        first, last = (time_s / MICRO for time_s in times_s)
        self._add(
            f'{{"ph":"s",{same},"pid":{process},"tid":{int(thread)},"ts":{first:.4f}}},\n'
            f'{{"ph":"f","bp":"e",{same},"pid":{other},"tid":{int(lane)},"ts":{last:.4f}}},\n'
        )

    def counter(self, process: int, name: str, time_s: float, value: float) -> None:
        """One value of a counter track."""
        if not (math.isfinite(time_s) and math.isfinite(value)):
            self._refuse(name)
        text = json.dumps(name)
        when = round(time_s / TRACK_RESOLUTION_S)
        self._add(f'{{"ph":"C","name":{text},"pid":{process},"ts":{when},"args":{{"value":{float(value)!r}}}}},\n')

    def _refuse(self, name: str) -> None:
        raise BadInput(
            f"a slice or counter has no finite time or value: {name[:60]}",
            where=self._where,
            mend="give finite numbers",
        )

    def _add(self, text: str) -> None:
        self._pending.append(text)
        if len(self._pending) >= BATCH:
            self._flush()

    def _flush(self) -> None:
        self._out.write("".join(self._pending).encode())
        self._pending.clear()

    def close(self) -> int:
        """End the JSON and the stream; returns the number of slices."""
        # JSON allows no comma after the last event: end with one more, which names the tool.
        self._add('{"ph":"M","name":"process_labels","pid":0,"args":{"labels":"moesim"}}\n]}\n')
        self._flush()
        self._out.close()
        return self._slices
