"""Everything one rank needs for a run: its device, router, weights, tokens, and one layer for each placement."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import CheckFailed, MissingPart
from moesim.units import MIB
from validate.hardware.group import Group, need_torch
from validate.hardware.job import Job, PlacedCase
from validate.hardware.layer import (
    RankLayer,
    Routes,
    Weights,
    draw_router,
    draw_tokens,
    expert_weights,
    gate,
    grouped_kernel,
    permute,
    reference,
    replica_routes,
)

# Read before every timed run, so that neither the weights nor the tokens of the last one are still in the core's own
# caches: several times the 2 MB of L2 of current server cores, and of the 50 MB of an H200's L2. A last-level cache
# larger than that is shared by all that runs on the machine and stays as warm as the run makes it.
FLUSH_BYTES = {"cpu": 32 * MIB, "cuda": 256 * MIB}

# Largest relative error |y - reference| / |reference| of a correct layer. Rows pass through products over `hidden` and
# `intermediate` terms: in float32 (unit roundoff 6e-8) their error grows with the square root of some thousand terms,
# about 4e-6; in bfloat16 (unit roundoff 4e-3) three roundings of the activations dominate, about 7e-3.
OUTPUT_LIMIT = {"float32": 1e-5, "bfloat16": 2e-2}


Copies = dict[tuple[int, int], Weights]  # (expert, which copy of it on this rank) -> weights


@dataclass(frozen=True)
class Rig:
    """One rank's side of the run.

    basis: the router, float64 [hidden, experts]. layers: one for each placement of the job. tokens: token count ->
    [count, hidden] on the device.
    """

    job: Job
    group: Group
    dtype: str
    grouped: bool
    basis: NDArray[np.float64]
    layers: tuple[RankLayer, ...]
    tokens: dict[int, Any]
    flusher: Any

    @property
    def local_slots(self) -> tuple[int, ...]:
        """Slots of this rank under each placement."""
        return tuple(len(layer.weights) for layer in self.layers)

    def flush(self) -> None:
        """Push the last run's data out of the near caches by reading something else."""
        self.flusher.sum()


def device_of(backend: str, rank: int, local_rank: int) -> Any:
    """The rank's device. Raises MissingPart where the backend has no GPU for it."""
    torch = need_torch()
    if backend == "gloo":
        return torch.device("cpu")
    # Communicators have streams of their own; with the eight hardware queues of the default, two may share one, and
    # what waits for another rank then holds up what does not (CUDA C++ programming guide, environment variables).
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    missing_gpu(local_rank + 1)
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def missing_gpu(needed: int) -> None:
    """Raise MissingPart unless torch sees `needed` GPUs and can speak NCCL to them."""
    torch = need_torch()
    other = "run it on a machine with NVIDIA GPUs and a CUDA build of torch, or pass --backend gloo"
    if not torch.cuda.is_available():
        raise MissingPart("--backend nccl needs a GPU, and torch sees none", mend=other)
    if not torch.distributed.is_nccl_available():
        raise MissingPart("--backend nccl needs a torch built with NCCL, and this one is not", mend=other)
    if torch.cuda.device_count() < needed:
        raise MissingPart(
            f"--backend nccl needs one GPU for each rank: {needed}, and torch sees {torch.cuda.device_count()}",
            mend=f"pass --ranks {torch.cuda.device_count()}, or --backend gloo",
        )


def generator(job: Job, *purpose: int) -> np.random.Generator:
    """The random stream of one purpose: the job's seed, then numbers that name it."""
    return np.random.default_rng([job.seed, *purpose])


def build(job: Job, group: Group, made: Copies | None = None) -> Rig:
    """Make this rank's weights (a copy for each replica of a placement; placements share them), layers and tokens.

    made: weights that are there already; those that are made are added, so that ranks played in turn can share them.
    """
    torch = need_torch()
    cuda = group.device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    grouped = job.kernel == "grouped" or (job.kernel == "auto" and cuda and _has_grouped(group.device))
    if grouped:
        grouped_kernel()
    basis = draw_router(job.shape, generator(job, 0))
    router = torch.as_tensor(basis, dtype=torch.float32).to(group.device)
    made = {} if made is None else made
    layers = tuple(_layer(job, case, group, router, made, dtype, grouped) for case in job.placements)
    profile = np.asarray(job.profile)
    tokens = {
        count: torch.as_tensor(draw_tokens(count, basis, profile, generator(job, 1, group.rank, count))).to(
            group.device, dtype
        )
        for count in job.tokens
    }
    size = FLUSH_BYTES[group.device.type] // 4
    return Rig(
        job=job,
        group=group,
        dtype=str(dtype).removeprefix("torch."),
        grouped=grouped,
        basis=basis,
        layers=layers,
        tokens=tokens,
        flusher=torch.ones(size, dtype=torch.float32, device=group.device),
    )


def _has_grouped(device: Any) -> bool:
    """Whether torch has a grouped product for this GPU: written for compute capability 9.0 and above."""
    torch = need_torch()
    return hasattr(torch, "_grouped_mm") and tuple(torch.cuda.get_device_capability(device)) >= (9, 0)


def _layer(job: Job, case: PlacedCase, group: Group, router: Any, made: Copies, dtype: Any, grouped: bool) -> RankLayer:
    torch = need_torch()
    table = np.asarray(case.slots, dtype=np.int64)
    per_rank = len(table) // job.ranks
    mine = table[group.rank * per_rank : (group.rank + 1) * per_rank].tolist()
    held: Counter[int] = Counter()
    copies = []
    for expert in mine:
        copy = (expert, held[expert])
        held[expert] += 1
        if copy not in made:
            group.beat.at(f"making the weights of expert {expert}")
            made[copy] = expert_weights(job.shape, expert, seed=job.seed, device=group.device, dtype=dtype)
        copies.append(made[copy])
    slots, count = replica_routes(
        table, experts=job.shape.experts, ranks=job.ranks, rank=group.rank, replica=job.replica
    )
    weights = tuple(copies)
    return RankLayer(
        shape=job.shape,
        router=router,
        routes=Routes(
            slots=torch.as_tensor(slots).to(group.device),
            count=torch.as_tensor(count).to(group.device),
            total_slots=len(table),
        ),
        weights=weights,
        stacked=(torch.stack([up for up, _ in weights]), torch.stack([down for _, down in weights]))
        if grouped
        else None,
    )


def routed_counts(rig: Rig) -> list[NDArray[np.int64]]:
    """Rows that each rank sends to each slot, for each case of the job: int64 [source ranks, slots]; on every rank."""
    found: list[NDArray[np.int64]] = []
    for tokens in rig.job.tokens:
        ids, _ = gate(rig.tokens[tokens], rig.layers[0].router, rig.job.shape.top_k)
        for layer in rig.layers:
            counts = permute(rig.tokens[tokens], ids, layer.routes).slot_counts
            found.append(rig.group.gather(counts.cpu().numpy().astype(np.float64)).astype(np.int64))
    return found


def check_outputs(rig: Rig, outputs: dict[int, list[Any]]) -> float:
    """The largest relative error of any output against the single-process float32 reference, over all ranks.

    outputs: token count -> this rank's outputs under each placement, each [tokens, hidden].
    Raises CheckFailed on every rank alike.
    """
    torch = need_torch()
    job, group = rig.job, rig.group
    errors = []
    for tokens, results in outputs.items():
        group.beat.at(f"computing the reference at {tokens} tokens")
        x = rig.tokens[tokens]

        def weights_of(expert: int, like: Any = x) -> Weights:
            group.beat.at(f"reference, expert {expert}")
            return expert_weights(job.shape, expert, seed=job.seed, device=like.device, dtype=like.dtype)

        truth = reference(x, rig.layers[0].router, job.shape, weights_of)
        for result in results:
            error = torch.linalg.vector_norm(result.float() - truth) / torch.linalg.vector_norm(truth)
            errors.append(float(error))
    table = group.gather(np.asarray(errors))
    limit = OUTPUT_LIMIT[rig.dtype]
    if not (table <= limit).all():
        rank, case = np.unravel_index(int(np.nan_to_num(table, nan=np.inf).argmax()), table.shape)
        placement, tokens = job.cases()[int(case)]
        raise CheckFailed(
            f"the layer's output differs from the float32 reference by {table[rank, case]:.2g} (limit {limit:g})",
            where=f"rank {rank}, placement {placement.name}, {tokens} tokens",
            mend="nothing was timed; report this",
        )
    return float(table.max())
