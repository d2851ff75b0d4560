"""The report in a real browser, by hand and by keyboard: what is chosen shows, adds up and stands in the address."""

from __future__ import annotations

import logging
import re
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote

import pytest
import report_records as examples

from qexp.report import columns, compare, html, payload, record, rows
from qexp.report.rows import Row

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

log = logging.getLogger(__name__)

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
RECORDS, SECONDS = 1008, 2.0
PAPER = 1032  # pixels across A4 on its side, within the margins

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (apt-get install chromium)"),
]

SHOWN = "[...document.querySelectorAll('#table tbody tr:not([hidden])')]"
FIRST_CELLS = f"{SHOWN}.map((line) => [line.cells[0].textContent, line.cells[1].textContent])"
VISIBLE = "(each) => each.checkVisibility({ visibilityProperty: true })"
# What a browser computes: each element with text of its own, its ink over the first opaque ground behind it.
CONTRASTS = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (colour) => colour.slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (each) => {
    for (; each; each = each.parentElement) {
      const colour = parse(getComputedStyle(each).backgroundColor);
      if (colour.length < 4 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  return [...document.querySelectorAll('body *')].filter((each) => each.checkVisibility()
    && ([...each.childNodes].some((node) => node.nodeType === 3 && node.data.trim()) || each.placeholder
      || each.classList.contains('pin') || each instanceof SVGSVGElement))
    .map((each) => {
      const style = getComputedStyle(each, each.placeholder ? '::placeholder' : null);
      const [a, b] = [light(parse(style.color)), light(ground(each))].sort((x, y) => y - x);
      return [(a + 0.05) / (b + 0.05), each.outerHTML.slice(0, 120)];
    });
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install .[dev])")
    with api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


def write(folder: Path, runs: list[record.Record]) -> tuple[Path, list[Row]]:
    for i, run in enumerate(runs):
        record.write(folder / "runs" / f"{i:04d}", run)
    records = record.find([folder])
    lines = rows.make(records)
    path = folder / "report.html"
    path.write_text(html.render(records, lines), encoding="utf-8")
    return path, lines


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Row]]:
    runs = examples.models()
    runs[1]["config"]["calibration"]["samples"] = 64
    return write(tmp_path_factory.mktemp("report"), runs)


@pytest.fixture
def lines(study: tuple[Path, list[Row]]) -> list[Row]:
    return study[1]


@pytest.fixture
def address(study: tuple[Path, list[Row]]) -> str:
    return f"file://{study[0]}"


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A fresh page; whatever a test does with it, it logs nothing, fails in nothing and asks for nothing."""
    context = browser.new_context(viewport={"width": 1400, "height": 1000}, color_scheme="light")
    opened = context.new_page()
    wrong: list[str] = []
    opened.on("console", lambda message: wrong.append(message.text))
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("dialog", lambda dialog: wrong.append(dialog.message))
    opened.on("request", lambda request: wrong.append(request.url) if not request.is_navigation_request() else None)
    yield opened
    context.close()
    assert wrong == []


def shown(page: Page) -> list[tuple[str, str]]:
    return [(method, bits) for method, bits in page.evaluate(FIRST_CELLS)]


def of(lines: list[Row]) -> list[tuple[str, str]]:
    return sorted((row.method, row.bits) for row in lines)


def cells(page: Page, key: str) -> list[tuple[str, float | None]]:
    """Text and sort value of a column in the order of the page, hidden rows too."""
    found = page.evaluate(
        """(key) => {
          const at = [...document.querySelectorAll('#table th')].findIndex((head) => head.dataset.key === key);
          return [...document.querySelectorAll('#table tbody tr')].map(
            (line) => [line.cells[at].textContent, line.cells[at].dataset.sort ?? null]);
        }""",
        key,
    )
    return [(text, None if value is None or key.startswith("verdict") else float(value)) for text, value in found]


def choices(page: Page) -> dict[str, list[str]]:
    return parse_qs(here(page).partition("#")[2], keep_blank_values=True)


def here(page: Page) -> str:
    return str(page.evaluate("location.href"))  # page.url is told of it later


def pick(page: Page, facet: str, *values: str) -> None:
    page.click(f".facet[data-key='{facet}'] summary")
    for value in values:
        page.check(f".facet[data-key='{facet}'] input[value='{value}']")
    page.keyboard.press("Escape")


@pytest.mark.parametrize(("sign", "order"), [("", "ascending"), ("-", "descending")])
def test_a_link_may_carry_the_order_and_keeps_what_has_none_at_the_end(
    page: Page, address: str, lines: list[Row], sign: str, order: str
) -> None:
    page.goto(f"{address}#sort={sign}gap/generated")
    values = [value for _, value in cells(page, "gap/generated")]
    numbers = [value for value in values if value is not None]
    assert numbers == sorted(numbers, reverse=order == "descending") and len(numbers) == len(lines) - 2
    assert values[-2:] == [None, None]
    assert page.locator("[aria-sort]").evaluate_all("(all) => all.map((each) => each.ariaSort)") == [order]


def test_a_header_sorts_turns_round_and_says_so(page: Page, address: str) -> None:
    page.goto(address)
    for sign, turned in (("", False), ("-", True)):
        page.click("th[data-key=method] button")
        names = [method for method, _ in shown(page)]
        assert (names[0] == "fp16", names[-1] == "fp16") == (not turned, turned)
        assert choices(page)["sort"] == [f"{sign}method"]


@pytest.mark.parametrize(
    ("facet", "values"),
    [
        ("method", ["quarot"]),
        ("method", ["rtn", "gptq"]),
        ("bits", ["w4a4kv4"]),
        ("model", ["other"]),
        ("status", ["failed", "diverged"]),
    ],
)
def test_a_filter_leaves_rows_runs_and_points_of_what_was_picked(
    page: Page, address: str, lines: list[Row], facet: str, values: list[str]
) -> None:
    page.goto(address)
    pick(page, facet, *values)
    if facet == "status":
        kept = [row for row in lines if row.failed or row.metrics["perplexity/generated"] is None]
    else:
        kept = [row for row in lines if getattr(row, facet) in values]
    assert 0 < len(kept) < len(lines)
    assert sorted(shown(page)) == of(kept)
    assert page.inner_text("#told") == f"{len(kept)} of {len(lines)} rows."
    assert page.locator("#folds details:visible").count() == sum(len(row.runs) for row in kept)
    points = page.evaluate("[...document.querySelectorAll('.point:not(.faded)')].map((each) => +each.dataset.row)")
    assert set(points) <= {row.place for row in kept}
    assert bool(points) is (facet != "status")
    assert choices(page)[facet] == sorted(values) or choices(page)[facet] == values[::-1]
    page.click("#reset")
    assert sorted(shown(page)) == of(lines)


def test_filters_of_several_keys_must_all_hold(page: Page, address: str) -> None:
    page.goto(address)
    pick(page, "method", "quarot", "gptq")
    pick(page, "bits", "w4a16")
    pick(page, "model", "embedded")
    assert sorted(shown(page)) == [("gptq", "w4a16"), ("quarot", "w4a16")]


def test_any_key_of_the_config_that_differs_is_a_filter(page: Page, address: str, lines: list[Row]) -> None:
    page.goto(address)
    options = page.locator("#more option").evaluate_all("(all) => all.map((each) => each.value)")
    assert "config.calibration.samples" in options and "config.output_dir" not in options
    page.select_option("#more", "config.calibration.samples")
    page.check(".facet[data-key='config.calibration.samples'] input[value='64']")
    assert shown(page) == [("rtn", "w4a16")]
    assert choices(page)["config.calibration.samples"] == ["64"]
    page.select_option("#more", "config.seed")
    assert page.locator(".facet[open]").count() == 1, "one filter is open at a time"
    page.check(".facet[data-key='config.seed'] input[value='1']")
    assert shown(page) == [], "no row has 64 samples and seed 1"


def test_free_text_finds_words_of_a_row_in_any_order(page: Page, address: str) -> None:
    page.goto(address)
    page.fill("#search", "W4A4 quarot")
    assert shown(page) == [("quarot", "w4a4kv4")]
    page.fill("#search", "positive definite")
    assert [method for method, _ in shown(page)] == [examples.UGLY]
    page.fill("#search", "nowhere")
    assert shown(page) == [] and page.inner_text("#told").startswith("0 of ")


def test_a_pinned_method_gives_the_numbers_and_verdicts_of_the_command(
    page: Page, address: str, lines: list[Row]
) -> None:
    page.goto(address)
    assert page.locator("th[data-key='versus/generated']").is_hidden()
    told = {}
    for method in ("gptq", "rtn"):
        page.select_option("#baseline", method)
        expected = rows.make([run for row in lines for run in row.runs])
        compare.against(expected, method)
        for key in ("versus/generated", "ratio/generated"):
            column = next(c for c in columns.find(expected) if c.key == key)
            read = cells(page, key)
            assert [text for text, _ in read] == [column.text(row) for row in expected]
            for row, (_, value) in zip(expected, read, strict=True):
                assert value == (pytest.approx(row.metrics[key], abs=1e-6) if key in row.metrics else None)
        column = next(c for c in columns.find(expected) if c.key == "verdict/generated")
        told[method] = [text for text, _ in cells(page, "verdict/generated")]
        others = {"baseline": columns.ABSENT, "not paired": columns.ABSENT}
        assert [others.get(text, text) for text in told[method]] == [column.text(row) for row in expected]
        assert f"against {method}: " in page.inner_text("#told")
    assert told["gptq"] != told["rtn"]
    assert {"better", "worse", "undecided", "baseline", "not paired"} <= {*told["gptq"], *told["rtn"]}


def test_a_pinned_row_holds_its_model_at_all_bits(page: Page, address: str, lines: list[Row]) -> None:
    page.goto(address)
    base = next(row for row in lines if (row.method, row.bits, row.model) == ("gptq", "w4a16", "embedded"))
    pin = page.locator("#table tbody tr").nth(base.place).locator(".pin")
    pin.click()
    assert pin.get_attribute("aria-pressed") == "true"
    for row, (text, value) in zip(lines, cells(page, "versus/generated"), strict=True):
        found = None
        if row.model == base.model and row is not base and not row.failed:
            found = compare.paired(row, base, "generated")
        assert value == (pytest.approx(found.mean, abs=1e-6) if found else None)
        assert text == (f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]" if found else "–")
    assert choices(page)["baseline"] == [f"@{base.runs[0]['fingerprint'][:10]}"]
    pin.click()
    assert page.locator("th[data-key='versus/generated']").is_hidden()


def test_a_link_brings_the_view_back(page: Page, address: str) -> None:
    page.goto(address)
    pick(page, "method", "quarot", "rtn")
    page.fill("#search", "embedded")
    page.select_option("#baseline", "gptq")
    page.select_option("#theme", "dark")
    page.click("th[data-key='verdict/generated'] button")
    before = shown(page), cells(page, "verdict/generated"), page.inner_text("#told"), here(page)
    page.goto("about:blank")
    page.goto(before[-1])
    assert (shown(page), cells(page, "verdict/generated"), page.inner_text("#told"), here(page)) == before
    assert page.input_value("#search") == "embedded" and page.input_value("#baseline") == "gptq"
    page.click("nav a[href='#runs']")
    assert here(page) == before[-1], "a jump keeps the view"


def test_the_baseline_of_the_command_is_pinned_and_can_be_unpinned(
    page: Page, study: tuple[Path, list[Row]], tmp_path: Path
) -> None:
    records = record.find([study[0].parent])
    pinned = rows.make(records)
    compare.against(pinned, "gptq")
    path = tmp_path / "pinned.html"
    path.write_text(html.render(records, pinned, "gptq"), encoding="utf-8")
    page.goto(f"file://{path}")
    assert page.input_value("#baseline") == "gptq" and "baseline" not in choices(page)
    page.select_option("#baseline", "")
    assert choices(page)["baseline"] == [""]
    page.reload()
    assert page.locator("th[data-key='versus/generated']").is_hidden()


def test_a_point_says_which_run_it_is(page: Page, address: str, lines: list[Row]) -> None:
    page.goto(f"{address}#baseline=rtn")
    tip = page.locator("#tip")
    assert tip.is_hidden()
    points = page.locator("figure >> nth=0 >> .point")
    for i in (0, 4):
        points.nth(i).hover()
        row = lines[int(points.nth(i).get_attribute("data-row") or -1)]
        assert tip.inner_text().startswith(f"{row.label}, {row.model}; gap {row.metrics['gap/generated']:+.4f}")
    page.mouse.move(5, 5)
    assert tip.is_hidden()
    page.locator("figure >> nth=0 >> .point[tabindex='0']").focus()
    first = tip.inner_text()
    page.keyboard.press("ArrowRight")
    assert tip.is_visible() and tip.inner_text() != first
    page.keyboard.press("Escape")
    assert tip.is_hidden()


def focused(page: Page) -> dict[str, Any]:
    found: dict[str, Any] = page.evaluate(
        """() => {
          const each = document.activeElement, style = getComputedStyle(each);
          each.dataset.met = 1;
          return { tag: each.tagName, name: each.ariaLabel ?? each.textContent, body: each === document.body,
            ring: style.outlineStyle !== 'none' || style.filter !== 'none' };
        }"""
    )
    return found


def test_the_keyboard_reaches_every_control_and_shows_where_it_is(page: Page, address: str) -> None:
    page.goto(f"{address}#baseline=gptq")
    for _ in range(200):
        page.keyboard.press("Tab")
        now = focused(page)
        if now["body"]:
            break
        assert now["ring"], now
    controls = "button, input, select, summary, a[href], [tabindex='0']"
    missed = page.evaluate(
        f'[...document.querySelectorAll("{controls}")].filter({VISIBLE}).filter((each) => !each.dataset.met'
        " && !each.matches('.pin')).map((each) => each.outerHTML)"
    )
    assert missed == []
    unnamed = page.evaluate(
        f"[...document.querySelectorAll('button, input, select, summary, [role=region], .point')].filter({VISIBLE})"
        ".filter((each) => !(each.ariaLabel || each.ariaLabelledByElements || each.labels?.length || each.textContent))"
        ".map((each) => each.outerHTML)"
    )
    assert unnamed == []


def test_everything_is_done_without_a_mouse(page: Page, address: str) -> None:
    page.goto(address)
    page.locator(".facet[data-key=method] summary").focus()
    page.keyboard.press("Enter")
    page.locator(".facet[data-key=method] fieldset").wait_for()
    for key in ("Tab", "Tab", "Space"):  # the second box of fp16, gptq, ..
        page.keyboard.press(key)
    assert choices(page)["method"] == ["gptq"]
    page.keyboard.press("Escape")
    assert page.locator(".facet[open]").count() == 0
    assert focused(page)["name"].startswith("method")
    page.locator("th[data-key='gap/generated'] button").focus()
    page.keyboard.press("Enter")
    assert choices(page)["sort"] == ["gap/generated"]
    page.locator(".pin[tabindex='0']").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert page.locator(".pin:focus").get_attribute("aria-pressed") == "true"
    assert page.locator("#told").inner_text().count("against gptq") == 1
    page.locator("#folds summary:visible").first.focus()
    page.keyboard.press("Enter")
    page.locator("#folds details[open] pre").last.wait_for()
    assert page.locator("#folds details[open] pre").count() == 2
    assert "method.name=gptq" in page.locator("#folds details[open] pre").first.inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("how", ["system", "chosen"])
def test_text_can_be_read_in_both_schemes(page: Page, address: str, scheme: str, how: str) -> None:
    other = "dark" if scheme == "light" else "light"
    page.emulate_media(color_scheme=scheme if how == "system" else other)  # type: ignore[arg-type]
    page.goto(f"{address}#baseline=gptq&method=gptq&method=quarot&method=rtn&method={quote(examples.UGLY)}")
    if how == "chosen":
        page.select_option("#theme", scheme)
        assert choices(page)["theme"] == [scheme]
    page.locator("#folds details:visible").last.locator("summary").click()
    page.locator("#folds pre").last.wait_for()
    page.click(".facet[data-key=bits] summary")
    page.locator(".point:not(.faded)").first.dispatch_event("pointerover")
    found = page.evaluate(CONTRASTS)
    assert len(found) > 250
    assert [each for each in found if each[0] < 4.5] == []
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(ground[4:].split(",")[0]) > 128) is (scheme == "light")


def test_paper_has_the_rows_that_are_shown_and_no_controls(page: Page, address: str) -> None:
    page.goto(f"{address}#method=quarot&baseline=gptq&theme=dark")
    rows_on_screen = shown(page)
    page.set_viewport_size({"width": PAPER, "height": 700})
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(29, 32, 37)"
    for control in (".tools", "nav", ".theme", ".pin >> nth=0"):
        assert page.locator(control).is_hidden(), control
    assert shown(page) == rows_on_screen and page.locator("#told").is_visible()
    assert page.evaluate(
        "document.querySelector('.scroll').scrollWidth <= document.querySelector('.scroll').clientWidth"
    )
    assert page.pdf(prefer_css_page_size=True).startswith(b"%PDF")


def test_a_hostile_name_stays_text(page: Page, address: str) -> None:
    page.goto(address)
    assert page.locator("script").count() == 2
    pick(page, "method", examples.UGLY)
    assert shown(page) == [(examples.UGLY, "w4a16")]
    page.locator("#folds details", has_text="alert").locator("summary").click()
    page.locator("#folds ul").wait_for()
    assert page.locator("script, #folds b").count() == 2
    assert "fell back to <b>CPU</b>" in page.inner_text("#folds")


def test_without_scripts_the_table_is_complete(browser: Browser, address: str, lines: list[Row]) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(address)
    assert page.locator("#table tbody tr:visible").count() == len(lines)
    assert page.locator(".tools, .theme, .pin >> visible=true").count() == 0
    context.close()


def test_a_thousand_records_are_usable_at_once(page: Page, tmp_path: Path) -> None:
    started = time.perf_counter()
    path, lines = write(tmp_path, examples.many(RECORDS // 48))
    made = time.perf_counter() - started
    seconds = []
    for _ in range(3):
        page.goto("about:blank")
        started = time.perf_counter()
        page.goto(f"file://{path}")
        page.click("th[data-key='gap/generated'] button")
        assert page.locator("#table tbody tr").first.locator("td").first.inner_text().strip() == "quarot"
        seconds.append(time.perf_counter() - started)
    assert page.locator("#table tbody tr:visible").count() == payload.MOST
    started = time.perf_counter()
    page.select_option("#baseline", "gptq")
    page.locator("#told", has_text=re.compile(r"\.$")).wait_for()
    pinned = time.perf_counter() - started
    usable = statistics.median(seconds)
    log.info("%d rows: made in %.1f s, usable in %.2f s, a baseline in %.2f s", len(lines), made, usable, pinned)
    assert len(lines) == RECORDS and path.stat().st_size < 6_000_000
    assert usable < SECONDS
    assert pinned < 10
    page.click("#all")
    assert page.locator("#table tbody tr:visible").count() == page.locator("#folds details:visible").count() == RECORDS
    assert choices(page)["all"] == ["rows"]
