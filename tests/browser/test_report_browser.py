"""The report in headless Chromium: it lays out, its pictures are there, nothing overflows, nothing is complained of."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.output.report import write_run_report
from moesim.routing.trace import RoutingCounts
from moesim.spec.scenario import HoldoutSpec
from placement.page import place_page
from placement.planning import Asked, place
from profiles.check_page import Check, profile_page, tables_page
from profiles.check_tables import LeftOut
from tests.report_run import write_run_folder
from tests.silicon_rows import predictions
from validate.silicon.page import silicon_page
from validate.silicon.summary import summarized

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)
# Measured in the page: how wide it is, and each picture with the parts of it that lie outside.
PROBE = """<script>
const seen = [...document.querySelectorAll('svg[role=img]')].map(svg => {
  const box = svg.getBoundingClientRect();
  const out = [...svg.querySelectorAll('text, path, rect, circle, polygon, polyline')].filter(part => {
    const at = part.getBoundingClientRect();
    return at.left < box.left - 24 || at.right > box.right + 24 || at.top < box.top - 8 || at.bottom > box.bottom + 8;
  }).map(part => part.outerHTML.slice(0, 120));
  return {label: svg.getAttribute('aria-label'), width: box.width, height: box.height, out: out};
});
const texts = [...document.querySelectorAll('td, dd, h1, h2, p')].filter(one => one.scrollWidth > one.clientWidth + 1);
document.body.setAttribute('data-probe', JSON.stringify({
  page: document.documentElement.scrollWidth, window: innerWidth, pictures: seen,
  cut: texts.map(one => one.textContent),
}));
</script>"""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium here (looked for: " + ", ".join(NAMES) + ")")
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run_folder(tmp_path_factory.mktemp("browser") / "run")
    write_run_report(folder)
    return folder / "report.html"


def chromium(browser: str, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [browser, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def measured(browser: str, page: Path, tmp_path: Path, width: int) -> dict[str, Any]:
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text().replace("</body>", f"{PROBE}</body>"))
    done = chromium(browser, tmp_path, f"--window-size={width},900", "--dump-dom", probed.as_uri())
    found = re.search(r'data-probe="([^"]+)"', done.stdout)
    assert found is not None
    told: dict[str, Any] = json.loads(found.group(1).replace("&quot;", '"').replace("&lt;", "<").replace("&amp;", "&"))
    return told


def fits(told: dict[str, Any], pictures: int) -> None:
    assert told["page"] <= told["window"]
    assert len(told["pictures"]) >= pictures
    for picture in told["pictures"]:
        assert picture["width"] > 200, picture["label"]
        assert picture["height"] > 20, picture["label"]
        assert picture["out"] == [], picture["label"]
    assert told["cut"] == []


@pytest.mark.parametrize("width", [1440, 1280, 700])
def test_the_page_fits_its_window_and_its_pictures_hold_their_marks(
    browser: str, page: Path, tmp_path: Path, width: int
) -> None:
    fits(measured(browser, page, tmp_path, width), 12)


@pytest.mark.parametrize("width", [1280, 500])
def test_the_pages_of_a_profile_check_fit_as_well(browser: str, tmp_path: Path, width: int) -> None:
    rng = np.random.default_rng(3)
    found = [
        LeftOut(family, "h200_sxm", f"h200_sxm/{family}/a_long_name_of_a_table_perf", ours, 3 * ours, ours * 0 + 0.05,
                np.geomspace(1, 2**20, 200))
        for family in ("MoE", "GEMM", "attention prefill", "attention decode", "NCCL", "other")
        for ours in (rng.normal(0.0, 0.05, 200),)
    ]  # fmt: skip
    check = Check("every-second", "aiconfigurator-core 0.0", ("h200_sxm",), "2025-01-02", "moesim profile check")
    errors = {name: {"median": 0.02, "p68": 0.04, "p90": 0.3, "points": 9.0} for name in ("gemm", "exchange_normal")}
    for name, text, pictures in (
        ("tables", tables_page(found, check), 11),
        ("profile", profile_page(errors, dataclasses.replace(check, protocol="inner")), 1),
    ):
        page = tmp_path / f"{name}.html"
        page.write_text(text)
        fits(measured(browser, page, tmp_path, width), pictures)


@pytest.mark.parametrize("width", [1280, 500])
def test_the_page_of_measured_runs_fits_as_well(browser: str, tmp_path: Path, width: int) -> None:
    page = tmp_path / "silicon.html"
    page.write_text(silicon_page(summarized(predictions()), "rows.csv", "2025-01-02"))
    fits(measured(browser, page, tmp_path, width), 20)


@pytest.mark.parametrize("width", [1280, 500])
def test_the_page_of_a_placement_fits_as_well(browser: str, tmp_path: Path, width: int) -> None:
    rng = np.random.default_rng(0)
    shared, ids = rng.lognormal(0.0, 1.0, (40, 128)), np.arange(3, 43)
    loads = tuple(
        RoutingCounts(
            1e5 * shared * rng.lognormal(0.0, 0.3, (1, 40, 128)), ids, 43, f"a_workload_of_a_long_name_{n}" * 2
        )
        for n in range(5)
    )
    asked = Asked(loads, 16, 2, 144, 1, "greedy", HoldoutSpec(by="file"), 0)
    page = tmp_path / "place.html"
    page.write_text(place_page(place(asked)))
    fits(measured(browser, page, tmp_path, width), 7)


def test_the_console_stays_silent(browser: str, page: Path, tmp_path: Path) -> None:
    done = chromium(browser, tmp_path, "--window-size=1280,900", "--dump-dom", page.as_uri())
    assert 'id="verdict"' in done.stdout
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []


def test_the_probe_would_hear_a_complaint(browser: str, page: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text().replace("</body>", "<script>missing()</script></body>"))
    done = chromium(browser, tmp_path, "--dump-dom", broken.as_uri())
    assert any("CONSOLE" in line for line in done.stderr.splitlines())


def test_a_screenshot_shows_ink(browser: str, page: Path, tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    chromium(browser, tmp_path, "--window-size=1280,4600", f"--screenshot={picture}", page.as_uri())
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 100_000  # an empty page of this size packs into a few kilobytes
