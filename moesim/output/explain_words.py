"""An explained step in words, shared by the terminal and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moesim.units import human_bytes, human_seconds

WHAT_IFS = {
    "perfect_balance": "with perfect balance",
    "infinite_network": "with an infinite network",
    "perfect_overlap": "with perfect overlap",
    "no_host_overhead": "without host overhead",
}
# Waits below this share of a step are not worth a name.
FEW = 0.005
_WAITED_FOR = 3
_ABOUT_AS_LATE = 0.9
_NAMED_RANKS = 8
_ONE_PERCENT = 0.005  # what rounds to 0 %


def title(step: Mapping[str, Any]) -> str:
    """`A typical decode step: 24 ms, 12 tokens a rank; decode steps are 17 % of the time`."""
    readers = step["reading_ranks"]
    ranks = len(step["waited_s"])
    batch = f"{step['tokens_per_dp_rank']:.3g} tokens on a mean attention-DP rank"
    if step["kind"] == "prefill":
        batch += f", prompts on {readers} of them"
    role = step.get("role")
    where, whose = ("", "") if role is None else (f" of the {role} role", f" of {role}")
    stages = step.get("stages", 1)
    through = "" if stages == 1 else f" in {stages} stages"
    return (
        f"A {step['which']} {step['kind']} step{where} on {ranks} GPUs{through}: {human_seconds(step['step_s'])} "
        f"({batch}); "
        f"{step['kind']} steps are {step['share_of_time']:.0%} of the step time{whose}"
    )


TRANSFER_WHAT_IFS = {
    "free_transfer": "with a transfer that takes no time",
    "by_layer": "with layers leaving as they are read",
    "after_the_prompt": "with the cache leaving when the prompt is read",
}


def transfer_summary(found: Mapping[str, Any]) -> list[str]:
    """Sentences on KV cache moving between roles: bytes, time, share of TTFT, the busiest NICs, what-ifs."""
    moved = found["transfer_s"]
    hidden = f", {human_seconds(found['hidden_s'])} of it while prompts are read" if found["hidden_s"] > 0 else ""
    sent, received = found["sent_bytes_by_rank"], found["received_bytes_by_rank"]
    what_ifs = "; ".join(
        f"{TRANSFER_WHAT_IFS[name]} {human_seconds(one['ttft_s'])} ({saved(one['saves'])})"
        for name, one in found["what_if"].items()
        if name in TRANSFER_WHAT_IFS
    )
    return [
        f"KV transfer: {found['requests']} requests moved {human_bytes(found['bytes'])} "
        f"({human_bytes(found['bytes_per_request'])} each) and waited {human_seconds(moved['mean'])} for it in the "
        f"mean, p99 {human_seconds(moved['p99'])}: {found['share_of_ttft']:.0%} of the time to the first token. A "
        f"NIC takes {human_seconds(found['alone_s'])}{hidden}; {human_seconds(found['waited_for_nics_s'])} is waiting "
        f"for NICs that move other requests.",
        f"The busiest sender moved {_share(sent)}, the busiest receiver {_share(received)}. Mean time to the first "
        f"token {human_seconds(found['ttft_s'])}; {what_ifs}.",
    ]


def _share(by_rank: Sequence[float]) -> str:
    top = max(range(len(by_rank)), key=lambda rank: by_rank[rank])
    return f"{by_rank[top] / max(sum(by_rank), 1.0):.0%} of the bytes (rank {top} of {len(by_rank)})"


def summary(step: Mapping[str, Any]) -> list[str]:
    """Sentences: exposed communication, who waits for whom and for what, the hottest rank and expert."""
    whole = step["step_s"]
    stages = step.get("stages", 1)
    exposed = _mean(step["exposed_communication_s"]) * stages
    waited = _mean(step["waited_s"]) * stages
    where = "" if stages == 1 else f" over the {stages} stages, while they have the batch"
    lines = [
        f"The mean rank's compute stream stands still for {human_seconds(exposed)} ({exposed / whole:.0%}){where}; "
        f"{human_seconds(waited)} of waiting for other ranks ({waited / whole:.0%})."
    ]
    by_operation = sorted(
        ((name, _mean(by) * stages) for name, by in step["waited_for_operation_s"].items()), key=lambda item: -item[1]
    )
    if waited > FEW * whole and sum(step["waited_for_rank_s"]) > 0:
        named = ", ".join(
            f"{name.replace('_', ' ')} {seconds / waited:.0%}" for name, seconds in by_operation[:_WAITED_FOR]
        )
        lines.append(f"Waited for: {named}; {_late(step['waited_for_rank_s'])}.")
    if step["layers"]:
        hot = max(step["layers"], key=lambda layer: float(layer["slowest_over_mean"]))
        load = max(step["layers"], key=lambda layer: float(layer["rank_over_mean"]))
        of_stage = "" if stages == 1 else " of its stage"
        slots = f"{load['replicas']} slot{'s' if load['replicas'] > 1 else ''}"
        lines.append(
            f"Hottest: layer {load['layer']}, rank {load['rank']}{of_stage} with {load['rank_over_mean']:.2f} times "
            f"the mean tokens (expert {load['expert']}: {load['expert_over_mean']:.1f} times the mean expert, {slots})"
            f"; longest experts: layer {hot['layer']}, rank {hot['slowest_rank']}{of_stage}, "
            f"{hot['slowest_over_mean']:.2f} times the mean."
        )
    return lines


def saved(share: float) -> str:
    """`−24 %`; `+3 %` for a change that costs more."""
    return f"{'−' if share >= 0 else '+'}{'under 1' if 0 < abs(share) < _ONE_PERCENT else round(abs(share) * 100)} %"


def _late(by_rank: Sequence[float]) -> str:
    """`98 % of it for ranks 0, 1 and 2`: the latest rank and those about as late."""
    late = [rank for rank, seconds in enumerate(by_rank) if seconds >= _ABOUT_AS_LATE * max(by_rank)]
    share = sum(by_rank[rank] for rank in late) / sum(by_rank)
    if len(late) > _NAMED_RANKS:
        return f"{share:.0%} of it for {len(late)} ranks"
    return f"{share:.0%} of it for rank{'s' if len(late) > 1 else ''} {', '.join(map(str, late))}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
