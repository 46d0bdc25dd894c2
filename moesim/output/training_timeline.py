"""The timeline of a training step: pipeline stages as processes, their passes as slices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moesim.engine.training import TrainingRun
from moesim.graph.pipeline import Pass
from moesim.output.timeline import Slice, write_tracks


def write_pipeline_timeline(path: Path, run: TrainingRun) -> int:
    """Write the passes of the first instance, then gradients, optimizer and parameters; the number of slices.

    What an overlapped reduction or gathering hides does not show.
    """
    return write_tracks(path, _slices(run))


def _slices(run: TrainingRun) -> Iterator[Slice]:
    program, step = run.model.program, run.step
    times = step.pipeline
    for one, (kind, micro, chunk, stage) in enumerate(
        zip(program.kind, program.micro, program.chunk, program.stage, strict=True)
    ):
        name = f"{Pass(kind).name.lower()} {micro}" + (f", chunk {chunk}" if program.chunks > program.stages else "")
        yield f"stage {stage}", "passes", name, float(times.start_s[0, one]), float(times.duration_s[0, one])
    after = times.end_s.max(axis=0)
    met_s = float((after + step.reduce_s).max())
    for stage in range(program.stages):
        parts = (
            ("gradient reduction", float(after[stage]), float(step.reduce_s[stage])),
            ("optimizer", met_s, float(step.optimizer_s[stage])),
            ("parameter gather", met_s + float(step.optimizer_s[stage]), float(step.gather_s[stage])),
        )
        for name, start_s, duration_s in parts:
            if duration_s > 0:
                yield f"stage {stage}", "passes", name, start_s, duration_s
