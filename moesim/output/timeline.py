"""Timelines as gzip-compressed Chrome trace JSON, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

Format: "Trace Event Format" (Google, 2016): complete events "X" with `ts` and `dur` in microseconds, counters "C",
and metadata "M" that name processes and threads. Written by hand, a piece at a time: a trace of a million slices is
never a Python object, and the same input gives the same bytes.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from moesim.errors import BadInput
from moesim.files import whole_file
from moesim.graph.task import StepTimes, Stream, TaskGraph
from moesim.units import MICRO

# process, thread, name, start_s, duration_s
Slice = tuple[str, str, str, float, float]
# process, name, time_s, value
Counter = tuple[str, str, float, float]

# zlib's level: 1,000,000 slices of a simulated step whose times are random on every rank take 9.1 MB and 2.2 s of CPU
# at level 7, 9.5 MB and 2.0 s at level 6. (The order of an event's fields is worth as much: it puts a slice's
# duration next to its rank, and the start, which ranks that met share, last.)
COMPRESSION = 7
# Resolution of a step's slices and of named tracks. Starts and ends are rounded to it, not durations, so that slices
# that follow each other on a thread never overlap (viewers drop those that do).
STEP_RESOLUTION_S = 1e-9
TRACK_RESOLUTION_S = MICRO  # the unit of `ts`, so these are whole numbers
# Slices that are formatted and compressed at once.
BATCH = 2048


def write_timeline(
    path: Path,
    graph: TaskGraph,
    times: StepTimes,
    *,
    step: int = 0,
    slices: Iterable[Slice] = (),
    counters: Iterable[Counter] = (),
) -> int:
    """Write one step: ranks as processes, streams as threads, a slice for each task with its layer and operation.

    times: with start_s and end_s, as the executors give when asked for a timeline; step: which of its steps. `slices`
    and `counters` add tracks of their own, in named processes. Returns the number of slices. The file is written whole
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
        _write_tasks(writer, graph, times.start_s[:, step], times.end_s[:, step])
        _write_tracks(writer, slices, counters, first_process=ranks)
        return writer.close()


def write_tracks(path: Path, slices: Iterable[Slice], counters: Iterable[Counter] = ()) -> int:
    """Write named tracks alone, of requests for example; both iterables are read once, as the file is written.

    slices: (process, thread, name, start_s, duration_s); counters: (process, name, time_s, value). Returns the number
    of slices. The file is written whole or not at all. Raises BadInput for a time or value that is not finite.
    """
    with whole_file(path) as temporary, temporary.open("wb") as raw:
        writer = _Writer(raw, where=str(path))
        _write_tracks(writer, slices, counters, first_process=0)
        return writer.close()


def _write_tasks(writer: _Writer, graph: TaskGraph, start_s: NDArray[np.float64], end_s: NDArray[np.float64]) -> None:
    ranks = graph.ranks
    values = np.empty((ranks, 3))
    values[:, 0] = np.arange(ranks)
    for index, task in enumerate(graph.tasks):
        first, last = (np.rint(times_s[index] / STEP_RESOLUTION_S) for times_s in (start_s, end_s))
        values[:, 1] = (last - first) * (STEP_RESOLUTION_S / MICRO)
        values[:, 2] = first * (STEP_RESOLUTION_S / MICRO)
        arguments = json.dumps({"layer": task.layer, "operation": task.operation})
        name = json.dumps(task.name)
        same = f'"ph":"X","name":{name},"args":{arguments},"tid":{int(task.stream)}'.replace("%", "%%")
        writer.slices(f'{{"pid":%d,"dur":%.3f,{same},"ts":%.3f}},\n', values)


def _write_tracks(writer: _Writer, slices: Iterable[Slice], counters: Iterable[Counter], *, first_process: int) -> None:
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


class _Writer:
    """Writes events into a gzip stream; no name and no time of its own in the header."""

    def __init__(self, raw: IO[bytes], *, where: str) -> None:
        self._out = gzip.GzipFile(filename="", mode="wb", compresslevel=COMPRESSION, fileobj=raw, mtime=0)
        self._where = where
        self._pending: list[str] = []
        self._slices = 0
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
