"""CPU time of the executors and the timeline on DeepSeek-V3-sized steps; the budgets are those of the design.

Budgets are in CPU time of the machine that CI uses; the gates here allow `SLACK` times as much, so that they only catch
an algorithm that went wrong, never a slow machine. What it took is printed (pytest -s) and kept by pytest-benchmark.
"""

from __future__ import annotations

import time
from functools import partial

import numpy as np
import pytest

from moesim.engine import des, maxplus
from moesim.engine.critical import critical_path
from moesim.graph.task import Link, Stream, Task, TaskGraph
from moesim.output.timeline import write_timeline

pytestmark = pytest.mark.benchmark(timer=time.process_time)

SLACK = 4.0
RANKS = 32
LAYERS = 61
# Operations of a layer: (name, stream, whether it differs from rank to rank).
LAYER = (
    ("launches", Stream.COMPUTE, False),
    ("projections", Stream.COMPUTE, True),
    ("attention", Stream.COMPUTE, True),
    ("attention sync", Stream.COMMUNICATION, False),
    ("gate", Stream.COMPUTE, True),
    ("shared expert", Stream.COMPUTE, True),
    ("dispatch", Stream.COMMUNICATION, True),
    ("experts", Stream.COMPUTE, True),
    ("combine", Stream.COMMUNICATION, True),
    ("gather", Stream.COMMUNICATION, False),
    ("norm", Stream.COMPUTE, False),
)


def steps_of_deepseek_v3(steps, *, contended, layers=LAYERS):
    """A chain of 671 tasks; contended: with a prefetch on every layer whose NIC use the exchanges feel."""
    rng = np.random.default_rng(0)
    everyone, pairs = np.zeros(RANKS, dtype=np.int64), np.arange(RANKS) // 2
    tasks: list[Task] = []
    last: tuple[int, ...] = ()
    for layer in range(layers):
        if contended:
            seconds, links = rng.exponential(5e-4, (steps, RANKS)), ((Link.PCIE, 1.0), (Link.NIC, 0.6))
            tasks.append(Task("prefetch", "prefetch", Stream.COPY, seconds, links=links, layer=layer))
        for name, stream, by_rank in LAYER:
            seconds = rng.exponential(5e-5, (steps, RANKS) if by_rank else (steps, 1))
            meets = stream == Stream.COMMUNICATION
            groups = (everyone if by_rank else pairs) if meets else None
            used = ((Link.NIC if by_rank else Link.NVLINK, 1.0),) if meets else ()
            tasks.append(Task(name, name, stream, seconds, last, groups, used, layer))
            last = (len(tasks) - 1,)
    return TaskGraph(steps, RANKS, tuple(tasks))


def gate(benchmark, name, work, budget_s):
    """Time work once; the caller has run it before, so that compiled code is warm."""
    taken_s = []

    def timed():
        started = time.process_time()
        work()
        taken_s.append(time.process_time() - started)

    benchmark.pedantic(timed, rounds=1)
    taken = benchmark.extra_info["cpu_s"] = taken_s[0]
    print(f"\n{name}: {taken:.3f} s CPU (budget {budget_s} s)")
    assert taken < budget_s * SLACK


def test_maxplus_thousand_steps(benchmark):
    graph = steps_of_deepseek_v3(1000, contended=False)
    maxplus.run(graph)
    gate(benchmark, "maxplus, 1,000 steps", lambda: maxplus.run(graph), 0.3)


@pytest.mark.parametrize(("contended", "budget_s"), [(False, 0.1), (True, 2.0)])
def test_des_one_step(benchmark, contended, budget_s):
    graph = steps_of_deepseek_v3(1, contended=contended)
    careful = des.run(graph)
    if contended:
        assert careful.step_s[0] > maxplus.run(graph).step_s[0] * 1.01  # else it measures nothing
    gate(benchmark, f"des, one step, contended={contended}", lambda: des.run(graph), budget_s)


def test_timeline_of_a_million_slices(benchmark, tmp_path):
    graph = steps_of_deepseek_v3(1, contended=False, layers=2841)
    times = maxplus.run(graph, timeline=True)
    path = tmp_path / "timeline.json.gz"
    assert write_timeline(path, graph, times) == 1_000_032
    marked = critical_path(graph, times)
    work = partial(write_timeline, path, graph, times, critical=marked)
    gate(benchmark, "timeline, a million slices, its critical path marked", work, 3.0)
    size = path.stat().st_size
    print(f"timeline: {size / 1e6:.1f} MB (budget 10 MB)")
    assert size <= 10e6
