"""The report in a real browser: every plot is drawn, nothing complains, nothing is loaded."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_report import comparison

from loratlas.train.report import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --virtual-time-budget=10000 --enable-logging=stderr --v=0 --dump-dom"
)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")


def browse(page: Path, *flags: str) -> tuple[str, list[str]]:
    """(the document after its scripts have run, what it wrote to the console); no host name resolves."""
    profile = f"--user-data-dir={page.parent / 'profile'}"
    command = [str(BROWSER), *QUIET.split(), "--host-resolver-rules=MAP * ~NOTFOUND", profile, *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_plot_is_drawn_and_the_console_stays_empty(theme: str, tmp_path: Path) -> None:
    page = write_report(comparison(), tmp_path / "report.html", "loratlas compare lora srlora")
    dom, console = browse(page, *(["--blink-settings=preferredColorScheme=0"] if theme == "dark" else []))
    assert console == []
    dom, *folded = dom.split("<details")  # what is folded is drawn when it is opened
    plots = re.split(r'class="plotly-graph-div', dom)[1:]
    assert len(plots) == 7
    assert sum('class="plotly-graph-div' in part for part in folded) == 1
    for plot in plots:
        assert 'class="main-svg"' in plot
        assert len(re.findall(r'class="x\d*tick', plot)) > 1
    assert [plot.count('class="hm"') for plot in plots[-3:]] == [2, 1, 0]
    text = {"light": "rgb(29, 35, 41)", "dark": "rgb(230, 233, 236)"}[theme]
    assert f"fill: {text}" in plots[0]  # the page's colour, handed to plotly


def test_the_page_may_load_nothing(tmp_path: Path) -> None:
    page = write_report(comparison(), tmp_path / "report.html")
    intruders = '<img src="http://example.invalid/x.png"><script src="https://example.invalid/x.js"></script>'
    page.write_text(page.read_text().replace("<h1>", f"{intruders}<h1>"))
    _, console = browse(page)
    assert len(console) == 2
    assert all("Content Security Policy" in line for line in console)
