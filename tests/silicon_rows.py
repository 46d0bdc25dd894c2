"""Measured rows for tests: as a table in a file, and by themselves."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from validate.silicon_rows import COLUMNS, MEASURED, Layout, SiliconRow

ROW = {
    "silicon_data_source": "db-dump/2026-04-27; silicon_concurrency=8; measured=2026-03-25T00:00:00.000Z",
    "backend": "sglang", "backend_version": "0.5.9", "model_path": "deepseek-ai/DeepSeek-R1", "system": "h200_sxm",
    "precision": "fp8", "mode": "agg", "isl": "1024", "osl": "64", "gemm_quant_mode": "fp8",
    "moe_quant_mode": "fp8_block", "batch_size": "8", "tp_size": "8", "pp_size": "1", "attention_dp_size": "1",
    "moe_tp_size": "8", "moe_ep_size": "1",
}  # fmt: skip


def table(folder: Path, count: int = 9) -> Path:
    """Rows of several lengths and concurrencies, the last one with pipeline parallelism (not priced)."""
    out = io.StringIO()
    writer = csv.DictWriter(out, ["id", *[name for name in COLUMNS if name != "id"], *MEASURED], restval="")
    writer.writeheader()
    for number in range(count):
        busy = 2 ** (number % 5)
        source = f"db-dump; silicon_concurrency={busy}; measured=2026-03-25T00:00:00.000Z"
        more = {"isl": str(512 * (1 + number % 3)), "silicon_data_source": source}
        times = {MEASURED[0]: str(200 + 10 * number), MEASURED[1]: str(12 + number)}
        last = {"pp_size": "2"} if number == count - 1 else {}
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
