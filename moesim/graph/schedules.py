"""Schedules: from the task lists of micro-batches to one graph, whose order decides what overlaps with what.

`sequential` runs one list as it is. `two_batch` is two-batch overlap: while one micro-batch communicates the other
computes. Its order follows what SGLang publishes (LMSYS blog, "Deploying DeepSeek with PD Disaggregation and
Large-scale Expert Parallelism on 96 H100 GPUs", May 2025; `python/sglang/srt/batch_overlap/` in sgl-project/sglang):
the operations of a layer are cut into stages, and the stages of the two halves alternate, the second half `delay`
stages behind. SGLang cuts prefill where dispatch and combine have been launched and uses no delay; it cuts decode finer
(five or six stages a layer) with a delay of two. Here a stage ends with its communication, so no delay gives prefill's
order.

`forward_backward` alternates the stages of one micro-batch's forward pass with those of another's backward pass, as
DualPipe does (DeepSeek-V3 technical report, arXiv:2412.19437, section 3.2.1) and Megatron-Core's
`overlap_moe_expert_parallel_comm` under 1F1B.

The schedules that rearrange a layer itself are in `moesim.graph.moe_layer`; docs/explanation/schedules.md draws all.
"""

from __future__ import annotations

from collections.abc import Sequence

from moesim.errors import BadInput
from moesim.graph.task import Stream, Task, TaskGraph


def sequential(tasks: Sequence[Task], steps: int, ranks: int) -> TaskGraph:
    """One micro-batch, its tasks in the order given. Raises BadInput where a task depends on a later one."""
    return TaskGraph(steps=steps, ranks=ranks, tasks=tuple(tasks))


def two_batch(a: Sequence[Task], b: Sequence[Task], steps: int, ranks: int, *, delay: int = 0) -> TaskGraph:
    """Two micro-batches whose stages alternate, `b` starting `delay` stages after `a`.

    The order is a[0] ... a[delay], b[0], a[delay + 1], b[1], and so on; what is left of the longer list follows.
    Streams are shared: each runs the tasks of both in this order. `depends_on` of each list counts within that list
    and is re-based here; names get a prefix "a:" or "b:". Raises BadInput for a negative delay, and where a task
    depends on a later one of its list.
    """
    if delay < 0:
        raise BadInput(f"a delay of {delay} stages", mend="give 0 or more")
    return _alternate({"a": a, "b": b}, steps, ranks, delay)


def forward_backward(forward: Sequence[Task], backward: Sequence[Task], steps: int, ranks: int) -> TaskGraph:
    """The forward pass of one micro-batch beside the backward pass of another, stage by stage, backward first.

    A backward pass begins with a transfer (of the combine's gradients), beside which the forward pass computes, and so
    on in turn. The two lists share nothing but the streams; weight-gradient products may stand in `backward` wherever
    they are to fill a gap. Names get a prefix "f:" or "b:". Raises BadInput where a task depends on a later one of its
    list.
    """
    return _alternate({"b": backward, "f": forward}, steps, ranks, 0)


def _alternate(lists: dict[str, Sequence[Task]], steps: int, ranks: int, delay: int) -> TaskGraph:
    """The stages of two lists in turn, the second list's `delay` stages behind."""
    (first, a), (second, b) = lists.items()
    stages_a, stages_b = stages(a), stages(b)
    order: list[tuple[str, int]] = []
    for turn in range(max(len(stages_a), len(stages_b) + delay)):
        if turn < len(stages_a):
            order.extend((first, index) for index in stages_a[turn])
        if 0 <= turn - delay < len(stages_b):
            order.extend((second, index) for index in stages_b[turn - delay])
    place = {which: position for position, which in enumerate(order)}
    tasks = []
    for half, index in order:
        task = lists[half][index]
        if any(not 0 <= other < index for other in task.depends_on):
            raise BadInput(f"task {task.name} depends on a task that does not come before it", mend="order the tasks")
        depends_on = tuple(place[half, other] for other in task.depends_on)
        name, links, layer = f"{half}:{task.name}", task.links, task.layer
        tasks.append(Task(name, task.operation, task.stream, task.duration_s, depends_on, task.groups, links, layer))
    return TaskGraph(steps=steps, ranks=ranks, tasks=tuple(tasks))


def stages(tasks: Sequence[Task]) -> list[range]:
    """Cut a task list after each run of communication tasks: index ranges that cover the list in order.

    A communication task is one on the communication stream; a collective on the compute stream overlaps with nothing
    of its own batch by the engine's choice, and does not cut.
    """
    found: list[range] = []
    first = 0
    for index, task in enumerate(tasks):
        last_of_run = index + 1 == len(tasks) or tasks[index + 1].stream != Stream.COMMUNICATION
        if task.stream == Stream.COMMUNICATION and last_of_run:
            found.append(range(first, index + 1))
            first = index + 1
    if first < len(tasks):
        found.append(range(first, len(tasks)))
    return found
