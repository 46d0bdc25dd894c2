"""The same function over many tasks on several processes, each with one thread; results in the order of the tasks."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TypeVar

from moesim.errors import MoesimError

Task = TypeVar("Task")
Result = TypeVar("Result")
THREADS = ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS")


def in_workers(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    workers: int,
    progress: Callable[[float], None] | None = None,
) -> list[Result]:
    """`function` of each task, on up to `workers` spawned processes (in this one where that is 1).

    function: of a module, so that a process finds it by name; tasks and results are pickled. progress is told the share
    of tasks done. Raises what the function raises, and MoesimError where a process dies.
    """
    found: dict[int, Result] = {}

    def done(index: int, result: Result) -> None:
        found[index] = result
        if progress is not None:
            progress(len(found) / len(tasks))

    if min(workers, len(tasks)) <= 1:
        for index, task in enumerate(tasks):
            done(index, function(task))
        return [found[index] for index in range(len(tasks))]
    for name in THREADS:
        os.environ.setdefault(name, "1")
    with ProcessPoolExecutor(min(workers, len(tasks)), mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(function, task): index for index, task in enumerate(tasks)}
        try:
            for future in as_completed(waiting):
                done(waiting[future], future.result())
        except BrokenProcessPool:
            raise MoesimError("a worker process died", mend="run again with fewer --workers") from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [found[index] for index in range(len(tasks))]
