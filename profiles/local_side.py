"""The local side of a dispatch: quantise, pack, choose replicas, count; as work that torch can run, with its checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from profiles.sweep import BLOCK, Point
from profiles.torch_kernels import Case

E4M3_LARGEST, E4M3_FRACTION_BITS, E4M3_LEAST_EXPONENT = 448.0, 3, -6  # OCP 8-bit floating point, E4M3
FAMILIES = ("quantise", "pack", "replica_choice", "histogram")
FAVOURED = 0.6  # exponent of the Zipf law by which tokens choose experts: some counters are hit more often


class LocalSide:
    """Makes the cases of one point from a seed."""

    def __init__(self, torch: Any, device: str, point: Point) -> None:
        self.torch = torch
        self.device = device
        self.key = {name: value for name, value in point.key.items() if isinstance(value, int)}
        self.tokens = int(point.size["tokens"])
        self._rng = np.random.default_rng(0)

    def case(self, family: str) -> Case:
        """The work of a family."""
        made: dict[str, Callable[[], Case]] = {
            "quantise": self._quantise, "pack": self._pack, "replica_choice": self._choice,
            "histogram": self._histogram,
        }  # fmt: skip
        return made[family]()

    def _tensor(self, values: Any) -> Any:
        return self.torch.as_tensor(values, device=self.device)

    def _ids(self) -> Any:
        """Experts that the tokens chose [tokens, top_k]; a token may choose one twice, which costs the same."""
        weights = np.arange(1, self.key["experts"] + 1, dtype=np.float64) ** -FAVOURED
        size = (self.tokens, self.key["top_k"])
        return self._rng.choice(self.key["experts"], size=size, p=weights / weights.sum())

    def _quantise(self) -> Case:
        """bf16 to float8 e4m3, one float32 scale for BLOCK values, as DeepSeek-V3 sends its tokens."""
        torch = self.torch
        values = self._rng.standard_normal((self.tokens, self.key["hidden"]), dtype=np.float32)
        x = self._tensor(values).to(torch.bfloat16)

        def run() -> tuple[Any, Any]:
            parts = x.view(self.tokens, -1, BLOCK).float()
            scale = parts.abs().amax(dim=-1, keepdim=True).clamp_min(1e-30) / E4M3_LARGEST
            return (parts / scale).to(torch.float8_e4m3fn), scale

        def error() -> float:
            done, scale = run()
            exact = x.view(self.tokens, -1, BLOCK).float() / scale
            exponent = exact.abs().clamp_min(2.0**E4M3_LEAST_EXPONENT).log2().floor()
            step = 2.0 ** (exponent - E4M3_FRACTION_BITS)
            return float((done.float() - (exact / step).round() * step).abs().max())

        return Case(run, error)

    def _pack(self) -> Case:
        """Rows and scales into one buffer in order of the destination rank, and how many go to each."""
        torch, ranks, top_k = self.torch, self.key["ranks"], self.key["top_k"]
        rows = self._rng.integers(0, 256, size=(self.tokens, self.key["hidden"]), dtype=np.uint8)
        scales = self._rng.random((self.tokens, self.key["hidden"] // BLOCK), dtype=np.float32)
        goes = self._rng.integers(0, ranks, size=self.tokens * top_k)
        x, scale, destination = self._tensor(rows), self._tensor(scales), self._tensor(goes)
        one = torch.ones_like(destination)

        def run() -> tuple[Any, Any, Any]:
            source = destination.argsort(stable=True) // top_k
            counts = torch.zeros(ranks, dtype=torch.int64, device=self.device).scatter_add_(0, destination, one)
            return x.index_select(0, source), scale.index_select(0, source), counts

        def error() -> float:
            source = np.argsort(goes, kind="stable") // top_k
            right = (rows[source], scales[source], np.bincount(goes, minlength=ranks))
            return float(any((a.cpu().numpy() != b).any() for a, b in zip(run(), right, strict=True)))

        return Case(run, error)

    def _choice(self) -> Case:
        """The slot that serves each (token, expert): replicas take turns, token by token."""
        torch, experts = self.torch, self.key["experts"]
        chosen = self._ids()
        count = np.where(np.arange(experts) < self.key["slots"] - experts, 2, 1)
        first = np.cumsum(count) - count
        ids, counts, firsts = self._tensor(chosen), self._tensor(count), self._tensor(first)
        turn = torch.arange(self.tokens, device=self.device)[:, None]

        def run() -> Any:
            return firsts[ids] + turn % counts[ids]

        def error() -> float:
            right = first[chosen] + np.arange(self.tokens)[:, None] % count[chosen]
            return float((run().cpu().numpy() != right).any())

        return Case(run, error)

    def _histogram(self) -> Case:
        """How many tokens each expert gets."""
        torch, experts = self.torch, self.key["experts"]
        chosen = self._ids().reshape(-1)
        ids = self._tensor(chosen)
        one = torch.ones_like(ids)

        def run() -> Any:
            return torch.zeros(experts, dtype=torch.int64, device=self.device).scatter_add_(0, ids, one)

        return Case(run, lambda: float((run().cpu().numpy() != np.bincount(chosen, minlength=experts)).any()))
