"""Any text in a cluster file is either a cluster or one line of BadInput."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import BadInput
from moesim.spec.presets import load_cluster

SOUND = (Path(__file__).resolve().parents[2] / "moesim" / "spec" / "clusters" / "h200_sxm.yaml").read_text(
    encoding="utf-8"
)


def outcome(content: bytes) -> None:
    """Load `content` as a cluster file; whatever is raised must be one line that names the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cluster.yaml"
        path.write_bytes(content)
        try:
            cluster = load_cluster(path)
        except BadInput as error:
            assert "cluster.yaml" in error.line()
            assert "\n" not in error.line()
        else:
            assert cluster.gpus > 0
            assert cluster.gpu.peak("fp8_block") > 0


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_lines(data: st.DataObject) -> None:
    lines = SOUND.splitlines()
    for _ in range(data.draw(st.integers(1, 3))):
        index = data.draw(st.integers(0, len(lines) - 1))
        kind = data.draw(st.sampled_from(["drop", "twice", "cut", "value"]))
        if kind == "drop":
            lines[index] = ""
        elif kind == "twice":
            lines.insert(index, lines[index])
        elif kind == "cut":
            lines[index] = lines[index][: data.draw(st.integers(0, len(lines[index])))]
        else:
            key = lines[index].partition(":")[0]
            lines[index] = (
                f"{key}: {data.draw(st.sampled_from(['-1', '0', 'x', '.nan', '.inf', '[1]', '{a: 1}', '1e400', '']))}"
            )
    outcome("\n".join(lines).encode())


@settings(max_examples=50, deadline=None)
@given(content=st.binary(max_size=60))
def test_random_bytes(content: bytes) -> None:
    outcome(content)
