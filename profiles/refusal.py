"""The words of a refusal: which kernel and point was asked, and what would measure it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.cost.ops import (
    Attention,
    Collective,
    ExpertGemm,
    Gemm,
    MlaAbsorb,
    MlaAttention,
    MoeExchange,
    Operation,
)
from profiles.asked import unmeasurable
from profiles.lookup import SIZES, causal_length, key_fields
from profiles.record import COLLECTIVES, FAMILIES, KERNELS

Floats = NDArray[np.float64]


def describe(op: Operation) -> str:
    """The kernel and shape of an operation: `Gemm n=4096 k=7168 dtype=fp8_block`."""
    kind: Any = type(op)
    words = [f"{name}={getattr(op, name)}" for name in key_fields(kind) if name != "domains"]
    if isinstance(op, ExpertGemm):
        words.append(f"local_experts={op.tokens.shape[-1]}")
    return " ".join([type(op).__name__, *words])


def point_of(op: Operation, outside: NDArray[np.bool_]) -> str:
    """The sizes of the first point that lies outside."""
    words = []
    for name in SIZES[type(op)]:
        sizes = np.asarray(getattr(op, name), dtype=np.float64)
        if isinstance(op, ExpertGemm):
            sizes = sizes.sum(axis=-1)
        value = np.broadcast_to(sizes, outside.shape)[outside][0]
        words.append(f"{name}={value:g}" + (" in all" if isinstance(op, ExpertGemm) else ""))
    return " ".join(words)


# The family of rows that a kernel's operation is priced from.
FAMILY_OF: dict[type, str] = {Gemm: "gemm", ExpertGemm: "experts", MlaAbsorb: "mla_absorb"}
OUT = "--out measured.jsonl"


def mend(op: Operation, outside: NDArray[np.bool_] | None = None, *, gpus_per_node: int = 8) -> str:
    """What the user can do about a point that is not measured: a command that measures it, or tables that may hold it.

    outside: which of the operation's points are refused; the first one's sizes go into the command. None: the whole
    shape is not measured, and no smaller batch helps.
    """
    lower = "" if outside is None else f"{_key_to_lower(op)}, or "
    return f"{lower}{_command(op, outside, gpus_per_node)}, or set cost.extrapolate: allow"


def _key_to_lower(op: Operation) -> str:
    """The key of a scenario that makes an operation's sizes: batches, and in training the micro-batch."""
    if isinstance(op, Attention | MlaAttention) and op.phase == "decode":
        return "lower serving.batching.max_running_requests_per_dp_rank or serving.workload.isl"
    return "lower serving.batching.max_batch_tokens_per_dp_rank (training: training.micro_batch)"


THEN = "then `moesim profile import measured measured.jsonl --system SYSTEM --out DIR` and name DIR in cost.profiles"


def _command(op: Operation, outside: NDArray[np.bool_] | None, gpus_per_node: int) -> str:
    if isinstance(op, Collective):
        largest = 2**28 if outside is None else max(_first(np.asarray(op.bytes), outside), 1024)
        sizes = f"--backend nccl --kinds {op.kind} --from 1KB --to {largest}B {OUT}"
        if op.nodes == 1:
            return f"measure it with `{COLLECTIVES} --ranks {op.gpus} {sizes}`, {THEN}"
        each = -(-op.gpus // op.nodes)
        run = f"torchrun --nnodes {op.nodes} --nproc-per-node {each} --rdzv-backend c10d --rdzv-endpoint HOST:29500"
        return f"measure it with `{run} --no-python {COLLECTIVES} {sizes}` on each node, {THEN}"
    imported = "import tables that hold it with `moesim profile import aiconfigurator --system SYSTEM --out DIR`"
    if isinstance(op, MoeExchange):
        shape = f"--hidden {op.hidden} --top-k {op.top_k} --experts {op.experts} --ep {op.ep} --nodes {op.nodes}"
        logs = f"import logs of its tests with `moesim profile import deepep LOG --system SYSTEM {shape} --out DIR`"
        return f"nothing here measures DeepEP yet; {logs}, or {imported}"
    family, key = _asked(op)
    why = unmeasurable(family, key)
    if why:
        return f"{why}; {imported}"
    words = [f"{name}={value}" for name, value in key.items()]
    words += [f"{name}=1:{most}" for name, most in _sizes_of(op, family, outside).items()]
    return f"measure it with `{KERNELS} --device cuda --point '{' '.join([family, *words])}' {OUT}`, {THEN}"


def _asked(op: Operation) -> tuple[str, dict[str, Any]]:
    """The family and key of rows that would price the operation."""
    if isinstance(op, Attention | MlaAttention):
        family = f"{'mla' if isinstance(op, MlaAttention) else 'attention'}_{op.phase}"
    else:
        family = FAMILY_OF[type(op)]
    extra: dict[str, Any] = {}
    if isinstance(op, MlaAttention):
        extra = {"form": "absorbed" if op.phase == "decode" else "expanded"}
    if isinstance(op, ExpertGemm):
        extra = {"local_experts": int(op.tokens.shape[-1]), "distribution": "uniform"}
    columns = FAMILIES[family].key
    return family, {name: extra[name] if name in extra else getattr(op, name) for name in columns}


def _sizes_of(op: Any, family: str, outside: NDArray[np.bool_] | None) -> dict[str, int]:
    """The sizes of the first refused point, rounded up; 4096 of each where a whole shape is not measured."""
    names = FAMILIES[family].point
    if outside is None:
        return dict.fromkeys(names, 4096) if len(names) == 1 else {names[0]: 64, names[1]: 4096}
    if isinstance(op, ExpertGemm):
        found = [op.tokens.sum(axis=-1)]
    elif isinstance(op, Attention | MlaAttention):
        length = causal_length(op) if op.phase == "prefill" else np.asarray(op.prefix_tokens) + 1.0
        new = np.asarray(op.new_tokens) if op.phase == "decode" else 1.0
        found = [np.asarray(op.batch) * new, length]
    else:
        found = [np.asarray(getattr(op, names[0]))]
    return {name: _first(sizes, outside) for name, sizes in zip(names, found, strict=True)}


def _first(sizes: Floats, outside: NDArray[np.bool_]) -> int:
    """The first refused size, rounded up."""
    return max(1, int(np.ceil(np.broadcast_to(sizes, outside.shape)[outside][0])))
