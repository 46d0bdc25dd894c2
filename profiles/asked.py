"""Single points that a user (or a refusal of the store) asks `moesim profile kernels` for."""

from __future__ import annotations

import itertools
import math
from typing import Any

from moesim.errors import BadInput
from profiles.record import COUNT, FAMILIES
from profiles.sweep import ATTENTION, GROUPED, PRODUCT, UNIFORM, Point, histogram, powers

DTYPES = ("fp32", "bf16", "fp16", "fp8")
KERNEL_OF = {
    "gemm": PRODUCT, "experts": GROUPED, "mla_absorb": "torch.bmm",
    **dict.fromkeys(("attention_prefill", "attention_decode", "mla_prefill", "mla_decode"), ATTENTION),
}  # fmt: skip
DEFAULTS: dict[str, dict[str, str | int]] = {
    "experts": {"grouping": "fused", "distribution": UNIFORM},
    "attention_prefill": {"window": 0},
    "attention_decode": {"window": 0},
    "mla_prefill": {"form": "expanded"},
    "mla_decode": {"form": "absorbed"},
}
ASKED = "--point"


def unmeasurable(family: str, key: dict[str, Any]) -> str:
    """Why torch's kernels here cannot measure this key; empty where they can."""
    if family not in KERNEL_OF:
        return f"{family} is not measured by kernels"
    if key["dtype"] not in (DTYPES if family == "gemm" else DTYPES[:3]):
        return f"{key['dtype']} {family} is not in torch"
    if key.get("grouping", "fused") != "fused":
        return f"{key['grouping']} experts need DeepEP's layouts"
    if key.get("kv_dtype", key["dtype"]) != key["dtype"]:
        return f"a cache of {key['kv_dtype']} is not in torch's attention"
    return "attention in a window is not measured here" if key.get("window", 0) else ""


def asked(text: str) -> list[Point]:
    """The points of `FAMILY name=value …`; a size is N, LOW:HIGH (powers of two and HIGH), or left out (1 to 4096).

    Raises BadInput that says which name is missing, unknown or wrong.
    """
    family, *words = text.split()
    if family not in KERNEL_OF:
        raise BadInput(f"unknown family {family!r}", where=ASKED, mend=f"use one of: {', '.join(KERNEL_OF)}")
    given = dict(_pair(word) for word in words)
    columns, sizes = FAMILIES[family].key, FAMILIES[family].point
    key = _asked_key(family, columns, given)
    unknown = sorted(set(given) - set(columns) - set(sizes))
    if unknown:
        raise BadInput(f"{family} has no {unknown[0]!r}", where=ASKED, mend=f"use {', '.join([*columns, *sizes])}")
    why = unmeasurable(family, key)
    if why:
        raise BadInput(why, where=ASKED, mend="import such points with `moesim profile import aiconfigurator`")
    if family == "experts" and int(key["local_experts"]) > int(key["experts"]):
        raise BadInput("more local experts than experts", where=ASKED, mend="lower local_experts")
    axes = [_asked_sizes(name, given.get(name, "1:4096")) for name in sizes]
    found: list[Point] = []
    for values in itertools.product(*axes):
        size = {name: float(value) for name, value in zip(sizes, values, strict=True)}
        extra: dict[str, Any] = {}
        if family == "experts":
            counts = histogram(str(key["distribution"]), values[0], int(key["local_experts"]))
            extra = {"histogram": [int(count) for count in counts]}
        found.append(Point(family, key, size, KERNEL_OF[family], extra=extra))
    return found


def _pair(word: str) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    if not equals or not name or not value:
        raise BadInput(
            f"{word!r} is not name=value", where=ASKED, mend="write for instance `gemm n=4096 k=7168 dtype=bf16`"
        )
    return name, value


def _asked_key(family: str, columns: dict[str, str], given: dict[str, str]) -> dict[str, str | int]:
    defaults = dict(DEFAULTS.get(family, {}))
    if "kv_dtype" in columns and "dtype" in given:
        defaults["kv_dtype"] = given["dtype"]
    key: dict[str, str | int] = {}
    for name, kind in columns.items():
        if name not in given and name not in defaults:
            raise BadInput(f"{family} lacks {name}", where=ASKED, mend=f"give {', '.join(columns)}")
        value = given.get(name, defaults.get(name))
        if kind == COUNT and not isinstance(value, int):
            value = _whole(name, str(value), least=0 if name == "window" else 1)
        assert value is not None
        key[name] = value
    if family == "experts" and not _known_histogram(str(key["distribution"])):
        raise BadInput(
            f"unknown distribution {key['distribution']!r}", where=ASKED, mend="use uniform, zipf_1.2 (say) or one_hot"
        )
    return key


def _known_histogram(name: str) -> bool:
    if name in (UNIFORM, "one_hot"):
        return True
    try:
        return name.startswith("zipf_") and math.isfinite(float(name.removeprefix("zipf_")))
    except ValueError:
        return False


def _asked_sizes(name: str, text: str) -> tuple[int, ...]:
    low, colon, high = text.partition(":")
    least = _whole(name, low)
    if not colon:
        return (least,)
    most = _whole(name, high)
    if most < least:
        raise BadInput(f"{name}={text} runs backwards", where=ASKED, mend="write LOW:HIGH")
    return powers(least, most)


def _whole(name: str, text: str, least: int = 1) -> int:
    if not text.isdecimal() or not least <= int(text) <= 2**40:
        raise BadInput(f"{name}={text} is no whole number from {least}", where=ASKED, mend="write for instance 4096")
    return int(text)
