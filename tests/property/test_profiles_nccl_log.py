"""Logs of nccl-tests: what they say, and 2,000 damaged ones that each give one line or a log."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moesim.errors import BadInput
from profiles.importers.nccl_tests import read_nccl_log

LOG = """# Collective test starting: all_gather_perf
# nThread 1 nGpus 2 minBytes 1024 maxBytes 4096 step: 2(factor) warmup iters: 5 iters: 20
#  Rank  0 Group  0 Pid   1 on  node-a device  0 [0x1b] NVIDIA H200
#  Rank  1 Group  0 Pid   2 on  node-b device  0 [0x1b] NVIDIA H200
#       size         count      type   redop    root     time   algbw   busbw #wrong     time   algbw   busbw #wrong
        1024           128     float    none      -1    10.24    0.10    0.05      0    10.10    0.10    0.05    N/A
     1048576        131072     float    none      -1    20.00   52.43   26.21      0    19.00   55.19   27.59      0
# Avg bus bandwidth    : 20.1
"""


def log(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.log"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("prefix", ["", "0: "])
@pytest.mark.parametrize("root", ["    -1", ""])
def test_a_log_is_read(tmp_path: Path, prefix: str, root: str) -> None:
    text = "\n".join(prefix + line.replace("none      -1", f"none  {root}") for line in LOG.splitlines())
    found = read_nccl_log(log(tmp_path, text))
    assert (found.kind, found.ranks, found.hosts) == ("all_gather", 2, 2)
    assert found.points == ((1024.0, pytest.approx(10.24e-6)), (1048576.0, pytest.approx(20e-6)))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("20.00   52.43", "nan   52.43", "above zero"),
        ("20.00   52.43", "-20.00   52.43", "above zero"),
        ("20.00   52.43", "0.02   52.43", "times are in us"),
        ("20.00   52.43   26.21", "20.00", "columns"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(BadInput, match=message) as error:
        read_nccl_log(log(tmp_path, LOG.replace(old, new)))
    assert "run.log:7" in error.value.line()


def test_damaged_logs_give_one_line_or_points(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    path = tmp_path / "run.log"
    whole = LOG.encode()
    refused = 0
    for _ in range(2000):
        data = bytearray(whole)
        for _ in range(int(rng.integers(1, 5))):
            at = int(rng.integers(len(data)))
            if rng.random() < 0.5:
                data[at] = int(rng.integers(256))
            else:
                del data[at : at + int(rng.integers(1, 40))]
        path.write_bytes(bytes(data))
        try:
            points = read_nccl_log(path).points
        except BadInput as error:
            refused += 1
            assert "\n" not in error.line()
            assert "run.log" in error.line()
        else:
            assert all(0 < size < float("inf") and 0 < seconds < float("inf") for size, seconds in points)
    assert refused > 200
