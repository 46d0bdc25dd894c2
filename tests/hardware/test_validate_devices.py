"""What a rank on a GPU does, without one: no operation mixes devices, no collective gets tensors of the host."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed: pip install '.[hardware]'")

import torch

from moesim.errors import CheckFailed
from tests.elsewhere import DEVICE, ranks_elsewhere
from validate.hardware import probe as layer_probe
from validate.hardware import rig, sampling
from validate.hardware.group import Beat, Group
from validate.hardware.job import Job, LayerShape, PlacedCase
from validate.hardware.layer import forward
from validate.training import probe
from validate.training.job import LAYOUTS, Layout, Shape, TrainingJob
from validate.training.rank import contiguous, phase
from validate.training.step import Stepper
from validate.training.ways import Made

pytestmark = pytest.mark.hardware
SHAPE = Shape(layers=4, hidden=32, heads=4, kv_heads=2, head_dim=8, dense_intermediate=48, experts=12, intermediate=16,
              vocabulary=48)  # fmt: skip
LAYOUT = {one.name: one for one in LAYOUTS} | {"of eight": Layout(name="of eight", tp=2, dp=2, pp=2)}


def job_of(*layouts: Layout) -> TrainingJob:
    return TrainingJob(
        shape=SHAPE, layouts=layouts, sequence_length=8, global_batch=4, repeats=2, warmup=0, samples=1, sample_s=1e-6
    )


def test_operations_that_mix_devices_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    with ranks_elsewhere(2, monkeypatch):
        far, near = torch.ones(3, device=DEVICE), torch.ones(3)
        assert (far + 1).device == DEVICE
        assert (far.cpu() + near).tolist() == [2.0] * 3
        with pytest.raises(AssertionError, match="mixes"):
            far + near
        with pytest.raises(AssertionError, match="mixes"):
            far[torch.tensor([0])]
        with pytest.raises(AssertionError, match="of the host"):
            torch.distributed.all_reduce(near)
        torch.distributed.all_reduce(far)


@pytest.mark.parametrize("name", ["TP2 DP2 EP4", "PP2, interleaved", "two of DP2 EP2", "of eight"])
def test_a_step_stays_on_its_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = LAYOUT[name]
    if layout.virtual_stages > 1:
        layout = layout.model_copy(update={"virtual_stages": 2})
    job = job_of(layout)
    with ranks_elsewhere(layout.ranks, monkeypatch):
        stepper = Stepper(job, layout, Made(0, Beat(None), DEVICE, layout.ranks), contiguous(job))
        found = stepper.run()
        assert len(found.passes) == len(stepper.mine)
        gradients = stepper.gradients()
    assert {one.device for one in gradients.values()} == {DEVICE}
    kinds = {key: one.kind for key, one in stepper.weights.slices.items()}
    assert [key for key, one in gradients.items() if kinds[key] != "experts" and not one.inner.any()] == []


def test_what_is_profiled_and_checked_stays_on_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """With made exchanges the gradients are none that one process has: the check must find them wrong."""
    monkeypatch.setitem(probe.TURNING_BYTES, DEVICE.type, 1e6)
    layout = LAYOUT["TP2 PP2 EP2"]
    job = job_of(layout)
    names = ("norm", "silu", "rope", "top-k", "permute", "embedding", "cross entropy", "gradient accumulation",
             "optimizer")  # fmt: skip
    asked = [
        probe.Asked("gemm", (16, 32), 8.0),
        probe.Asked("experts", (32, 16), 3.0),
        probe.Asked("attention", (8, 0, 4, 2, 8, 0), 1.0),
        *(probe.Asked("memory_bound", (name,), 4096.0) for name in names),
        *(
            probe.Asked("collective", (kind, 2), 4096.0, nodes)
            for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
            for nodes in (1, 2)
        ),
        *(probe.Asked("send", (), size, nodes) for size in (64.0, 4096.0) for nodes in (1, 2)),
    ]
    with ranks_elsewhere(4, monkeypatch):
        made, hosts = Made(0, Beat(None), DEVICE, 4), (0, 0, 1, 1)
        listed = [{"family": one.family, "key": one.key, "size": one.size, "nodes": one.nodes} for one in asked]
        found = phase({"phase": "profile", "ranks": 4, "asked": listed}, job, made, hosts)
        assert len(found["samples"]) == len(asked) and found["alone_s"] > 0
        counts = phase({"phase": "route", "ranks": 1}, job, made, hosts)
        assert np.asarray(counts).sum() == 4 * 8 * 2 * 3
        slots = {layout.name: contiguous(job).tolist()}
        with pytest.raises(CheckFailed, match="gradients differ"):
            phase({"phase": "steps", "ranks": 4, "slots": slots}, job, made, hosts)


@pytest.mark.parametrize("kernel", ["loop", "grouped"])
def test_a_layer_stays_on_its_device(kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rig.FLUSH_BYTES, DEVICE.type, 4096)
    for name, turns in (("WARMUP", 0), ("MOST_REPEATS", 1)):
        monkeypatch.setattr(sampling, name, turns)
    job = Job(
        backend="gloo", ranks=2, shape=LayerShape(hidden=16, intermediate=24, experts=4, top_k=2), tokens=(5,),
        profile=(0.4, 0.3, 0.2, 0.1), profile_source="test", kernel=kernel, repeats=4, out=str(tmp_path),  # type: ignore[arg-type]
        placements=(PlacedCase(name="wide", slots=(0, 1, 2, 3, 0, 1), replicas=2),),
    )  # fmt: skip
    with ranks_elsewhere(2, monkeypatch), torch.no_grad():
        group = Group(0, 2, DEVICE, Beat(None))
        made = rig.build(job, group)
        counts = rig.routed_counts(made)
        assert counts[0].sum() == 2 * 5 * 2
        assert layer_probe.measure(made, counts).points
        y, _ = forward(made.tokens[5], made.layers[0], group, lambda: None)
        assert y.device == DEVICE
        with pytest.raises(CheckFailed, match="rank 0, placement wide"):
            rig.check_outputs(made, {5: [y]})
