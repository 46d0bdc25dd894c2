"""Damage that files suffer, drawn from a seed: bits and bytes, lines, figures, units, foreign text."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

_FIGURE = re.compile(rb"(?<![\w.])\d+(?:\.\d+)?(?![\w.])")
ODD = [
    b"nan", b"NaN", b"inf", b"-inf", b"-1", b"-0.5", b"0", b"1e400", b"1e99", b"9" * 30, b"", b"x", b"1,5", b"0x10",
    b"--", b"1_0", b"\xd9\xa3", b"None", b"1e-320",
]  # fmt: skip
UNITS = [
    (b" us", b" ms"), (b" us", b" s"), (b"GB/s", b"Gb/s"), (b"GB/s", b"MB/s"), (b"(us)", b"(ms)"), (b"_us", b"_ms"),
    (b"GBps", b"Gbps"), (b"tflops", b"gflops"),
]  # fmt: skip
FOREIGN = [
    b"", b"\x00" * 64, b"{}\n", b"[]\n", b"a,b,c\n1,2,3\n", b"PAR1\x15\x04PAR1", b"<html><body>404</body></html>\n",
    b"size,time\n1,2\n", "\u65e5\u672c\u8a9e\n".encode(), b"\xff\xfe\xfd" * 9, b"\x1f\x8b\x08\x00\x00",
]  # fmt: skip


def damaged(whole: bytes, rng: np.random.Generator) -> bytes:
    """One to three damages to the bytes of a file."""
    data = whole
    for _ in range(int(rng.integers(1, 4))):
        data = _damage(data, rng)
    return data


def _damage(data: bytes, rng: np.random.Generator) -> bytes:
    kind = int(rng.integers(10))
    if not data or (kind == 0 and rng.random() < 0.3):
        return FOREIGN[int(rng.integers(len(FOREIGN)))]
    if kind in (0, 1):
        return _bytes(data, rng)
    if kind == 2:
        return data[: int(rng.integers(len(data)))]
    if kind in (3, 4, 5):
        return _lines(data, rng, kind)
    if kind == 6:
        old, new = UNITS[int(rng.integers(len(UNITS)))]
        return data.replace(old, new, int(rng.integers(1, 4)))
    return _figure(data, rng)


def _bytes(data: bytes, rng: np.random.Generator) -> bytes:
    content = bytearray(data)
    at = int(rng.integers(len(content)))
    way = int(rng.integers(4))
    if way == 0:
        for where in rng.integers(len(content), size=int(rng.integers(1, 5))):
            content[int(where)] = int(rng.integers(256))
    elif way == 1:
        content[at] ^= 1 << int(rng.integers(8))
    elif way == 2:
        del content[at : at + int(rng.integers(1, 30))]
    else:
        content[at:at] = bytes(rng.integers(0, 256, size=int(rng.integers(1, 12)), dtype=np.uint8))
    return bytes(content)


def _lines(data: bytes, rng: np.random.Generator, kind: int) -> bytes:
    lines = data.split(b"\n")
    one, other = (int(at) for at in rng.integers(len(lines), size=2))
    if kind == 3:
        del lines[one]
    elif kind == 4:
        lines.insert(other, lines[one])
    else:
        lines[one], lines[other] = lines[other], lines[one]
    return b"\n".join(lines)


def _figure(data: bytes, rng: np.random.Generator) -> bytes:
    """One figure becomes an odd one, or is scaled as a change of its unit would."""
    found = list(_FIGURE.finditer(data))
    if not found:
        return data
    match = found[int(rng.integers(len(found)))]
    new = ODD[int(rng.integers(len(ODD)))]
    if rng.random() < 0.4:
        new = f"{float(match[0]) * float(rng.choice([1e-3, 0.125, 8.0, 1e3, 1e6])):.2f}".encode()
    return data[: match.start()] + new + data[match.end() :]


def fingerprint(folder: Path) -> dict[str, bytes]:
    """All files of a folder, byte by byte."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
