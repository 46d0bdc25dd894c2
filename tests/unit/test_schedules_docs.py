"""The pictures of the page on schedules are what the executors give for the durations that it names."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moesim.engine import maxplus
from moesim.graph.layer import build_step
from moesim.graph.priced_step import Part, PricedStep
from moesim.graph.schedules import forward_backward
from moesim.graph.storage import PCIE_FRACTION, ExpertStorage
from moesim.graph.task import Stream, Task, TaskGraph
from tests.priced_steps import by_hand, part, setup

LETTERS = {
    "projections": "A", "attention": "A", "gate": "G", "shared expert": "S", "shared expert up": "S",
    "shared expert down": "S", "dispatch": "D", "experts": "E", "combine": "C", "expert fetch": "F",
    "kernel launches": "L",
}  # fmt: skip
LANES = {"compute ": Stream.COMPUTE, "exchange": Stream.COMMUNICATION, "copy    ": Stream.COPY}


def picture(graph: TaskGraph, second: int) -> str:
    """One line for each stream in use, `second` characters a second; the second of two batches in small letters."""
    times = maxplus.run(graph, timeline=True)
    assert times.start_s is not None and times.end_s is not None
    lines = []
    for lane, stream in LANES.items():
        marks = ["."] * round(float(times.step_s[0]) * second)
        for index, task in enumerate(graph.tasks):
            half, _, name = task.name.rpartition(":")
            if task.stream == stream and name in LETTERS:
                letter = LETTERS[name].lower() if half == "b" else LETTERS[name]
                first, last = (round(float(found[index, 0, 0]) * second) for found in (times.start_s, times.end_s))
                marks[first:last] = letter * (last - first)
        if set(marks) != {"."}:
            lines.append(f"{lane}  {''.join(marks)}\n")
    return "".join(lines)


def halved(step: PricedStep) -> PricedStep:
    """All durations halved: one of two equal micro-batches."""

    def half(found: Part) -> Part:
        return Part(tuple(replace(one, seconds=one.seconds / 2) for one in found.estimates))

    return replace(step, **{name: half(found) for name, found in vars(step).items() if isinstance(found, Part)})


def layer(schedule: str, layers: int = 1, storage: str = "", fetch: float = 0.0, eager: float = 0.0) -> TaskGraph:
    stored = ExpertStorage(storage, 1.0, 1.0 / PCIE_FRACTION) if storage else None
    step = by_hand(fetch=part(fetch), **({"eager": part(eager)} if eager else {}))
    one = setup(layers, {"schedule": schedule}, storage=stored)
    if schedule == "two_batch":
        return build_step(one, [halved(step), halved(step)])
    if schedule == "pipeline":
        cut = halved(step)
        step = replace(step, dispatch=cut.dispatch, experts=cut.experts, combine=cut.combine, chunks=2)
    return build_step(one, [step])


def passes() -> TaskGraph:
    """A layer's forward pass beside another's backward pass, twice as long in its computations."""

    def chain(*work: tuple[str, float]) -> list[Task]:
        return [
            Task(
                name, name, Stream.COMMUNICATION if name in ("dispatch", "combine") else Stream.COMPUTE,
                np.array([[seconds]]), (index - 1,) if index else (),
            )
            for index, (name, seconds) in enumerate(work)
        ]  # fmt: skip

    forward = chain(("attention", 3), ("dispatch", 2), ("experts", 3), ("combine", 2))
    backward = chain(("combine", 2), ("experts", 6), ("dispatch", 2), ("attention", 6))
    return forward_backward(forward, backward, 1, 1)


def pictures() -> dict[str, str]:
    """Picture by the heading of its section."""
    return {
        "sequential": picture(layer("sequential"), 2),
        "two_batch": picture(layer("two_batch"), 2),
        "pipeline": picture(layer("pipeline"), 2),
        "shared_overlap": picture(layer("shared_overlap"), 2),
        "shortcut": picture(layer("shortcut"), 2),
        "forward_backward": picture(passes(), 2),
        "whole_graph": picture(layer("sequential", eager=2.0), 2) + "\n" + picture(layer("whole_graph"), 2),
        "offload": picture(layer("sequential", 3, "offload", fetch=22.0), 1),
        "pregated": picture(layer("sequential", 3, "pregated", fetch=12.0), 1),
        "cached": picture(layer("sequential", 3, "cached", fetch=9.0), 1),
    }


@pytest.mark.parametrize("name", sorted(pictures()))
def test_the_page_draws_what_runs(repo: Path, name: str) -> None:
    page = (repo / "docs" / "explanation" / "schedules.md").read_text(encoding="utf-8")
    section = page.split(f"\n### `{name}`")[1].split("\n#")[0]
    (drawn,) = re.findall(r"```text\n(.*?)```", section, flags=re.DOTALL)
    assert drawn == pictures()[name]
