"""Which points `moesim profile kernels` measures: the sweep of a GPU, and a smaller one of a CPU."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import BadInput

Ints = NDArray[np.int64]

GROUPED, LOOP, PRODUCT, ATTENTION = "torch._grouped_mm", "torch.mm loop", "torch.mm", "torch sdpa"
UNIFORM = "uniform"


@dataclass(frozen=True)
class Point:
    """One point to measure; `baseline` marks a kernel that is only compared with, `extra` holds the histogram."""

    family: str
    key: dict[str, str | int]
    size: dict[str, float]
    kernel: str
    baseline: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Shape:
    """A model's MoE and attention: widths, experts and top-k, heads (`latent` for MLA)."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    heads: int
    kv_heads: int
    head_dim: int
    latent: bool = False


# From each model's config.json on Hugging Face (moesim/spec/models holds the same figures).
SHAPES = (
    Shape("deepseek-v3", 7168, 2048, 256, 8, 128, 128, 128, latent=True),
    Shape("qwen3-235b", 4096, 1536, 128, 8, 64, 4, 128),
    Shape("qwen3-30b", 2048, 768, 128, 8, 32, 4, 128),
    Shape("mixtral-8x7b", 4096, 14336, 8, 2, 32, 8, 128),
    Shape("gpt-oss-120b", 2880, 2880, 128, 4, 64, 8, 64),
    Shape("olmoe", 2048, 1024, 64, 8, 16, 16, 128),
)
# DeepSeek-V3's latent attention (its config.json): rank of the latent, and the widths of a head.
MLA = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "value_head_dim": 128}
# Values that share a scale where tokens travel as float8 (DeepSeek-V3 technical report, arXiv:2412.19437, 3.3).
BLOCK = 128
EP_RANKS = 8  # that the local side of a dispatch packs for
# A CPU does the same sweep on shapes this many times narrower, with fewer tokens.
CPU_SCALE = 8


@dataclass(frozen=True)
class Reach:
    """How far a sweep goes."""

    shapes: tuple[Shape, ...]
    dtype: str
    local_experts: tuple[int, ...]
    routed: tuple[int, ...]
    skewed_routed: tuple[int, ...]
    histograms: tuple[str, ...]
    rows: tuple[int, ...]
    widths: tuple[int, ...]
    batches: tuple[int, ...]
    lengths: tuple[int, ...]
    most_pairs: int
    ceilings: bool = True
    copy_bytes: int = 2**30
    cube: int = 8192


def powers(low: int, high: int, step: int = 1) -> tuple[int, ...]:
    """Powers of two from `low` to `high`, every `step`-th; `high` itself is always the last."""
    found = [2**e for e in range(0, 54, step) if low <= 2**e <= high]
    return tuple(dict.fromkeys([*found, high]))


GPU = Reach(
    shapes=SHAPES, dtype="bf16", local_experts=(1, 4, 8, 32, 64), routed=powers(1, 16384),
    skewed_routed=powers(1, 16384, 2), histograms=("zipf_0.6", "zipf_1.2", "one_hot"), rows=powers(1, 16384),
    widths=(512, 1024, 2048, 4096, 8192), batches=powers(1, 256, 2), lengths=powers(16, 32768), most_pairs=2**21,
)  # fmt: skip
NARROW = tuple(
    Shape(
        f"{one.name}/{CPU_SCALE}", one.hidden // CPU_SCALE, one.intermediate // CPU_SCALE, one.experts, one.top_k,
        max(1, one.heads // CPU_SCALE), max(1, one.kv_heads // CPU_SCALE), one.head_dim, one.latent,
    )
    for one in SHAPES
)  # fmt: skip
CPU = Reach(
    shapes=NARROW, dtype="bf16", local_experts=(1, 4, 16), routed=powers(1, 1024), skewed_routed=powers(1, 1024, 2),
    histograms=GPU.histograms, rows=powers(1, 1024, 2), widths=(256, 512, 1024), batches=powers(1, 16),
    lengths=powers(16, 1024), most_pairs=2**12, copy_bytes=2**26, cube=1024,
)  # fmt: skip
QUICK = Reach(
    shapes=(NARROW[5],), dtype="bf16", local_experts=(2, 8), routed=powers(1, 128), skewed_routed=(16, 128),
    histograms=GPU.histograms, rows=(1, 16, 128), widths=(128, 256), batches=(1, 4), lengths=(16, 128),
    most_pairs=2**10, copy_bytes=2**24, cube=512,
)  # fmt: skip


def plan(reach: Reach, *, loads: Sequence[tuple[str, int, Ints]] = ()) -> list[Point]:
    """All points of a sweep, ceilings first. loads: real per-rank counts as (name, experts of the model, counts)."""
    found: dict[str, Point] = {}
    for point in _all(reach, loads):
        found.setdefault(json.dumps([point.family, point.key, point.size, point.kernel], sort_keys=True), point)
    return list(found.values())


def _all(reach: Reach, loads: Sequence[tuple[str, int, Ints]]) -> Iterator[Point]:
    if reach.ceilings:
        yield from _ceilings(reach)
    for shape in reach.shapes:
        for local in reach.local_experts:
            if local <= shape.experts:
                yield from _experts(shape, local, reach)
        for name, experts, counts in loads:
            if experts == shape.experts:
                yield from expert_points(shape, counts, name, reach.dtype)
        yield from _small(shape, reach)
        yield from _attention(shape, reach)
        for n, k in ((2 * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)):
            yield from (gemm(m, n, k, reach.dtype) for m in reach.rows)
    for n in reach.widths:
        for k in reach.widths:
            yield from (gemm(m, n, k, reach.dtype) for m in reach.rows)


def _ceilings(reach: Reach) -> Iterator[Point]:
    for name in ("copy", "host_to_device", "host_to_device_pinned", "device_to_host", "device_to_host_pinned"):
        yield Point("ceiling", {"name": name}, {"bytes": float(reach.copy_bytes)}, name)
    for dtype in ("bf16", "fp8"):
        yield Point("ceiling", {"name": "product", "dtype": dtype}, {"m": float(reach.cube)}, PRODUCT)
    for name in ("launch_eager", "launch_graph"):
        yield Point("ceiling", {"name": name}, {"kernels": 1.0}, name)


def gemm(m: int, n: int, k: int, dtype: str) -> Point:
    """One product [m, k] x [k, n]."""
    return Point("gemm", {"dtype": dtype, "n": n, "k": k}, {"m": float(m)}, PRODUCT)


def _experts(shape: Shape, local: int, reach: Reach) -> Iterator[Point]:
    for routed in reach.routed:
        whole, *products = expert_points(shape, histogram(UNIFORM, routed, local), UNIFORM, reach.dtype)
        yield whole
        if routed in reach.skewed_routed:
            yield from products
    if local > 1:
        for name in reach.histograms:
            for routed in reach.skewed_routed:
                yield from expert_points(shape, histogram(name, routed, local), name, reach.dtype)


def expert_points(shape: Shape, counts: Ints, name: str, dtype: str) -> Iterator[Point]:
    """A rank's experts with these tokens [local experts]: whole (gather, experts, weighted sum), and only the products.

    The products are also measured as a loop of dense ones where the load is balanced: the baseline.
    """
    key: dict[str, str | int] = {
        "grouping": "fused", "dtype": dtype, "hidden": shape.hidden, "intermediate": shape.intermediate,
        "experts": shape.experts, "top_k": shape.top_k, "local_experts": len(counts), "distribution": name,
    }  # fmt: skip
    size = {"routed": float(counts.sum())}
    extra = {"histogram": [int(count) for count in counts]}
    yield Point("experts", key, size, GROUPED, extra=extra)
    only = {each: key[each] for each in ("dtype", "hidden", "intermediate", "local_experts", "distribution")}
    yield Point("grouped_gemm", only, size, GROUPED, extra=extra)
    if name == UNIFORM:
        yield Point("grouped_gemm", only, size, LOOP, baseline=True, extra=extra)


def histogram(name: str, routed: int, local: int) -> Ints:
    """`routed` (token, expert) pairs over `local` experts [local], by name, in whole tokens (largest remainder).

    uniform; zipf_S: shares proportional to rank^-S; one_hot: one expert gets half of them, the others share the rest.
    """
    if name == UNIFORM:
        shares = np.ones(local)
    elif name == "one_hot":
        shares = np.r_[1.0, np.full(local - 1, 1.0 / max(local - 1, 1))]
    else:
        shares = np.arange(1, local + 1, dtype=np.float64) ** -float(name.removeprefix("zipf_"))
    return whole(routed * shares / shares.sum(), routed)


def whole(exact: NDArray[np.float64], total: int) -> Ints:
    """Whole numbers near `exact` [n] that sum to `total` (largest remainder)."""
    counts: Ints = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: total - int(counts.sum())]] += 1
    return counts


def _small(shape: Shape, reach: Reach) -> Iterator[Point]:
    """What surrounds the experts: gate and top-k, permute and unpermute, norm, KV-cache write."""
    dtype, hidden, experts, top_k = reach.dtype, shape.hidden, shape.experts, shape.top_k
    gate: dict[str, str | int] = {"dtype": dtype, "hidden": hidden, "experts": experts, "top_k": top_k}
    for rows in reach.rows:
        size = {"tokens": float(rows)}
        yield Point("gate", {**gate, "kind": "softmax"}, size, "torch.topk")
        if experts >= 128:
            yield Point("gate", {**gate, "kind": "sigmoid_groups"}, size, "torch.topk")
        for family in ("permute", "unpermute"):
            yield Point(family, {"dtype": dtype, "hidden": hidden, "top_k": top_k}, size, "torch.index")
        yield Point("norm", {"dtype": dtype, "hidden": hidden}, size, "torch.rms_norm")
        width = MLA["kv_lora_rank"] + MLA["qk_rope_head_dim"] if shape.latent else 2 * shape.kv_heads * shape.head_dim
        yield Point("kv_write", {"dtype": dtype, "width": width}, size, "torch.index_copy")
        yield from _local_side(shape, size)


def _local_side(shape: Shape, size: dict[str, float]) -> Iterator[Point]:
    """What a rank does before a dispatch: count, choose replicas, quantise, pack."""
    routed: dict[str, str | int] = {"experts": shape.experts, "top_k": shape.top_k}
    yield Point("histogram", routed, size, "torch.scatter_add")
    slots = shape.experts + shape.experts // 8
    yield Point("replica_choice", {**routed, "slots": slots}, size, "torch.index")
    if shape.hidden % BLOCK == 0:
        yield Point("quantise", {"hidden": shape.hidden, "block": BLOCK}, size, "torch.to")
        packed: dict[str, str | int] = {"hidden": shape.hidden, "top_k": shape.top_k, "ranks": EP_RANKS}
        yield Point("pack", packed, size, "torch.index_select")


def _attention(shape: Shape, reach: Reach) -> Iterator[Point]:
    for phase in ("prefill", "decode"):
        for batch in reach.batches:
            for length in reach.lengths:
                if batch * length > reach.most_pairs or (
                    phase == "prefill" and batch * length > reach.most_pairs // 16
                ):
                    continue
                key: dict[str, str | int]
                if shape.latent:
                    form = "absorbed" if phase == "decode" else "expanded"
                    key = {"form": form, "dtype": reach.dtype, "kv_dtype": reach.dtype, "heads": shape.heads, **MLA}
                else:
                    key = {
                        "dtype": reach.dtype, "kv_dtype": reach.dtype, "heads": shape.heads,
                        "kv_heads": shape.kv_heads, "head_dim": shape.head_dim, "window": 0,
                    }  # fmt: skip
                size = {"batch": float(batch), "new_tokens" if phase == "prefill" else "kv_tokens": float(length)}
                yield Point(f"{'mla' if shape.latent else 'attention'}_{phase}", key, size, ATTENTION)
    if shape.latent:
        for side in ("pre", "post"):
            for tokens in reach.rows:
                yield absorb(side, shape.heads, tokens, reach.dtype)


def absorb(side: str, heads: int, tokens: int, dtype: str) -> Point:
    """One product of absorbed latent attention."""
    width = MLA["qk_nope_head_dim"] if side == "pre" else MLA["value_head_dim"]
    key: dict[str, str | int] = {
        "side": side, "dtype": dtype, "heads": heads, "kv_lora_rank": MLA["kv_lora_rank"], "head_dim": width,
    }  # fmt: skip
    return Point("mla_absorb", key, {"tokens": float(tokens)}, "torch.bmm")


def real_loads(loads: Path, placement: Path | None, *, ranks: int) -> list[tuple[str, int, Ints]]:
    """Real per-rank counts: the hottest, a middle and the coldest rank of the middle layer, from SGLang's JSON counts.

    placement: a map in the moesim format; without one the experts lie contiguous over `ranks`. Raises BadInput.
    """
    content = _json(loads, "loads")
    try:
        counts = np.asarray(content["logical_count"], dtype=np.float64)
        counts = counts.sum(axis=0) if counts.ndim == 3 else counts
        used = np.nonzero(counts.sum(axis=1) > 0)[0]
        layer = int(used[len(used) // 2])
        if counts.ndim != 2 or not np.isfinite(counts).all() or (counts < 0).any():
            raise ValueError
    except (KeyError, TypeError, ValueError, IndexError):
        raise BadInput("no logical_count [layers, experts]", where=str(loads), mend="give SGLang's JSON") from None
    row = counts[layer]
    experts = len(row)
    slots = np.arange(experts)
    if placement is not None:
        held = _json(placement, "placement")
        try:
            slots = np.asarray(held["physical_to_logical"], dtype=np.int64)[list(held["layer_ids"]).index(layer)]
            ranks = int(held["ranks"])
            share = row / np.bincount(slots, minlength=experts)
        except (KeyError, TypeError, ValueError, IndexError):
            raise BadInput(
                f"no map of layer {layer} for {experts} experts", where=str(placement), mend="give a moesim map"
            ) from None
    else:
        share = row
    if ranks < 1 or len(slots) % ranks:
        raise BadInput(f"{len(slots)} slots do not divide by {ranks} ranks", where="--ranks", mend="use a divisor")
    by_rank = share[slots].reshape(ranks, -1)
    order = np.argsort(by_rank.sum(axis=1))
    picked = {"coldest": order[0], "middle": order[ranks // 2], "hottest": order[-1]}
    mean = float(row.sum()) / ranks
    found = []
    for routed in (64, 512, 4096):
        for name, rank in picked.items():
            scaled = np.round(by_rank[rank] * routed / mean).astype(np.int64)
            if scaled.sum() > 0:
                found.append((f"real_{name}_{layer}", experts, scaled))
    return found


def _json(path: Path, what: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise BadInput(f"cannot read the {what}", where=str(path), mend="give a JSON file") from None
