"""One honest sentence: does the plan pay, on loads that it was not fitted to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from placement.compare import HeldOut
from placement.judge import Figure

GAIN, TIE, DONT, MIXED, WITHHELD = "gain", "tie", "dont", "mixed", "withheld"


@dataclass(frozen=True)
class Verdict:
    """code: gain, tie, dont, mixed (depends on the tokens per rank) or withheld. text: the sentence."""

    code: str
    text: str

    def to_json(self) -> dict[str, str]:
        """Its two fields."""
        return {"code": self.code, "text": self.text}


def sign(gain: Figure) -> int:
    """1 where the whole interval is a gain, -1 where it is a loss, 0 for a tie (the interval holds 0)."""
    return 1 if gain.low > 0 else -1 if gain.high < 0 else 0


def withheld(reason: str) -> Verdict:
    """No verdict, because nothing was held out to judge on."""
    return Verdict(
        WITHHELD,
        f"Verdict withheld: {reason}. The figures above are on the loads that the map was fitted to and say nothing "
        "about others; give loads of several workloads (--loads) to get a verdict.",
    )


def on_balance(held: HeldOut, solver: str) -> Verdict:
    """Verdict on max/mean rank load, where there is no scenario to price time with."""
    gain, code = held.gain, {1: GAIN, 0: TIE, -1: DONT}[sign(held.gain)]
    workloads = f"{len(held.workloads)} workload{'s' if len(held.workloads) > 1 else ''} held out"
    interval = f"{gain.level:.0%} interval {gain.low:.1%} to {gain.high:.1%}, {workloads}"
    if code == GAIN:
        text = (
            f"Gain in balance: on loads it was not fitted to, {solver} leaves the hottest rank {gain.value:.1%} less "
            f"work than contiguous placement ({interval})."
        )
    elif code == TIE:
        text = (
            f"Tie: on loads it was not fitted to, {solver} cannot be told from contiguous placement "
            f"(gain in balance {gain.value:.1%}, {interval})."
        )
    else:
        text = (
            f"Don't: on loads it was not fitted to, {solver} gives the hottest rank {-gain.value:.1%} more work than "
            f"contiguous placement ({interval})."
        )
    if held.replicas is not None:
        text += f" {_replicas_balance(held.replicas)}"
    if len(held.workloads) == 1:
        text += " With one workload held out the interval tells the spread over layers only."
    return Verdict(code, f"{text} Balance is not time: give a scenario to judge step time.")


def _replicas_balance(gain: Figure) -> str:
    interval = f"{gain.value:.1%} ({gain.low:.1%} to {gain.high:.1%})"
    if sign(gain) > 0:
        return f"Against the same solver without replicas, the replicas gain {interval}."
    if sign(gain) < 0:
        return f"Against the same solver without replicas, the replicas lose {interval}: 0 replicas are better."
    return f"Against the same solver without replicas, nothing can be told ({interval}): 0 replicas suffice."


def on_step_time(
    gains: Mapping[int, Figure], replicas: Mapping[int, Figure], solver: str, *, judged: str, leans_on: str = ""
) -> Verdict:
    """Verdict on step time at several tokens per rank.

    gains: tokens per rank that run -> gain of the plan over contiguous, where both are priced; replicas: the same over
    the plan without replicas (empty where it has none). judged: which loads it was judged on. leans_on: a sentence on
    what the figures lean on. Without gains the verdict is withheld.
    """
    if not gains:
        text = "Verdict withheld: at no batch size that runs are the plan and contiguous placement both priced."
        more = [_replicas_time(replicas)] if replicas else []
        return Verdict(WITHHELD, " ".join([text, *more, *([leans_on] if leans_on else [])]))
    signs = {tokens: sign(gain) for tokens, gain in gains.items()}
    wins, losses = [t for t, s in signs.items() if s > 0], [t for t, s in signs.items() if s < 0]
    if wins and losses:
        code = MIXED
    elif wins:
        code = GAIN
    else:
        code = DONT if losses else TIE
    figures = ", ".join(f"{t}: {g.value:+.1%} ({g.low:+.1%} to {g.high:+.1%})" for t, g in gains.items())
    lead = {
        GAIN: f"Gain: {solver} shortens a step against contiguous placement at {tokens_list(wins)} tokens per rank",
        MIXED: (
            f"It depends: {solver} shortens a step at {tokens_list(wins)} tokens per rank "
            f"and lengthens it at {tokens_list(losses)}"
        ),
        TIE: f"Tie: {solver} cannot be told from contiguous placement in step time",
        DONT: f"Don't: {solver} lengthens a step at {tokens_list(losses)} tokens per rank",
    }[code]
    ties = [t for t, s in signs.items() if s == 0]
    if code in (GAIN, MIXED, DONT) and ties:
        lead += f", a tie at {tokens_list(ties)}"
    text = f"{lead} (gain in step time by tokens per rank, {judged}: {figures})."
    if replicas:
        text += f" {_replicas_time(replicas)}"
    if leans_on:
        text += f" {leans_on}"
    return Verdict(code, text)


def _replicas_time(gains: Mapping[int, Figure]) -> str:
    pays = [t for t, gain in gains.items() if sign(gain) > 0]
    lose = [t for t, gain in gains.items() if sign(gain) < 0]
    even = [t for t, gain in gains.items() if sign(gain) == 0]
    parts = []
    if pays:
        parts.append(f"pay at {tokens_list(pays)} tokens per rank")
    if lose:
        parts.append(f"make the step slower at {tokens_list(lose)}")
    if even:
        parts.append(f"change nothing that can be told at {tokens_list(even)}")
    advice = "" if pays else ": 0 replicas suffice there"
    return f"Against the same solver without replicas, the replicas {' and '.join(parts)}{advice}."


def tokens_list(tokens: list[int]) -> str:
    """`8, 32 and 128`."""
    words = [str(token) for token in tokens]
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)
