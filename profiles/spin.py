"""A kernel that holds multiprocessors and does nothing, as DeepEP's normal mode holds some while experts run.

Its threads read one word over and over. One program of 1,024 threads sits on each multiprocessor that it holds and
leaves too few registers for a block of a large product. Needs Triton; importing this module imports it.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

WARPS = 32
TRIAL_TURNS = 160_000
EACH = 16  # Triton compiles anew for a number of turns that is no multiple of this


@triton.jit
def _spin(word, turns, out):  # type: ignore[no-untyped-def]
    turn = 0
    seen = tl.load(word)
    while turn < turns:
        seen += tl.load(word, volatile=True)
        turn += 1
    tl.store(out + tl.program_id(0), seen)


class Spinner:
    """Holds `multiprocessors` of torch's current device on a stream of its own."""

    def __init__(self, torch: Any, multiprocessors: int) -> None:
        self.torch = torch
        self._count = multiprocessors
        self._stream = torch.cuda.Stream()
        self._word = torch.zeros(1, dtype=torch.int32, device="cuda")
        self._out = torch.zeros(multiprocessors, dtype=torch.int32, device="cuda")
        self._launch(EACH)
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(self._stream)
        self._launch(TRIAL_TURNS)
        end.record(self._stream)
        end.synchronize()
        self._turn_s = begin.elapsed_time(end) * 1e-3 / TRIAL_TURNS

    def hold(self, seconds: float) -> None:
        """Begin to hold them, for about so long."""
        self._launch(max(1, round(seconds / self._turn_s / EACH)) * EACH)

    def _launch(self, turns: int) -> None:
        with self.torch.cuda.stream(self._stream):
            _spin[(self._count,)](self._word, turns, self._out, num_warps=WARPS)

    def done(self) -> bool:
        """Whether they are free again."""
        return bool(self._stream.query())
