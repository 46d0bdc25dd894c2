"""The two figures of a machine that no lab file tells, measured on a fabric that is never judged.

- `message_s`: what one message, at both ends (posting it, waking up, the kernel), takes of the whole machine, whose
  processors serve all ranks;
- `copy_bytes_per_s`: bytes that all ranks together pass on over loopback, copies into messages included.

The rate of the wire is not measured but a formula; how well the formula holds on a second fabric is on record.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import BadInput, CheckFailed
from moesim.files import read_text
from validate.fabric.rank import Case
from validate.fabric.spec import WHERE, LabSpec

KIND = "validate-fabric-calibration"
SMALL, LARGE = 30_000, 2_000_000  # bytes of a rank
REPEATS = 20
# Three nodes at a rate of their own, and one node alone: shapes that no lab that ships has.
FAR = LabSpec(
    name="calibrate-far", nodes=3, ranks_per_node=2, nics_per_node=2, nic_bits_per_s=330e6, patterns=("even",),
    bytes_per_rank=LARGE, repeats=REPEATS,
)  # fmt: skip
NEAR = LabSpec(
    name="calibrate-near", nodes=1, ranks_per_node=6, nic_bits_per_s=330e6, patterns=("even",), bytes_per_rank=LARGE,
    repeats=REPEATS,
)  # fmt: skip


@dataclass(frozen=True)
class Figures:
    """What was measured; wire: measured over predicted bytes/s of the formula, a check that enters nothing."""

    message_s: float
    copy_bytes_per_s: float
    wire: float


def measure(*, stall_s: float, say: Callable[[str], None]) -> tuple[Figures, dict[str, Any]]:
    """Measure on both fabrics; returns the figures and what stands behind them. Raises as `run_cell` does."""
    from validate.fabric.run import named, run_cell

    sizes = (SMALL, LARGE)
    medians = {}
    for lab, scheme in ((FAR, "flat"), (NEAR, "two_level")):
        say(f"calibrating on {lab.name}")
        cases = [Case(("even",), scheme, size) for size in sizes]
        found = run_cell(lab, cases, stall_s=stall_s, say=named(lab.name, say))
        medians[lab.name] = np.median(np.asarray(found["seconds"])[:, 0], axis=-1)
    return figures_of(medians), {name: values.tolist() for name, values in medians.items()}


def figures_of(medians: dict[str, Any]) -> Figures:
    """Figures from median seconds [small, large] of both fabrics. Raises CheckFailed if more bytes took no longer."""
    from validate.fabric.predict import payload

    far, near = medians[FAR.name], medians[NEAR.name]
    if near[1] <= near[0] or far[1] <= far[0]:
        raise CheckFailed(
            "the calibration took no longer for more bytes", where=WHERE, mend="free the machine, run again"
        )
    copied = [_away(NEAR, size) * NEAR.ranks for size in (SMALL, LARGE)]
    copy = float((copied[1] - copied[0]) / (near[1] - near[0]))
    messages = NEAR.ranks * (NEAR.ranks - 1)
    rate = payload(FAR.nic_bits_per_s, FAR.mtu_bytes)
    wire = [_away(FAR, size) / rate for size in (SMALL, LARGE)]
    return Figures(
        message_s=max(float(near[0] - copied[0] / copy), 0.0) / messages,
        copy_bytes_per_s=copy,
        wire=float((wire[1] - wire[0]) / (far[1] - far[0])),
    )


def _away(lab: LabSpec, size: int) -> float:
    """Bytes that a rank sends to other nodes, or to the others of its node where there is one node, when even."""
    rows = size // lab.row_bytes
    mine = rows // lab.ranks + int(rows % lab.ranks > 0)
    return float(rows - mine * (lab.ranks_per_node if lab.nodes > 1 else 1)) * lab.row_bytes


def to_json(figures: Figures, behind: dict[str, Any], when: str) -> dict[str, Any]:
    """What `calibration.json` holds."""
    return {
        "schema_version": 1, "kind": KIND, "written": when, "figures": asdict(figures), "median_s": behind,
        "sizes": [SMALL, LARGE],
        "fabrics": [lab.model_dump(mode="json") for lab in (FAR, NEAR)],
    }  # fmt: skip


def read(path: Path) -> Figures:
    """The figures of a `calibration.json`. Raises BadInput."""
    try:
        found = json.loads(read_text(path, what="calibration"))
        if found["kind"] != KIND:
            raise KeyError("kind")
        figures = Figures(**{name: float(value) for name, value in found["figures"].items()})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadInput(
            "this is no calibration of the fabric lab", where=str(path), mend="give a calibration.json"
        ) from None
    values = [figures.message_s, figures.copy_bytes_per_s, figures.wire]
    if not np.isfinite(values).all() or figures.copy_bytes_per_s <= 0 or min(values) < 0:
        raise BadInput("a figure is negative or not finite", where=str(path), mend="measure again")
    return figures


def same_fabric(lab: LabSpec) -> bool:
    """Whether a lab is one of the two fabrics that calibrate."""
    shape = ("nodes", "ranks_per_node", "nics_per_node", "nic_bits_per_s", "delay_s", "spine_bits_per_s", "slow_nics")
    return any(all(getattr(lab, name) == getattr(one, name) for name in shape) for one in (FAR, NEAR))
