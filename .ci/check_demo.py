"""Check what `make demo` left behind: every named output, loadable by the engines' own rules, and no torch."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import yaml

CORE_INSTALL_BYTES = 900e6
SEARCH_S = 60.0


def main() -> None:
    """Exit with one line for the first thing that is wrong."""
    run, venv = Path(sys.argv[1]), Path(sys.argv[2])
    plan = yaml.safe_load((run / "plan.yaml").read_text())
    assert plan["verdict"]["text"], "the plan carries no verdict"
    page = (run / "report.html").read_text()
    assert page.rstrip().endswith("</html>") and len(page) > 10_000, "the report is not a whole page"
    with gzip.open(run / "timeline.json.gz", "rt") as stream:
        assert len(json.load(stream)["traceEvents"]) > 1000, "the timeline is empty"
    result = json.loads((run / "result.json").read_text())
    slots = result["best"]["redundant_experts"] + 256
    maps = list((run / "sglang").glob("*.json"))
    assert maps, "no SGLang map"
    table = json.loads(maps[0].read_text())
    assert list(table) == ["physical_to_logical_map"], "SGLang takes one key only"
    assert len(table["physical_to_logical_map"]) == 61, "SGLang wants one row for each absolute layer"
    assert all(len(row) == slots for row in table["physical_to_logical_map"]), "the SGLang map has the wrong slots"
    maps = [path for path in (run / "trtllm").iterdir() if "num_slots" in path.read_text()]
    assert maps, "no TensorRT-LLM map"
    assignments = yaml.safe_load(maps[0].read_text())
    assert len(assignments["initial_global_assignments"]) == 58, "TensorRT-LLM wants one entry for each MoE layer"
    torch = subprocess.run([venv / "bin/python", "-c", "import torch"], capture_output=True, check=False)
    assert torch.returncode != 0, "the demo's environment holds torch"
    size = sum(path.stat().st_size for path in venv.rglob("*") if path.is_file() and not path.is_symlink())
    assert size <= CORE_INSTALL_BYTES, f"the core install takes {size / 1e6:.0f} MB"
    assert result["run"]["search_s"] <= SEARCH_S, f"the search took {result['run']['search_s']:.0f} s"
    print(f"demo: {result['trials']} trials in {result['run']['search_s']:.1f} s, install {size / 1e6:.0f} MB")
    print(result["verdict"]["text"])


if __name__ == "__main__":
    main()
