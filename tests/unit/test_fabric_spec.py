"""LAB.yaml: what is refused, in one line with the key; the labs that ship; the commands that make a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from moesim import cli
from moesim.errors import BadInput
from validate.fabric import net as fabric_net
from validate.fabric.calibrate import FAR, NEAR, Figures, figures_of, read, same_fabric
from validate.fabric.lab import cases_of, labs_of
from validate.fabric.spec import LabSpec, bundled, read_lab

LAB: dict[str, Any] = {"name": "lab", "nodes": 2, "ranks_per_node": 2, "nic_bits_per_s": 1e8}


def written(folder: Path, **more: Any) -> Path:
    path = folder / "lab.yaml"
    path.write_text(yaml.safe_dump(LAB | more))
    return path


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"nodes": 0}, "nodes: Input should be greater than or equal to 1"),
        ({"nodes": 1, "ranks_per_node": 1}, "1 ranks: use 2 to 32"),
        ({"nodes": 9, "ranks_per_node": 4}, "36 ranks: use 2 to 32"),
        ({"nics_per_node": 3}, "2 ranks do not share 3 NICs evenly"),
        ({"slow_nics": [{"node": 2, "bits_per_s": 5e7}]}, "there is no NIC 0 of node 2"),
        ({"slow_nics": [{"node": 1, "bits_per_s": 2e8}]}, "faster than nic_bits_per_s"),
        ({"slow_nics": [{"node": 1, "bits_per_s": 5e7}] * 2}, "named twice"),
        ({"dead_link": {"node": 0, "nic": 1}}, "there is no NIC 1 of node 0"),
        ({"nodes_per_leaf": 3}, "do not fill leaves of 3"),
        ({"spine_bits_per_s": 1e8}, "one leaf needs no spine"),
        ({"nodes_per_leaf": 1, "spine_bits_per_s": 2e8}, "more than the NICs of a leaf"),
        ({"bytes_per_rank": 10_000, "row_bytes": 4096}, "fewer rows"),
        ({"nodes": 3}, "routed.experts (64) do not divide by 6 ranks"),
        ({"routed": {"layer": 3}}, "layer names one of the loads"),
        ({"patterns": ["even", "even"]}, "a pattern is named twice"),
        ({"patterns": []}, "nothing to exchange"),
        ({"concurrent": [["even"]]}, "concurrent.0"),
        ({"nic_bits_per_s": float("nan")}, "nic_bits_per_s"),
        ({"nic_bits_per_s": 1e12}, "nic_bits_per_s"),
        ({"speed": 3}, "unknown key"),
        ({"name": "Lab A"}, "name"),
        ({"row_bytes": 2050}, "row_bytes"),
    ],
)
def test_a_bad_lab_is_one_line_with_its_key(
    tmp_path: Path, more: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, **more)
    assert cli.run(["validate", "fabric", str(path)]) == 2
    said = capsys.readouterr().err
    assert words in said and str(path) in said and said.count("\n") == 1


@pytest.mark.parametrize("text", ["[1, 2]", "name: [", "", "\x00"])
def test_what_is_no_lab_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "lab.yaml"
    path.write_text(text)
    with pytest.raises(BadInput, match=r"lab\.yaml"):
        read_lab(str(path))


def test_an_unknown_name_lists_the_labs_that_ship(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="own-2x2"):
        read_lab("own-9x9")
    with pytest.raises(BadInput, match="cannot read"):
        read_lab(str(tmp_path / "none.yaml"))


def test_eight_fabrics_and_more_ship_and_none_of_them_calibrates() -> None:
    labs = labs_of((), quick=False, repeats=None, loads=None, layer=None)
    assert len(labs) >= 8 and [lab.name for lab in labs] == bundled()
    assert {lab.nodes for lab in labs} == {2, 3, 4}
    assert any(lab.slow_nics for lab in labs) and any(lab.delay_s == 0.005 for lab in labs)
    assert any(lab.spine_bits_per_s and not lab.rails for lab in labs) and any(lab.rails for lab in labs)
    assert {lab.nics_per_node < lab.ranks_per_node for lab in labs} == {True, False}
    for lab in labs:
        assert len(lab.patterns) == 4 and not same_fabric(lab)
        assert sum(len(case.patterns) == 1 for case in cases_of(lab)) == 8


def test_labs_must_differ_and_not_calibrate(tmp_path: Path) -> None:
    path = str(written(tmp_path))
    with pytest.raises(BadInput, match="two labs are called"):
        labs_of((path, path), quick=False, repeats=None, loads=None, layer=None)
    same = written(tmp_path, nodes=3, nics_per_node=2, nic_bits_per_s=FAR.nic_bits_per_s, routed={"experts": 66})
    with pytest.raises(BadInput, match="a fabric that calibrates"):
        labs_of((str(same),), quick=False, repeats=None, loads=None, layer=None)


def test_quick_keeps_a_row_for_every_rank() -> None:
    (lab,) = labs_of(("own-4x2",), quick=True, repeats=3, loads=None, layer=None)
    assert lab.repeats == 3 and lab.row_bytes * lab.ranks <= lab.bytes_per_rank <= 400_000


def test_leaves_rates_and_nics() -> None:
    rails = LabSpec(**LAB | {"ranks_per_node": 4, "nics_per_node": 2, "rails": True})
    assert [rails.nic(rank) for rank in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert [rails.leaf(node, nic) for node in range(2) for nic in range(2)] == [0, 1, 0, 1]
    assert rails.nics_per_leaf == 2 and rails.uplink_bits_per_s == 2e8
    split = LabSpec(**LAB | {"nodes": 4, "nodes_per_leaf": 2, "slow_nics": [{"node": 3, "bits_per_s": 5e7}]})
    assert [split.leaf(node, 0) for node in range(4)] == [0, 0, 1, 1] and split.leaves == 2
    assert [split.rate(node, 0) for node in range(4)] == [1e8, 1e8, 1e8, 5e7]


def test_every_nic_is_limited_both_ways_and_slow_ones_more() -> None:
    lab = LabSpec(
        **LAB
        | {"nodes": 4, "nodes_per_leaf": 2, "spine_bits_per_s": 1e8, "slow_nics": [{"node": 3, "bits_per_s": 5e7}]}
    )
    shaped = dict(fabric_net.shaping(lab, netem=False))
    assert "rate 50000000bit" in shaped["node3"][0] and "rate 100000000bit" in shaped["node0"][0]
    devices = [line.split()[3] for line in shaped[fabric_net.SWITCHES]]
    assert list(dict.fromkeys(devices)) == ["p0-0", "p1-0", "p2-0", "p3-0", "up0", "down0", "up1", "down1"]
    lines = fabric_net.switch_lines(lab)
    assert sum("type bridge" in line for line in lines) == 3  # two leaves and the spine
    assert not any("netem" in line for line in shaped[fabric_net.SWITCHES])
    late = dict(fabric_net.shaping(lab.model_copy(update={"delay_s": 0.005}), netem=True))[fabric_net.SWITCHES]
    delays = [line.split()[3:6] for line in late if "netem delay 5000us" in line]
    assert delays == [[f"p{node}-0", "parent", f"2:{which}"] for node in range(4) for which in (1, 2)]


def test_acknowledgements_alone_overtake_data() -> None:
    rate, parent, acks, data, tell, *queues = fabric_net.limited("nic0", 1e8, 10**6)
    assert "tbf rate 100000000bit" in rate and parent.endswith(f"htb default {fabric_net.DATA}")
    order = [int(line.split()[-1]) for line in (acks, data)]
    assert order == [1, 2] and [line.split("classid ")[1].split()[0] for line in (acks, data)] == ["2:1", "2:2"]
    mask = int(tell.split("match u16 0 ")[1].split()[0], 16)
    assert tell.endswith("at 2 flowid 2:1")  # the length of an IPv4 packet lies at its bytes 2 and 3 (RFC 791)
    # IPv4 and TCP with timestamps, no data; one row of data; the largest packet before it is cut.
    assert [length & mask == 0 for length in (52, 52 + 256, fabric_net.GSO_BYTES)] == [True, False, False]
    assert all(line.endswith("bfifo limit 1000000") for line in queues) and len(queues) == 2


def test_queues_hold_every_window() -> None:
    far = LabSpec(**LAB | {"delay_s": 0.02})
    words = fabric_net.tbf("nic0", 1e8, fabric_net.queue_bytes(far)).split()
    assert int(words[words.index("limit") + 1]) >= 4 * 4 * fabric_net.window_bytes(far)
    assert fabric_net.window_bytes(LabSpec(**LAB)) == fabric_net.LEAST_WINDOW_BYTES
    assert fabric_net.window_bytes(far) > 2 * 1e8 / 8 * 0.04  # more than twice what the way there and back holds
    assert int(words[words.index("burst") + 1]) >= fabric_net.GSO_BYTES


def test_figures_come_back_from_times_made_of_them() -> None:
    from validate.fabric.calibrate import LARGE, SMALL, _away
    from validate.fabric.predict import payload

    near = [_away(NEAR, size) * NEAR.ranks / 2e9 + 30 * 5e-5 for size in (SMALL, LARGE)]
    far = [_away(FAR, size) / payload(FAR.nic_bits_per_s, 1500) + 1e-3 for size in (SMALL, LARGE)]
    found = figures_of({NEAR.name: near, FAR.name: far})
    assert found.message_s == pytest.approx(5e-5) and found.copy_bytes_per_s == pytest.approx(2e9)
    assert found.wire == pytest.approx(1.0)


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", '{"kind": "other"}', '{"kind": "validate-fabric-calibration", "figures": {"message_s": 1}}',
        '{"kind": "validate-fabric-calibration", "figures": {"message_s": -1, "copy_bytes_per_s": 1, "wire": 1}}',
        '{"kind": "validate-fabric-calibration", "figures": {"message_s": 0, "copy_bytes_per_s": 0, "wire": 1}}',
    ],
)  # fmt: skip
def test_a_damaged_calibration_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(text)
    with pytest.raises(BadInput, match=r"calibration\.json"):
        read(path)
    assert Figures(0.0, 1.0, 1.0).copy_bytes_per_s == 1.0
