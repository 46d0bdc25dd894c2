"""Units: SI inside (seconds, bytes, FLOP/s, tokens); people's units only where a person reads."""

from __future__ import annotations

import math

MICRO = 1e-6
MILLI = 1e-3
GIGA = 1e9
TERA = 1e12
MIB = 1024**2
GIB = 1024**3

# Bytes for one element (or, for block-scaled types, one element with its share of the scales).
# fp8_block: one float32 scale for 128 elements (DeepSeek-V3 technical report, arXiv:2412.19437, section 3.3).
# mxfp4: 4 bits and one 8-bit scale for 32 elements (OCP Microscaling Formats v1.0).
# nvfp4: 4 bits and one 8-bit scale for 16 elements (NVIDIA Blackwell architecture brief).
# int4: 4 bits and one bf16 scale for 32 elements (Kimi-K2 style group-wise quantisation).
BYTES_PER_ELEMENT: dict[str, float] = {
    "fp32": 4.0,
    "bf16": 2.0,
    "fp16": 2.0,
    "fp8": 1.0,
    "fp8_block": 1.0 + 4.0 / 128.0,
    "int8": 1.0,
    "mxfp4": 0.5 + 1.0 / 32.0,
    "nvfp4": 0.5 + 1.0 / 16.0,
    "int4": 0.5 + 2.0 / 32.0,
    "w4a8_mxfp4_mxfp8": 0.5 + 1.0 / 32.0,  # mxfp4 weights times mxfp8 activations
}


def human_seconds(value_s: float) -> str:
    """Write a duration for a person: `1.23 ms`."""
    if math.isnan(value_s):
        return "-"
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if abs(value_s) >= scale:
            return f"{value_s / scale:.3g} {unit}" if abs(value_s / scale) < 1000 else f"{value_s / scale:.0f} {unit}"
    return f"{value_s / 1e-6:.2g} µs"


def human_bytes(value: float) -> str:
    """Write a size for a person: `12.3 GB` (powers of ten)."""
    for scale, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} B"
