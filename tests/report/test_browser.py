"""The report in headless Chromium: nothing sticks out at desktop or phone width, and a picture can be taken."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from bench_builders import page as leaderboard
from loku.report.html import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome found; install one to run the browser tests"),
]

# Chromium's own windows are never narrower than 500 px, so the page stands in a frame of the wanted width. The script
# stands in this copy only.
MEASURE = """<script>addEventListener("load", () => {
document.querySelectorAll("details").forEach(item => item.open = true);
parent.postMessage(document.documentElement.scrollWidth, "*")})</script></body>"""
FRAME = """<!doctype html><body style="margin:0">
<script>addEventListener("message", event => document.title = "width " + event.data)</script>
<iframe src="{page}" style="border:0;width:{width}px;height:1200px"></iframe>"""


def browse(folder: Path, *arguments: str) -> str:
    assert BROWSER is not None
    profile = f"--user-data-dir={folder / 'profile'}"
    done = subprocess.run(
        [BROWSER, *FLAGS, profile, *arguments], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("kind", ["run", "recorded run", "comparison", "benchmark"])
def test_nothing_sticks_out(
    make_run: Callable[..., Path], make_record: Callable[[Path], Path], tmp_path: Path, width: int, kind: str
) -> None:
    if kind == "benchmark":
        report = leaderboard(tmp_path, 24)
    else:
        runs = [make_run(method) for method in (("ga", "npo", "ihl", "loku") if kind == "comparison" else ("loku",))]
        if kind == "recorded run":
            make_record(runs[0])
        report = write_report(runs, tmp_path / "report.html")
    (tmp_path / "copy.html").write_text(report.read_text().replace("</body>", MEASURE))
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(page="copy.html", width=width))
    page = browse(tmp_path, "--virtual-time-budget=4000", "--dump-dom", "--window-size=1300,1200", frame.as_uri())
    found = re.search(r"<title>width (\d+)</title>", page)
    assert found, page[:500]
    assert int(found.group(1)) == width


@pytest.mark.parametrize("width", [1280, 390])
def test_picture(make_run: Callable[..., Path], tmp_path: Path, width: int) -> None:
    write_report([make_run()], tmp_path / "report.html")
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(page="report.html", width=width))
    picture = tmp_path / "report.png"
    browse(tmp_path, f"--screenshot={picture}", f"--window-size={max(width, 500)},1200", frame.as_uri())
    header = picture.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(header[16:20], "big") == max(width, 500)
    assert picture.stat().st_size > 20_000  # a blank page takes a few kB
