"""`moesim profile fit-network`: alpha and beta of a cluster's links from measured collectives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option, echo


def fit_network(
    profile: Annotated[str, Argument(help="`default` or a profile folder with collectives.")] = "default",
    system: Annotated[str, Option("--system", help="Cluster preset, and whose shipped profile `default` means.")] = (
        "h200_sxm"
    ),
    cluster_file: Annotated[
        Path | None, Option("--cluster", help="Cluster file to start from, instead of a preset.")
    ] = None,
    nodes: Annotated[int, Option("--nodes", min=1, help="Nodes of the preset.")] = 1,
    path: Annotated[str, Option("--path", help="Which collectives: nccl, oneccl, custom or gloo.")] = "nccl",
    out: Annotated[Path | None, Option("--out", help="Cluster file to write, with the fitted figures in it.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Fit latency and rate of NVLink, PCIe and NICs to measured collectives, and write a cluster file with them."""
    import yaml

    from moesim.errors import BadInput
    from moesim.files import write_text
    from moesim.spec.presets import load_cluster
    from moesim.spec.scenario import ClusterChoice
    from profiles.alpha_beta import FIGURES, fit_levels, groups_of, measured_cluster
    from profiles.importers.gathered import UNKNOWN
    from profiles.store import open_profile

    base = load_cluster(cluster_file if cluster_file is not None else ClusterChoice(system=system, nodes=nodes))
    opened = open_profile(profile, system)
    table = opened.table("collective")
    groups = groups_of(table, path)
    if not groups:
        raise BadInput(f"no collectives over {path}", where=f"profile {opened.folder.name}", mend="use another --path")
    ran = sorted(set(table.filter(table["path"] == path)["device"]) - {UNKNOWN})
    if ran and base.gpu.name not in ran:
        echo(f"note: measured on {', '.join(ran)}, and {base.name} has {base.gpu.name}", err=True)
    fitted = fit_levels(groups, base)
    found = [_told(one) for one in fitted]
    if out is not None:
        versions = sorted({group.version for group in groups})
        source = f"fitted by `moesim profile fit-network` to {path} collectives of profile {opened.folder.name}"
        content = measured_cluster(base, fitted, f"{source} (versions {', '.join(versions)})").model_dump(mode="json")
        if not any(content["node"].values()):
            del content["node"]
        for level in (one for one in fitted if one.level in FIGURES and not one.apart):
            name = FIGURES[level.level][0]
            echo(
                f"note: {level.level}: the latency holds the library's launch and is no link's, so {name} stays "
                f"{content[name]:.4g} s; measure all_gather or all_reduce over other numbers of "
                f"{'nodes' if level.level == 'nic' else 'GPUs'} to tell them apart",
                err=True,
            )
        write_text(out, yaml.safe_dump(content, sort_keys=False, width=120))
    if as_json:
        echo(json.dumps({"profile": str(opened.folder), "cluster": base.name, "path": path, "levels": found}))
        return
    for one in found:
        echo(_line(one))
    if out is not None:
        echo(f"wrote {out}")


def _told(one: Any) -> dict[str, Any]:
    """One level as numbers for JSON."""
    import numpy as np

    errors, left_out = np.abs(np.expm1(-one.residuals)), np.abs(np.expm1(-one.left_out))
    return {
        "level": one.level,
        "launch_s": one.launch_s if one.apart else None,
        "latency_s": one.latency_s,
        "bytes_per_s": one.bytes_per_s,
        "fill_s": one.fill_s,
        "rel_sigma": dict(zip(("launch_s", "latency_s", "bytes_per_s", "fill_s"), one.sigma, strict=True)),
        "groups": one.groups,
        "points": len(errors),
        "error": {"median": float(np.median(errors)), "p90": float(np.quantile(errors, 0.9))},
        "left_out_error": (
            {"median": float(np.median(left_out)), "p90": float(np.quantile(left_out, 0.9))} if len(left_out) else None
        ),
    }


def _line(one: dict[str, Any]) -> str:
    """One level for people."""
    sigma, error, left = one["rel_sigma"], one["error"], one["left_out_error"]
    parts = [
        "launch not told apart from latency"
        if one["launch_s"] is None
        else f"launch {one['launch_s'] * 1e6:.3g} us ±{sigma['launch_s']:.0%}",
        f"latency {one['latency_s'] * 1e6:.3g} us ±{sigma['latency_s']:.0%}",
        f"{one['bytes_per_s'] / 1e9:.4g} GB/s ±{sigma['bytes_per_s']:.0%}",
        f"fill {one['fill_s'] * 1e6:.3g} us",
    ]
    told = f"error over {one['points']} points: median {error['median']:.0%}, 90 % {error['p90']:.0%}"
    if left:
        told += f"; a collective and number of GPUs left out: median {left['median']:.0%}, 90 % {left['p90']:.0%}"
    return f"{one['level']}: {', '.join(parts)}; {told}"
