"""Timing kernels on this machine: grouped SwiGLU experts through torch, appended as JSON lines, resumable."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import BadInput, MissingPart

WARM_UPS = 2


@dataclass(frozen=True)
class Sweep:
    """What to time: one rank's experts [slots], each with the same number of tokens, at each of `tokens`."""

    device: str
    hidden: int
    intermediate: int
    slots: int
    tokens: tuple[int, ...]
    repeats: int

    def points(self) -> list[dict[str, Any]]:
        """The key of every point."""
        return [
            {
                "family": "experts",
                "device": self.device,
                "dtype": "fp32" if self.device == "cpu" else "bf16",
                "hidden": self.hidden,
                "intermediate": self.intermediate,
                "slots": self.slots,
                "tokens_per_expert": count,
            }
            for count in self.tokens
        ]


def measure(sweep: Sweep, out: Path, *, say: Callable[[str], None] = lambda line: None) -> tuple[int, int]:
    """Time the points that `out` does not hold yet and append each, synced; returns (measured, kept).

    A last line that was cut off by a crash is dropped. Raises MissingPart without torch or the device, BadInput when
    the file cannot be read or written.
    """
    torch = _torch(sweep.device)
    kept = _kept(out)
    have = {json.dumps(row["key"], sort_keys=True) for row in kept}
    todo = [key for key in sweep.points() if json.dumps(key, sort_keys=True) not in have]
    for key in todo:
        seconds = _time(torch, sweep, int(key["tokens_per_expert"]))
        low, middle, high = (float(value) for value in np.quantile(seconds, (0.1, 0.5, 0.9)))
        row = {
            "key": key,
            "latency_s": middle,
            "p10_s": low,
            "p90_s": high,
            "repeats": sweep.repeats,
            "torch": str(torch.__version__),
        }
        _append(out, row)
        say(f"{key['tokens_per_expert']} tokens an expert: {middle * 1e6:.1f} us ({low * 1e6:.1f} to {high * 1e6:.1f})")
    return len(todo), len(kept)


def _torch(device: str) -> Any:
    try:
        import torch
    except ImportError:
        raise MissingPart("torch is not installed", where="--device", mend="pip install 'moesim[hardware]'") from None
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise BadInput(f"unknown device {device!r}", where="--device", mend="use cpu, cuda or cuda:N") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise MissingPart("no CUDA device is visible", where="--device", mend="run on a GPU, or use --device cpu")
    return torch


def _time(torch: Any, sweep: Sweep, tokens: int) -> list[float]:
    """Seconds of each repeat; on a GPU with device events around the kernels."""
    dtype = torch.float32 if sweep.device == "cpu" else torch.bfloat16
    maker = torch.Generator(device=sweep.device).manual_seed(0)

    def tensor(*shape: int) -> Any:
        return torch.randn(*shape, generator=maker, device=sweep.device, dtype=dtype)

    gate_up = tensor(sweep.slots, sweep.hidden, 2 * sweep.intermediate)
    down = tensor(sweep.slots, sweep.intermediate, sweep.hidden)
    x = tensor(sweep.slots, tokens, sweep.hidden)

    def run() -> Any:
        gate, up = torch.bmm(x, gate_up).chunk(2, dim=-1)
        return torch.bmm(torch.nn.functional.silu(gate) * up, down)

    found = []
    with torch.inference_mode():
        for _ in range(WARM_UPS):
            run()
        for _ in range(sweep.repeats):
            if sweep.device == "cpu":
                start = time.perf_counter()
                run()
                found.append(time.perf_counter() - start)
            else:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                run()
                end.record()
                end.synchronize()
                found.append(begin.elapsed_time(end) * 1e-3)
    return found


def _kept(out: Path) -> list[dict[str, Any]]:
    """Rows that are there already; a cut-off last line is removed from the file."""
    if not out.exists():
        return []
    try:
        text = out.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise BadInput("cannot read what is there", where=str(out), mend="choose another file with --out") from None
    whole, _, rest = text.rpartition("\n")
    if rest:
        os.truncate(out, len(f"{whole}\n".encode()) if whole else 0)
    rows = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            row = json.loads(line)
            rows.append({"key": dict(row["key"]), "latency_s": float(row["latency_s"])})
        except (ValueError, KeyError, TypeError):
            raise BadInput(
                "this line is no measurement", where=f"{out}:{number}", mend="choose another file with --out"
            ) from None
    return rows


def _append(out: Path, row: dict[str, Any]) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(row, sort_keys=True, allow_nan=False) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as error:
        raise BadInput(f"cannot write here ({error.strerror})", where=str(out), mend="choose another file") from None
