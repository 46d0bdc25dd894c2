"""What `validate exchange` writes and prints: predictions, the record, its table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moesim.files import write_json
from moesim.units import MIB, MILLI
from profiles.collective_work import ELEMENT_BYTES
from profiles.groups import in_hosts
from profiles.traffic import Floats, Ints, endpoint
from validate.compare import (
    BLOCKS,
    mape,
    order_beyond,
    pair_ordering,
    rank_correlation,
    signed_error,
    split_half,
    spread_of_medians,
)
from validate.foretold import now, write_predictions

if TYPE_CHECKING:
    from validate.exchange.run import ExchangeJob


def keep_predictions(path: Path, job: ExchangeJob, predicted: dict[str, Any]) -> dict[str, Any]:
    """Write the predictions; returns them with the file's time and hash, for the record."""
    cases = [
        {"case": case.name, "seconds": seconds, "even_bytes_alike": alike}
        for case, seconds, alike in zip(job.cases, predicted["seconds"], predicted["even_bytes_alike"], strict=True)
    ]
    told = {name: predicted[name] for name in ("both_ways", "together", "tag")}
    return {**predicted, "predictions": write_predictions(path, {"cases": cases, **told})}


def record_of(
    job: ExchangeJob, counts: Sequence[Ints], hosts: Sequence[int], written: dict[str, Any], begun: str,
    samples: Floats, run: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Compare, write record.json, and return it. samples: [cases, repeats]."""
    predicted = np.asarray(written["seconds"])
    low, measured, high = np.quantile(samples, (0.1, 0.5, 0.9), axis=1)
    spread = spread_of_medians(samples)
    errors = signed_error(predicted, measured)
    same = [0] * len(job.cases)
    comparison = {
        "error": {
            "median": float(np.median(np.abs(errors))), "mean": mape(predicted, measured),
            "largest": float(errors[np.abs(errors).argmax()]), "mean_signed": float(errors.mean()),
        },
        "span": float(measured.max() / measured.min()),
        "beyond_twice_the_spread": asdict(order_beyond(predicted, measured, spread)),
        "beyond_chance": asdict(pair_ordering(predicted, samples, same)),
        "rank_correlation": rank_correlation(predicted, measured),
        "split_half": asdict(split_half(samples, np.random.default_rng([job.seed, 3]))),
    }  # fmt: skip
    cases = [
        {
            "case": case.name, **endpoint(counts[index] * ELEMENT_BYTES, hosts),
            "bytes_by_rank": (counts[index] * ELEMENT_BYTES).tolist(), "predicted_s": float(predicted[index]),
            "median_s": float(measured[index]), "p10_s": float(low[index]), "p90_s": float(high[index]),
            "spread_s": float(spread[index]), "error": float(errors[index]), "samples_s": samples[index].tolist(),
        }
        for index, case in enumerate(job.cases)
    ]  # fmt: skip
    record = {
        "schema_version": 1, "kind": "validate-exchange", "date": now(), "backend": job.backend,
        "ranks": len(hosts), "hosts": len(set(hosts)), "bytes": job.size, "repeats": job.repeats, "seed": job.seed,
        "profile": Path(job.profile).name if job.profile else "measured before, on the spot", "run": run,
        "both_ways": written["both_ways"], "together": written["together"],
        "tag": written["tag"], "predictions": written["predictions"],
        "measured_from": begun, "cases": cases, "comparison": comparison,
    }  # fmt: skip
    write_json(Path(job.out) / "record.json", record, indent=1)
    return record


def holds(record: dict[str, Any]) -> bool:
    """Whether every pair that differs by more than twice the spread was foretold; so it is where there is none."""
    pairs = record["comparison"]["beyond_twice_the_spread"]
    return bool(pairs["agreed"] == pairs["decided"])


def table(record: dict[str, Any]) -> str:
    """The record for a person."""
    compared = record["comparison"]
    error, pairs, chance, half = (
        compared[name] for name in ("error", "beyond_twice_the_spread", "beyond_chance", "split_half")
    )
    lines = [
        f"uneven all-to-all, {record['backend']}, {record['ranks']} ranks on {in_hosts(record['hosts'])}, "
        f"{record['bytes'] / MIB:.1f} MiB a rank in every case, {record['repeats']} repeats; {record['run']['device']}",
        f"predictions written {record['predictions']['written']}, measured from {record['measured_from']}; profile: "
        f"{record['profile']} (even, kept and one-way exchanges)",
        f"of a rank's less busy direction {record['both_ways']:.2f} adds to its time, of the others' copies "
        f"{record['together']:.2f} to its own",
        "",
        f"{'case':<32}{'predicted':>11}{'measured':>11}  {'[p10 to p90]':<18}{'spread':>8}{'error':>8}   ms",
    ]
    for case in sorted(record["cases"], key=lambda one: float(one["median_s"])):
        between = f"[{case['p10_s'] / MILLI:.2f} to {case['p90_s'] / MILLI:.2f}]"
        lines.append(
            f"{case['case']:<32}{case['predicted_s'] / MILLI:>11.2f}{case['median_s'] / MILLI:>11.2f}  {between:<18}"
            f"{case['spread_s'] / MILLI:>8.2f}{case['error']:>+8.0%}"
        )
    judged = (
        f"{pairs['agreed']} of {pairs['decided']} ordered right" if pairs["decided"] else "none, so no order is judged"
    )
    reliability, rank = ("-" if half[name] is None else f"{half[name]:.3f}" for name in ("reliability", "rank"))
    return "\n".join(
        [
            *lines,
            "",
            f"the slowest case takes {compared['span']:.1f} times as long as the quickest; absolute error: median "
            f"{error['median']:.1%}, mean {error['mean']:.1%}, largest {error['largest']:+.1%}",
            f"pairs that differ by more than twice the spread (p90 - p10 of the medians of {BLOCKS} runs of repeats): "
            f"{judged} ({pairs['pairs'] - pairs['decided']} differ less)",
            f"pairs that differ by more than chance (sign test, 10 %): {chance['agreed']} of {chance['decided']}",
            f"rank correlation of predicted and measured: {compared['rank_correlation']:.3f}",
            f"the ceiling: halves of the repeats differ by {half['gap']:.1%}, their ranks correlate by {rank}, "
            f"split-half reliability {reliability}",
        ]
    )
