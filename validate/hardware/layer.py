"""One expert-parallel MoE layer on torch.distributed: gate, permute, dispatch, experts, combine, unpermute.

The same code runs on the CPU (gloo, float32) and on GPUs (nccl, bfloat16). Rows are tokens; every function but the two
exchanges is local to a rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import MissingPart
from validate.hardware.group import Group, need_torch
from validate.hardware.job import LayerShape, Replica

OPERATIONS = ("gate", "permute", "dispatch", "experts", "combine", "unpermute")
COLLECTIVES = ("dispatch", "combine")

# Share given to an expert that the load profile never saw, so that its logarithm exists.
LEAST_SHARE = 1e-9

Mark = Callable[[], None]
Weights = tuple[Any, Any]


@dataclass(frozen=True)
class Routes:
    """Where a rank sends the tokens of each expert.

    slots: int64 tensor [experts, width], the replicas it uses, in its own order (padded with the first one).
    count: int64 tensor [experts], how many of them are real. total_slots: of the placement, over all ranks.
    """

    slots: Any
    count: Any
    total_slots: int


@dataclass(frozen=True)
class RankLayer:
    """One rank's share of the layer under one placement.

    router: float32 [hidden, experts]. weights: of each local slot, (gate and up [2 intermediate, hidden], down
    [hidden, intermediate]). stacked: the same as two tensors [local slots, ...] for the grouped kernel, else None.
    """

    shape: LayerShape
    router: Any
    routes: Routes
    weights: tuple[Weights, ...]
    stacked: Weights | None


@dataclass(frozen=True)
class Permuted:
    """Copies of the tokens in order of their slot: rows [tokens x top_k, hidden], slot_counts int64 [slots].

    source: int64 [tokens x top_k], which (token, choice) each row came from.
    """

    rows: Any
    source: Any
    slot_counts: Any


@dataclass(frozen=True)
class Dispatched:
    """What reached this rank: rows in order of (source rank, slot), their counts[source][local slot].

    sent, received: rows to and from each rank.
    """

    rows: Any
    counts: list[list[int]]
    sent: list[int]
    received: list[int]


def replica_routes(
    table: NDArray[np.int64], *, experts: int, ranks: int, rank: int, replica: Replica
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Replicas that `rank` uses for each expert, in turn: slots [experts, width] and how many are real [experts].

    table: [slots], the expert of each slot. `local_first`: only its own replicas where it has some. Else all of them,
    starting at another one on each rank, so that odd counts do not pile up.
    """
    per_rank = len(table) // ranks
    chosen: list[NDArray[np.int64]] = []
    for expert in range(experts):
        slots = np.nonzero(table == expert)[0]
        local = slots[slots // per_rank == rank]
        use = local if replica == "local_first" and len(local) else np.roll(slots, -(rank % len(slots)))
        chosen.append(use.astype(np.int64))
    count = np.asarray([len(use) for use in chosen], dtype=np.int64)
    padded = np.stack([np.pad(use, (0, int(count.max()) - len(use)), constant_values=use[0]) for use in chosen])
    return padded, count


def draw_router(shape: LayerShape, rng: np.random.Generator) -> NDArray[np.float64]:
    """A router with orthonormal columns: [hidden, experts]."""
    basis, _ = np.linalg.qr(rng.standard_normal((shape.hidden, shape.experts)))
    return np.asarray(basis, dtype=np.float64)


def draw_tokens(
    count: int, router: NDArray[np.float64], profile: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.float32]:
    """Tokens whose router scores draw experts without replacement by their share: [count, hidden].

    The scores are ln(share) + Gumbel noise, whose top k is a draw without replacement in proportion to the shares
    (Vieira, 2014; Kool et al., arXiv:1903.06059). A normal token gets those scores by replacing its component in the
    router's column space, so the gate that is timed is an ordinary linear router.
    """
    hidden, experts = router.shape
    scores = np.log(np.maximum(profile, LEAST_SHARE)) + rng.gumbel(size=(count, experts))
    tokens = rng.standard_normal((count, hidden))
    return np.asarray(tokens + (scores - tokens @ router) @ router.T, dtype=np.float32)


def expert_weights(shape: LayerShape, expert: int, *, seed: int, device: Any, dtype: Any) -> Weights:
    """The weights of one expert, the same on whatever rank makes them; normal, scaled by 1/sqrt(fan-in)."""
    torch = need_torch()
    source = torch.Generator().manual_seed(seed * 1_000_003 + expert)
    up = torch.randn(2 * shape.intermediate, shape.hidden, generator=source) / shape.hidden**0.5
    down = torch.randn(shape.hidden, shape.intermediate, generator=source) / shape.intermediate**0.5
    return up.to(device, dtype), down.to(device, dtype)


def gate(x: Any, router: Any, top_k: int) -> tuple[Any, Any]:
    """Ids and weights of each token's experts: int64 and float32 [tokens, top_k]; softmax over the chosen."""
    torch = need_torch()
    best = (x.float() @ router).topk(top_k, dim=-1)
    return best.indices, torch.softmax(best.values, dim=-1)


def permute(x: Any, ids: Any, routes: Routes) -> Permuted:
    """Copy each token once for each of its experts, in order of the slot that serves it; replicas take turns."""
    torch = need_torch()
    top_k = ids.shape[1]
    flat = ids.reshape(-1)
    order = flat.argsort(stable=True)
    experts = flat[order]
    counts = torch.bincount(flat, minlength=routes.count.shape[0])
    turn = torch.arange(len(flat), device=flat.device) - (counts.cumsum(0) - counts)[experts]
    slots = routes.slots[experts, turn % routes.count[experts]]
    by_slot = slots.argsort(stable=True)
    source = order[by_slot]
    return Permuted(
        rows=x.index_select(0, source // top_k),
        source=source,
        slot_counts=torch.bincount(slots, minlength=routes.total_slots),
    )


def dispatch(permuted: Permuted, group: Group) -> Dispatched:
    """Send every row to the rank of its slot: first the counts, then the rows, unevenly."""
    outgoing = permuted.slot_counts.reshape(group.ranks, -1)
    counts = group.exchange_counts(outgoing).tolist()
    sent = outgoing.sum(dim=1).cpu().tolist()
    received = [sum(row) for row in counts]
    return Dispatched(group.exchange(permuted.rows, sent, received), counts, sent, received)


def swiglu(rows: Any, weights: Weights) -> Any:
    """One expert: down(silu(gate(x)) * up(x)); rows [n, hidden] -> [n, hidden]."""
    functional = need_torch().nn.functional
    gate_part, up_part = functional.linear(rows, weights[0]).chunk(2, dim=-1)
    return functional.linear(functional.silu(gate_part) * up_part, weights[1])


def run_experts(rows: Any, counts: list[list[int]], layer: RankLayer) -> Any:
    """Every local expert on its rows; rows and result in order of (source rank, slot). counts[source][local slot]."""
    return _loop(rows, counts, layer.weights) if layer.stacked is None else _grouped(rows, counts, layer.stacked)


def _loop(rows: Any, counts: list[list[int]], weights: tuple[Weights, ...]) -> Any:
    torch = need_torch()
    result = torch.empty_like(rows)
    pieces = rows.split([count for source in counts for count in source])
    targets = result.split([count for source in counts for count in source])
    local = len(weights)
    for slot, expert in enumerate(weights):
        mine = [source * local + slot for source in range(len(counts)) if counts[source][slot]]
        if not mine:
            continue
        joined = pieces[mine[0]] if len(mine) == 1 else torch.cat([pieces[index] for index in mine])
        done = swiglu(joined, expert)
        start = 0
        for index in mine:
            size = len(targets[index])
            targets[index].copy_(done[start : start + size])
            start += size
    return result


def _grouped(rows: Any, counts: list[list[int]], stacked: Weights) -> Any:
    torch = need_torch()
    if not len(rows):  # a kernel may refuse a product of nothing, and nothing is what it is priced at
        return torch.empty_like(rows)
    device = rows.device
    table = torch.tensor(counts, device=device)
    local = table.shape[1]
    each = torch.arange(local, device=device).repeat(len(counts))
    slot = each.repeat_interleave(table.reshape(-1), output_size=len(rows))
    order = slot.argsort(stable=True)
    ends = table.sum(dim=0).cumsum(0).to(torch.int32)
    product = grouped_kernel()
    gate_part, up_part = product(rows[order], stacked[0].transpose(-2, -1), offs=ends).chunk(2, dim=-1)
    done = product(torch.nn.functional.silu(gate_part) * up_part, stacked[1].transpose(-2, -1), offs=ends)
    result = torch.empty_like(rows)
    result[order] = done
    return result


def grouped_kernel() -> Callable[..., Any]:
    """torch's grouped matrix product. Raises MissingPart where this torch has none."""
    kernel: Callable[..., Any] | None = getattr(need_torch(), "_grouped_mm", None)
    if kernel is None:
        raise MissingPart("this torch has no grouped matrix product", mend="pass --kernel loop, or install torch>=2.8")
    return kernel


def combine(rows: Any, dispatched: Dispatched, group: Group) -> Any:
    """Send every row back to the rank it came from, in the order in which it was sent."""
    return group.exchange(rows, dispatched.received, dispatched.sent)


def unpermute(rows: Any, source: Any, weights: Any) -> Any:
    """Put each token's rows together again, weighted: float32 [tokens, hidden]."""
    torch = need_torch()
    tokens, top_k = weights.shape
    back = torch.empty_like(rows)
    back[source] = rows
    return torch.bmm(weights[:, None, :], back.reshape(tokens, top_k, -1).float())[:, 0]


def forward(x: Any, layer: RankLayer, group: Group, mark: Mark) -> tuple[Any, Dispatched]:
    """The whole layer on this rank's tokens [tokens, hidden]; marks the start and the end of each operation."""
    mark()
    ids, weights = gate(x, layer.router, layer.shape.top_k)
    mark()
    permuted = permute(x, ids, layer.routes)
    mark()
    arrived = dispatch(permuted, group)
    mark()
    done = run_experts(arrived.rows, arrived.counts, layer)
    mark()
    back = combine(done, arrived, group)
    mark()
    y = unpermute(back, permuted.source, weights)
    mark()
    return y, arrived


def reference(x: Any, router: Any, shape: LayerShape, weights_of: Callable[[int], Weights]) -> Any:
    """The layer without ranks, slots or permutations, in float32: [tokens, hidden].

    Chooses the experts itself, from scores in float64, and asks for one expert's weights at a time.
    """
    torch = need_torch()
    best = (x.double() @ router.double()).topk(shape.top_k, dim=-1)
    share = torch.softmax(best.values, dim=-1).float()
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in range(shape.experts):
        token, choice = (best.indices == expert).nonzero(as_tuple=True)
        if len(token):
            up, down = weights_of(expert)
            hidden = x[token].float() @ up.float().T
            gate_part, up_part = hidden[:, : shape.intermediate], hidden[:, shape.intermediate :]
            out = (gate_part * torch.sigmoid(gate_part) * up_part) @ down.float().T
            y.index_add_(0, token, share[token, choice, None] * out)
    return y
