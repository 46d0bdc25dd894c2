"""Work on one device beside other work: expert products beside copies, and with some multiprocessors held."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

from profiles import beside
from profiles.capture import statistics_of
from profiles.sweep import GROUPED, UNIFORM, Point, Reach, expert_points, histogram
from profiles.torch_kernels import Builder

FAMILIES = ("overlap", "held_sms")
# A copy on the device stands in for communication; the others are the prefetch of offloaded weights, and its way back.
COPIES = ("copy", "host_to_device_pinned", "device_to_host_pinned")
# Multiprocessors that DeepEP's normal kernels take: 20 by default, 24 in its own tests (deepseek-ai/DeepEP,
# deep_ep/buffer.py and tests/test_internode.py).
HELD = (20, 24)
LOCAL_EXPERTS = 8
MOST_REPEATS = 20  # each is a batch, alone and beside
HOLD = 4.0  # the multiprocessors are held this many times as long as the products need alone


def points(reach: Reach) -> Iterator[Point]:
    """Products of a DeepSeek-V3 rank's experts (the first shape of the sweep) at two loads, beside everything."""
    shape = reach.shapes[0]
    for routed in (reach.routed[-1] // 16, reach.routed[-1] // 2):
        _, product, *_ = expert_points(shape, histogram(UNIFORM, routed, LOCAL_EXPERTS), UNIFORM, reach.dtype)
        words = f"{product.family} {LOCAL_EXPERTS}x{shape.hidden}x{shape.intermediate} {reach.dtype} routed={routed}"
        for name in COPIES:
            key: dict[str, str | int] = {"work": name, "beside": words, "path": "device", "gpus": 1, "nodes": 1}
            for size in (reach.copy_bytes // 64, reach.copy_bytes // 8):
                extra = {**product.extra, "product": {"key": product.key, "size": product.size}}
                yield Point("overlap", key, {"bytes": float(size)}, GROUPED, extra=extra)
        for held in HELD:
            yield Point("held_sms", {**product.key, "held": held}, product.size, GROUPED, extra=product.extra)


def lacks(point: Point, device: str) -> str:
    """What the point needs and this machine has not; empty where it can run."""
    if point.family == "held_sms":
        if not device.startswith("cuda"):
            return "needs a GPU"
        return "" if importlib.util.find_spec("triton") else "needs Triton"
    return "needs a GPU" if not device.startswith("cuda") and point.key["work"] != "copy" else ""


def figures(torch: Any, builder: Builder, point: Point, repeats: int) -> dict[str, Any]:
    """The figures of a point's line. Raises NeverTogether where the two never ran at once."""
    repeats = min(repeats, MOST_REPEATS)
    if point.family == "held_sms":
        product = Point("grouped_gemm", point.key, point.size, point.kernel, extra=point.extra)
        return _held(torch, builder.case(product).run, int(point.key["held"]), repeats, point.extra)
    given = point.extra["product"]
    product = Point("grouped_gemm", given["key"], given["size"], point.kernel, extra=point.extra)
    copy = Point("ceiling", {"name": str(point.key["work"])}, point.size, str(point.key["work"]))
    run = builder.case(product).run
    both = beside.measure(
        torch, torch.device(builder.device), builder.case(copy, keep=True).run, run, repeats=repeats,
        pace=beside.Pace(),
    )  # fmt: skip
    return {
        **statistics_of(both.beside_s), "values": both.slowdowns(),
        "extra": {
            **point.extra, "alone": statistics_of(both.alone_s), "product_beside": statistics_of(both.product_beside_s),
        },
    }  # fmt: skip


def _held(torch: Any, run: Callable[[], object], held: int, repeats: int, extra: dict[str, Any]) -> dict[str, Any]:
    """The products alone, and while a kernel that does nothing holds some multiprocessors."""
    from profiles.spin import Spinner

    try:
        spinner = Spinner(torch, held)
    except Exception as failure:  # whatever Triton raises where it cannot compile
        raise RuntimeError(f"Triton: {failure}") from None

    def timed() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3

    run()
    torch.cuda.synchronize()
    alone = [timed() for _ in range(repeats)]
    slowed = []
    for _ in range(repeats):
        spinner.hold(HOLD * median(alone) + 1e-3)
        seconds = timed()
        if not spinner.done():  # else it was held for a part only
            slowed.append(seconds)
        torch.cuda.synchronize()
    if not slowed:
        raise beside.NeverTogether(
            "the multiprocessors were free again too early", where="profile kernels", mend="run again"
        )
    return {
        **statistics_of(slowed),
        "extra": {**extra, "alone": statistics_of(alone), "slowdown": median(slowed) / median(alone)},
    }
