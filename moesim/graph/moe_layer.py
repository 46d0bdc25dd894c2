"""How each schedule lays out the tasks of one MoE layer. Streams run their tasks in the order added here.

docs/explanation/schedules.md draws each. Sources: `pipeline`: Tutel (arXiv:2206.03382, adaptive pipelining) and
FasterMoE (PPoPP 2022, smart scheduling). `shared_overlap`: Megatron-Core, `moe_shared_expert_overlap` (its shared
expert runs up to the activation beside the dispatch, and down beside the combine). `shortcut`: ScMoE
(arXiv:2404.05019). `whole_graph` changes what the host does and when it can, not the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from moesim.graph.step_builder import StepBuilder

MoeLayer = Callable[[StepBuilder, int], None]


def plain(build: StepBuilder, row: int) -> None:
    """Everything after the thing before it: attention, gate, shared expert, dispatch, experts, combine."""
    build.attend()
    build.gate(row)
    if build.has("shared"):
        build.compute("shared expert", "shared_expert", "shared")
    experts = build.experts(row, after=build.dispatch(row))
    build.combine(row, experts)
    _gather(build)


def pipelined(build: StepBuilder, row: int) -> None:
    """The layer's tokens in equal chunks: while one chunk computes, the next is dispatched and the last combined.

    All dispatches go before all combines on the communication stream, so that the experts never wait for a combine.
    """
    build.attend()
    build.gate(row)
    if build.has("shared"):
        build.compute("shared expert", "shared_expert", "shared")
    ready, chunks = build.last, build.priced.chunks
    sent = [build.dispatch(row, after=ready) for _ in range(chunks)]
    done = [build.experts(row, after=of, final=chunk == chunks - 1) for chunk, of in enumerate(sent)]
    for experts in done:
        build.combine(row, experts)
    _gather(build)


def shared_beside(build: StepBuilder, row: int) -> None:
    """The shared expert computes while tokens travel: up beside the dispatch, down beside the combine."""
    build.attend()
    gate = build.gate(row)
    arrived = build.dispatch(row)
    up_s, down_s = build.shared_halves()
    up = build.compute("shared expert up", "shared_expert", up_s, after=(gate,))
    combined = build.combine(row, build.experts(row, after=arrived))
    down = build.compute("shared expert down", "shared_expert", down_s, after=(up,))
    build.last = (*combined, down)
    _gather(build)


def shortcut(build: StepBuilder, row: int) -> None:
    """The experts get what the layer before put out: they are dispatched before attention and travel beside it.

    The shared expert, which reads this layer's attention, runs beside the combine.
    """
    before = build.last
    build.gate(row)
    arrived = build.dispatch(row)
    build.last = before
    build.attend()
    beside = build.last
    combined = build.combine(row, build.experts(row, after=arrived))
    if build.has("shared"):
        beside = (build.compute("shared expert", "shared_expert", "shared", after=beside),)
    build.last = (*combined, *beside)
    _gather(build)


def _gather(build: StepBuilder) -> None:
    if build.has("gather"):
        build.meet_tp("gather", "gather")


LAYERS: Mapping[str, MoeLayer] = {
    "sequential": plain,
    "two_batch": plain,
    "pipeline": pipelined,
    "shared_overlap": shared_beside,
    "shortcut": shortcut,
    "whole_graph": plain,
}
