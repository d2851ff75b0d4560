"""The report in a real browser: the script sorts, both schemes are readable, nothing is asked of the network."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import report_records as examples

from qexp.report import html, record, rows

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
QUIET = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--virtual-time-budget=2000"),
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    for i, run in enumerate(examples.study()):
        record.write(folder / "runs" / f"{i:02d}", run)
    records = record.find([folder])
    path = folder / "report.html"
    path.write_text(html.render(records, rows.make(records)), encoding="utf-8")
    return path


def browse(profile: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    command = [CHROMIUM, *QUIET, f"--user-data-dir={profile}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)


def first_column(dom: str) -> list[str]:
    body = dom[dom.index("<tbody") : dom.index("</tbody")]
    return [re.findall(r"<td[^>]*>(.*?)</td>", line)[0] for line in re.findall(r"<tr.*?</tr>", body, flags=re.DOTALL)]


def gaps(dom: str) -> list[float | None]:
    heads = re.findall(r'data-key="([^"]+)"', dom)
    at = heads.index("gap/generated")
    body = dom[dom.index("<tbody") : dom.index("</tbody")]
    cells = [re.findall(r"<td([^>]*)>", line)[at] for line in re.findall(r"<tr.*?</tr>", body, flags=re.DOTALL)]
    found = [re.search(r'data-sort="([^"]+)"', cell) for cell in cells]
    return [float(match[1]) if match else None for match in found]


@pytest.mark.parametrize(("sign", "order"), [("", "ascending"), ("-", "descending")])
def test_a_link_may_carry_the_order_and_keeps_what_has_none_at_the_end(
    report: Path, tmp_path: Path, sign: str, order: str
) -> None:
    dom = browse(tmp_path, "--dump-dom", f"file://{report}#sort={sign}gap/generated").stdout
    values = gaps(dom)
    numbers = [value for value in values if value is not None]
    assert numbers == sorted(numbers, reverse=order == "descending") and len(numbers) == 10
    assert values[-2:] == [None, None]
    assert re.findall(r'aria-sort="(\w+)"', dom.split("</style>")[1]) == [order]


def test_the_header_s_button_sorts_and_turns_round(report: Path, tmp_path: Path) -> None:
    """Drive the real buttons: a second script presses the first header twice."""
    page = tmp_path / "pressed.html"
    press = "<script>for (let i = 0; i < 2; i++) document.querySelector('th button').click();</script></body>"
    page.write_text(report.read_text(encoding="utf-8").replace("</body>", press), encoding="utf-8")
    names = first_column(browse(tmp_path / "profile", "--dump-dom", f"file://{page}").stdout)
    assert names[0].startswith("smoothquant") and names[-1] == "fp16"


def test_a_hostile_name_stays_text(report: Path, tmp_path: Path) -> None:
    dom = browse(tmp_path, "--dump-dom", f"file://{report}").stdout
    assert dom.count("<script>") == 1
    assert "&lt;script&gt;alert(1)" in dom


def test_nothing_is_requested_and_nothing_fails(report: Path, tmp_path: Path) -> None:
    log = tmp_path / "net.json"
    done = browse(tmp_path / "p", "--enable-logging=stderr", f"--log-net-log={log}", "--dump-dom", f"file://{report}")
    assert "CONSOLE" not in done.stderr
    hosts = re.findall(r'"url":"(https?://[^"]*)"', log.read_text(encoding="utf-8", errors="replace"))
    assert [host for host in hosts if "google" not in host] == []  # the browser itself calls home


@pytest.mark.parametrize(("scheme", "light"), [(0, False), (1, True)])
def test_each_scheme_has_its_ground_and_ink(report: Path, tmp_path: Path, scheme: int, light: bool) -> None:
    from PIL import Image

    shot = tmp_path / "page.png"
    look = (f"--blink-settings=preferredColorScheme={scheme}", "--window-size=1400,3600", "--hide-scrollbars")
    browse(tmp_path / "p", *look, f"--screenshot={shot}", f"file://{report}")
    with Image.open(shot) as image:
        levels = image.convert("L").histogram()
    ground = max(range(256), key=levels.__getitem__)
    ink = sum(levels[:70]) if light else sum(levels[200:])
    assert (ground > 200) is light
    assert ink > 10_000
