"""Measured rows for tests: as a table in a file, and by themselves."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from validate.silicon.causes import FRONT_END, PARTS, Causes
from validate.silicon.price import Prediction
from validate.silicon.rows import COLUMNS, MEASURED, Layout, SiliconRow

ROW = {
    "silicon_data_source": "db-dump/2026-04-27; silicon_concurrency=8; measured=2026-03-25T00:00:00.000Z",
    "backend": "sglang", "backend_version": "0.5.9", "model_path": "deepseek-ai/DeepSeek-R1", "system": "h200_sxm",
    "precision": "fp8", "mode": "agg", "isl": "1024", "osl": "64", "gemm_quant_mode": "fp8",
    "moe_quant_mode": "fp8_block", "batch_size": "8", "tp_size": "8", "pp_size": "1", "attention_dp_size": "1",
    "moe_tp_size": "8", "moe_ep_size": "1",
}  # fmt: skip


def table(folder: Path, count: int = 9) -> Path:
    """Rows of several lengths and concurrencies, the last one with sizes that contradict each other (not priced)."""
    out = io.StringIO()
    writer = csv.DictWriter(out, ["id", *[name for name in COLUMNS if name != "id"], *MEASURED], restval="")
    writer.writeheader()
    for number in range(count):
        busy = 2 ** (number % 5)
        source = f"db-dump; silicon_concurrency={busy}; measured=2026-03-25T00:00:00.000Z"
        more = {"isl": str(512 * (1 + number % 3)), "silicon_data_source": source}
        times = {MEASURED[0]: str(200 + 10 * number), MEASURED[1]: str(12 + number)}
        last = {"moe_tp_size": "4"} if number == count - 1 else {}
        writer.writerow({**ROW, "id": f"row{number}", **more, **times, **last})
    path = folder / "rows.csv"
    path.write_text(out.getvalue())
    return path


def row(number: int) -> SiliconRow:
    """A row that needs no file."""
    own = Layout(8, 1, 1, 8, 1)
    return SiliconRow(
        id=str(number), source="", engine="sglang", version="0.5.9", model="deepseek-ai/DeepSeek-R1", system="h200_sxm",
        precision="fp8", mode="agg", isl=1024, osl=64, dense="fp8", experts="fp8_block", layout=own, batch=8,
        concurrency=8, prefill=None, decode=None, ttft_ms=200.0 + number, tpot_ms=10.0,
    )  # fmt: skip


MODELS = (
    "deepseek-ai/DeepSeek-R1",
    "Qwen/Qwen3-235B-A22B",
    "openai/gpt-oss-120b",
    "MiniMaxAI/MiniMax-M2",
    "zai-org/GLM-5",
)
LAYOUTS = (Layout(8, 1, 1, 8, 1), Layout(4, 1, 1, 4, 1), Layout(8, 1, 1, 1, 8), Layout(1, 1, 8, 1, 8))


def predictions(
    count: int = 600,
    *,
    dearer: Mapping[str, float] | None = None,
    noise: float = 0.05,
    sigma: float = 0.1,
    seed: int = 1,
) -> list[Prediction]:
    """Predictions of rows of both halves, with causes, of runs in which parts cost `dearer` times as much.

    noise: of ln(measured / predicted), beside it. sigma: what each prediction tells of its own costs; it is half or
    twice that in every second row, and the noise with it.
    """
    rng = np.random.default_rng(seed)
    names = (*PARTS, FRONT_END)
    found = []
    for number in range(count):
        group, layout = divmod(number, len(LAYOUTS))
        one = replace(
            row(number),
            model=MODELS[group % len(MODELS)],
            system=("h200_sxm", "b200_sxm", "h100_sxm")[group // len(MODELS) % 3],
            engine=("sglang", "vllm")[group // (3 * len(MODELS)) % 2],
            isl=(1024, 8192)[group % 2],
            concurrency=2 ** (group % 8),
            layout=LAYOUTS[layout],
        )
        ttft, tpot = (dict(zip(names, rng.dirichlet(np.ones(len(names))), strict=True)) for _ in range(2))
        times = {"ttft": 0.2 * math.exp(rng.normal()), "tpot": 0.01 * math.exp(rng.normal())}
        loud = 0.5 if number % 2 else 2.0
        causes = Causes(ttft, tpot, rng.random(), rng.random(), sigma * loud, sigma * loud)
        measured = {
            name: times[name]
            * (1.0 + sum(shares[part] * (factor - 1.0) for part, factor in (dearer or {}).items()))
            * math.exp(noise * loud * rng.normal())
            for name, shares in (("ttft", ttft), ("tpot", tpot))
        }
        one = replace(one, ttft_ms=1e3 * measured["ttft"], tpot_ms=1e3 * measured["tpot"])
        found.append(Prediction(one, times["ttft"], times["tpot"], causes=causes))
    return found
