"""One point as work that torch can run: random inputs, the kernel, and its check against float32."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from profiles.sweep import LOOP, Point

# Relative error (norm of the difference over the norm of the float32 reference) that rounding explains: about eight
# times the unit round-off of the type, for two or three roundings in a row; float8 e4m3 rounds at 2^-4, once.
TOLERANCE = {"fp32": 1e-4, "bf16": 8 * 2.0**-8, "fp16": 8 * 2.0**-11, "fp8": 2.0**-3}
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
SAMPLE = 32  # rows that the reference computes
CACHE_TOKENS = 65536  # rows of the cache that a KV write scatters into


@dataclass(frozen=True)
class Case:
    """The work of one point. error: relative to float32, or None where there is nothing to compare."""

    run: Callable[[], Any]
    error: Callable[[], float] | None
    graph: bool = True


def dtype_of(point: Point) -> str:
    """The element type of a point."""
    return str(point.key.get("dtype", "fp32"))


def bytes_of(point: Point, *, fused_attention: bool) -> float:
    """About how much memory the point takes, float32 copies for the check included.

    fused_attention: the scores of a prompt are never held whole, as on a GPU.
    """
    key, size = point.key, point.size
    width = BYTES[dtype_of(point)]
    match point.family:
        case "experts" | "grouped_gemm" | "held_sms":
            weights = 3.0 * int(key["local_experts"]) * int(key["hidden"]) * int(key["intermediate"])
            pairs = size["routed"] * (3.0 * int(key["hidden"]) + 4.0 * int(key["intermediate"]))
            rows = _rows_of(point) * int(key["hidden"]) * 2.0 if point.family == "experts" else 0.0
            return 1.5 * width * (weights + pairs + rows) + 12.0 * int(key["hidden"]) * int(key["intermediate"])
        case "gemm":
            n, k, m = int(key["n"]), int(key["k"]), size["m"]
            return 4.0 * (n * k + m * k + m * n) * 2.0
        case "ceiling" | "overlap":  # the products beside are far smaller than the largest of the sweep
            return 3.0 * size.get("bytes", 0.0) + 12.0 * size.get("m", 0.0) ** 2
        case "attention_prefill" | "mla_prefill":
            scores = 0.0 if fused_attention else size["new_tokens"]
            return 4.0 * int(key["heads"]) * size["batch"] * size["new_tokens"] * (1024.0 + scores)
        case "attention_decode":
            return 12.0 * int(key["kv_heads"]) * int(key["head_dim"]) * size["batch"] * size["kv_tokens"]
        case "mla_decode":
            heads = int(key["heads"])
            return size["batch"] * size["kv_tokens"] * (8.0 * int(key["kv_lora_rank"]) + 8.0 * heads)
        case "mla_absorb":
            return 8.0 * int(key["heads"]) * (size["tokens"] + int(key["head_dim"])) * int(key["kv_lora_rank"])
        case _:
            each = int(key.get("hidden", key.get("width", 1))) + int(key.get("experts", 0))
            return 8.0 * size["tokens"] * each * int(key.get("top_k", 1)) + 2.0 * CACHE_TOKENS * each


def _rows_of(point: Point) -> int:
    """Token rows that come to a rank: those of all ranks, as under all-gather dispatch."""
    key = point.key
    share = int(key["local_experts"]) / int(key["experts"])
    most = int(max(point.extra["histogram"]))
    return max(math.ceil(point.size["routed"] / (int(key["top_k"]) * share)), most)


def _weights_of(point: Point) -> tuple[Any, ...]:
    """What the weights of experts depend on."""
    return tuple(point.key.get(name) for name in ("dtype", "hidden", "intermediate", "local_experts"))


class Builder:
    """Makes cases on one device, from a seed: a run repeats exactly (weights are kept between points)."""

    def __init__(self, torch: Any, device: str) -> None:
        self.torch = torch
        self.device = device
        self.types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        if hasattr(torch, "float8_e4m3fn"):
            self.types["fp8"] = torch.float8_e4m3fn
        self._held: tuple[tuple[Any, ...], Any, Any] | None = None

    def case(self, point: Point, *, keep: bool = False) -> Case:
        """The work of a point. keep: the experts' weights stay, as another case still uses them."""
        if not keep:
            self.forget_unless(point)
        self._maker = self.torch.Generator(device=self.device).manual_seed(0)
        self._rng = np.random.default_rng(0)
        make: dict[str, Callable[[Point], Case]] = {
            "ceiling": self._ceiling, "gemm": self._gemm, "experts": self._experts, "grouped_gemm": self._products,
            "attention_prefill": self._attention, "attention_decode": self._attention, "mla_prefill": self._attention,
            "mla_decode": self._absorbed, "mla_absorb": self._absorb, "gate": self._gate, "permute": self._permute,
            "unpermute": self._unpermute, "norm": self._norm, "kv_write": self._kv_write,
        }  # fmt: skip
        return make[point.family](point)

    def _random(self, *shape: int, dtype: str, scale: float = 1.0) -> Any:
        made = self.torch.randn(*shape, generator=self._maker, device=self.device, dtype=self.types["bf16"])
        made = made.float() if dtype == "fp32" else made
        return (made * scale).to(self.types[dtype]) if dtype != "bf16" else made * scale

    def _distance(self, found: Any, right: Any) -> float:
        found, right = found.float(), right.float()
        return float((found - right).norm() / right.norm().clamp_min(1e-30))

    def _picked(self, count: int) -> Any:
        chosen = np.sort(self._rng.permutation(count)[:SAMPLE])
        return self.torch.as_tensor(chosen, device=self.device)

    # Products.

    def _gemm(self, point: Point) -> Case:
        n, k, m = int(point.key["n"]), int(point.key["k"]), int(point.size["m"])
        return self._product(m, n, k, dtype_of(point))

    def _product(self, m: int, n: int, k: int, dtype: str) -> Case:
        torch = self.torch
        a = self._random(m, k, dtype=dtype)
        b = self._random(n, k, dtype=dtype, scale=1.0 if dtype == "fp8" else k**-0.5)
        rows = self._picked(m)
        one = torch.ones((), device=self.device, dtype=torch.float32)

        def run() -> Any:
            if dtype == "fp8":
                return torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16)
            return torch.mm(a, b.t())

        return Case(run, lambda: self._distance(run()[rows], a.float()[rows] @ b.float().t()))

    def _weights(self, point: Point) -> tuple[Any, Any, str, list[int]]:
        hidden, intermediate = int(point.key["hidden"]), int(point.key["intermediate"])
        counts = [int(count) for count in point.extra["histogram"]]
        dtype = dtype_of(point)
        if self._held is None:
            up = self._random(len(counts), 2 * intermediate, hidden, dtype=dtype, scale=hidden**-0.5)
            down = self._random(len(counts), hidden, intermediate, dtype=dtype, scale=intermediate**-0.5)
            self._held = (_weights_of(point), up, down)
        return self._held[1], self._held[2], dtype, counts

    def forget_unless(self, point: Point) -> None:
        """Drop the experts' weights, which are kept from point to point, unless this point has the same."""
        if self._held is not None and self._held[0] != _weights_of(point):
            self._held = None

    def _swiglu(self, up: Any, down: Any, counts: list[int], kernel: str) -> Callable[[Any], Any]:
        """SwiGLU of rows sorted by expert [pairs, hidden]."""
        torch = self.torch
        silu = torch.nn.functional.silu
        if kernel == LOOP:
            ends = np.cumsum([0, *counts]).tolist()

            def loop(x: Any) -> Any:
                out = torch.empty_like(x)
                for expert, count in enumerate(counts):
                    if count:
                        part = slice(ends[expert], ends[expert + 1])
                        gate, rise = torch.mm(x[part], up[expert].t()).chunk(2, dim=-1)
                        torch.mm(silu(gate) * rise, down[expert].t(), out=out[part])
                return out

            return loop
        offsets = torch.as_tensor(np.cumsum(counts), dtype=torch.int32, device=self.device)

        def grouped(x: Any) -> Any:
            gate, rise = torch._grouped_mm(x, up.transpose(-2, -1), offs=offsets).chunk(2, dim=-1)
            return torch._grouped_mm(silu(gate) * rise, down.transpose(-2, -1), offs=offsets)

        return grouped

    def _reference(self, x: Any, up: Any, down: Any, expert: int) -> Any:
        """One expert of rows [n, hidden] in float32."""
        gate, rise = (x.float() @ up[expert].float().t()).chunk(2, dim=-1)
        return (self.torch.nn.functional.silu(gate) * rise) @ down[expert].float().t()

    def _products(self, point: Point) -> Case:
        up, down, dtype, counts = self._weights(point)
        x = self._random(sum(counts), up.shape[-1], dtype=dtype)
        work = self._swiglu(up, down, counts, point.kernel)
        of_row = np.repeat(np.arange(len(counts)), counts)

        def error() -> float:
            done = work(x)
            rows = self._picked(len(of_row)).tolist()
            right = self.torch.cat([self._reference(x[row : row + 1], up, down, int(of_row[row])) for row in rows])
            return self._distance(done[rows], right)

        return Case(lambda: work(x), error)

    def _experts(self, point: Point) -> Case:
        """All a rank does between dispatch and combine: gather the rows by expert, SwiGLU, sum by weight."""
        torch = self.torch
        up, down, dtype, counts = self._weights(point)
        rows = _rows_of(point)
        x = self._random(rows, up.shape[-1], dtype=dtype)
        tokens = np.concatenate([self._rng.permutation(rows)[:count] for count in counts])
        of_pair = np.repeat(np.arange(len(counts)), counts)
        index = torch.as_tensor(tokens, device=self.device)
        weights = torch.rand(len(tokens), 1, generator=self._maker, device=self.device).to(self.types[dtype])
        work = self._swiglu(up, down, counts, point.kernel)

        def run() -> Any:
            done = work(x.index_select(0, index)) * weights
            return torch.zeros_like(x).index_add_(0, index, done)

        def error() -> float:
            done = run()
            picked = self._rng.permutation(np.unique(tokens))[:SAMPLE]
            right = torch.zeros(len(picked), x.shape[1], device=self.device)
            for at, token in enumerate(picked):
                for pair in np.nonzero(tokens == token)[0]:
                    expert = int(of_pair[pair])
                    right[at] += self._reference(x[token : token + 1], up, down, expert)[0] * weights[pair].float()
            return self._distance(done[picked.tolist()], right)

        return Case(run, error)

    # Attention.

    def _attention(self, point: Point) -> Case:
        """Grouped-query attention, or (expanded) latent attention: causal over a prompt, or one token over a cache."""
        key, dtype, batch = point.key, dtype_of(point), int(point.size["batch"])
        heads = int(key["heads"])
        if point.family == "mla_prefill":
            kv_heads, value = heads, int(key["value_head_dim"])
            width = int(key["qk_nope_head_dim"]) + int(key["qk_rope_head_dim"])
        else:
            kv_heads = int(key["kv_heads"])
            width = value = int(key["head_dim"])
        prompt = "new_tokens" in point.size
        length = int(point.size["new_tokens" if prompt else "kv_tokens"])
        q = self._random(batch, heads, length if prompt else 1, width, dtype=dtype)
        k = self._random(batch, kv_heads, length, width, dtype=dtype)
        v = self._random(batch, kv_heads, length, value, dtype=dtype)
        attend = self.torch.nn.functional.scaled_dot_product_attention
        grouped = kv_heads != heads

        def run() -> Any:
            return attend(q, k, v, is_causal=prompt, enable_gqa=grouped)

        return Case(run, lambda: self._attention_error(run(), q, k, v, prompt))

    def _attention_error(self, done: Any, q: Any, k: Any, v: Any, causal: bool) -> float:
        """Of one sequence and head, for some queries."""
        head = q.shape[1] - 1
        own = head * k.shape[1] // q.shape[1]
        picked = self._picked(q.shape[2])
        scores = q[-1, head].float()[picked] @ k[-1, own].float().t() * q.shape[-1] ** -0.5
        if causal:
            later = self.torch.arange(k.shape[2], device=self.device)[None, :] > picked[:, None]
            scores = scores.masked_fill(later, -math.inf)
        return self._distance(done[-1, head][picked], scores.softmax(dim=-1) @ v[-1, own].float())

    def _absorbed(self, point: Point) -> Case:
        """Latent attention in decode: all heads are queries over one cache of the latent and the rotary part."""
        key, dtype, batch = point.key, dtype_of(point), int(point.size["batch"])
        latent, rotary = int(key["kv_lora_rank"]), int(key["qk_rope_head_dim"])
        scale = (int(key["qk_nope_head_dim"]) + rotary) ** -0.5
        q = self._random(batch, 1, int(key["heads"]), latent + rotary, dtype=dtype, scale=0.5)
        cache = self._random(batch, 1, int(point.size["kv_tokens"]), latent + rotary, dtype=dtype, scale=0.5)
        attend = self.torch.nn.functional.scaled_dot_product_attention

        def run() -> Any:
            return attend(q, cache, cache[..., :latent], scale=scale)

        def error() -> float:
            scores = q[-1, 0].float() @ cache[-1, 0].float().t() * scale
            return self._distance(run()[-1, 0], scores.softmax(dim=-1) @ cache[-1, 0, :, :latent].float())

        return Case(run, error)

    def _absorb(self, point: Point) -> Case:
        key, dtype, tokens = point.key, dtype_of(point), int(point.size["tokens"])
        wide, narrow = int(key["kv_lora_rank"]), int(key["head_dim"])
        inner, outer = (narrow, wide) if key["side"] == "pre" else (wide, narrow)
        x = self._random(int(key["heads"]), tokens, inner, dtype=dtype)
        weights = self._random(int(key["heads"]), inner, outer, dtype=dtype, scale=inner**-0.5)
        bmm = self.torch.bmm
        return Case(
            lambda: bmm(x, weights), lambda: self._distance(bmm(x, weights)[-1], x[-1].float() @ weights[-1].float())
        )

    # Small kernels.

    def _gate(self, point: Point) -> Case:
        """Router product, scores, top-k; sigmoid: the best half of eight groups first (DeepSeek-V3's gate)."""
        torch = self.torch
        key, tokens = point.key, int(point.size["tokens"])
        experts, top_k, hidden = int(key["experts"]), int(key["top_k"]), int(key["hidden"])
        x = self._random(tokens, hidden, dtype=dtype_of(point))
        weights = self._random(experts, hidden, dtype=dtype_of(point), scale=hidden**-0.5)

        def scores(product: Any) -> Any:
            if key["kind"] == "softmax":
                return product.float().softmax(dim=-1)
            value = product.float().sigmoid().view(tokens, 8, -1)
            best = value.topk(2, dim=-1).values.sum(dim=-1).topk(4, dim=-1).indices
            mask = torch.zeros(tokens, 8, device=self.device).scatter_(1, best, 1.0)
            return (value * mask[:, :, None]).view(tokens, experts)

        def run() -> Any:
            return scores(torch.mm(x, weights.t())).topk(top_k, dim=-1).values

        return Case(run, lambda: self._distance(run(), scores(x.float() @ weights.float().t()).topk(top_k).values))

    def _pairs(self, point: Point) -> tuple[Any, Any]:
        tokens, top_k = int(point.size["tokens"]), int(point.key["top_k"])
        index = self._rng.permutation(np.repeat(np.arange(tokens), top_k))
        return self._random(tokens, int(point.key["hidden"]), dtype=dtype_of(point)), self.torch.as_tensor(
            index, device=self.device
        )

    def _permute(self, point: Point) -> Case:
        x, index = self._pairs(point)
        return Case(lambda: x.index_select(0, index), lambda: self._distance(x.index_select(0, index), x[index]))

    def _unpermute(self, point: Point) -> Case:
        x, index = self._pairs(point)
        rows = x.index_select(0, index)
        torch = self.torch

        def run() -> Any:
            return torch.zeros_like(x).index_add_(0, index, rows)

        return Case(run, lambda: self._distance(run(), x.float() * int(point.key["top_k"])))

    def _norm(self, point: Point) -> Case:
        torch = self.torch
        x = self._random(int(point.size["tokens"]), int(point.key["hidden"]), dtype=dtype_of(point))
        weight = self._random(x.shape[1], dtype=dtype_of(point))

        def run() -> Any:
            return torch.nn.functional.rms_norm(x, (x.shape[1],), weight, 1e-6)

        def right() -> Any:
            wide = x.float()
            return wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + 1e-6) * weight.float()

        return Case(run, lambda: self._distance(run(), right()))

    def _kv_write(self, point: Point) -> Case:
        tokens = int(point.size["tokens"])
        rows = self._random(tokens, int(point.key["width"]), dtype=dtype_of(point))
        cache = self.torch.zeros(max(CACHE_TOKENS, tokens), rows.shape[1], dtype=rows.dtype, device=self.device)
        slots = self.torch.as_tensor(self._rng.permutation(len(cache))[:tokens], device=self.device)

        def run() -> Any:
            return cache.index_copy_(0, slots, rows)

        return Case(run, lambda: self._distance(run()[slots], rows))

    # Ceilings.

    def _ceiling(self, point: Point) -> Case:
        name = str(point.key["name"])
        torch = self.torch
        if name == "product":
            side = int(point.size["m"])
            return self._product(side, side, side, dtype_of(point))
        if name.startswith("launch"):
            one = torch.ones(1, device=self.device)
            return Case(lambda: one.add_(0.0), None, graph=name == "launch_graph")
        # Random bytes, not zeros: some devices compress zeros on the way.
        count = int(point.size["bytes"])
        here = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=self._maker, device=self.device)
        if name == "copy":
            there = torch.empty_like(here)
            return Case(lambda: there.copy_(here), lambda: float((there.copy_(here) != here).any()))
        host = torch.empty(count, dtype=torch.uint8, pin_memory=name.endswith("pinned"))
        host.copy_(here)
        source, target = (host, here) if name.startswith("host_to") else (here, host)
        return Case(lambda: target.copy_(source, non_blocking=name.endswith("pinned")), None, graph=False)
