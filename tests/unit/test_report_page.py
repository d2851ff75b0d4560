"""What the page of the report is made of: its data, its colours, its generator and the size of its program."""

from __future__ import annotations

import base64
import json
import re
from importlib import resources
from typing import Any

import numpy as np
import pytest
import report_records as examples

from qexp.report import bootstrap, columns, compare, html, payload, plots, rows
from qexp.report.record import Record

FILES = resources.files("qexp.report")
STYLE = FILES.joinpath("report.css").read_text(encoding="utf-8")
LINES = 250  # of each file, as of every source file


def test_the_generator_is_mulberry32() -> None:
    known = [0.26642920868471265, 0.0003297457005828619, 0.2232720274478197]  # of its author's JavaScript, seed 0
    assert [value / 2**32 for value in bootstrap.uniform(3)] == known


def test_the_generator_draws_all_windows_alike() -> None:
    places = (bootstrap.uniform(400_000).astype(np.uint64) * np.uint64(40)) >> np.uint64(32)
    counts = np.bincount(places.astype(int), minlength=40)
    assert len(counts) == 40 and abs(counts - 10_000).max() < 450, "4.5 standard deviations of a binomial"


def test_the_interval_is_that_of_any_other_generator() -> None:
    delta = np.random.default_rng(3).normal(0.1, 1.0, 60)
    draws = np.random.default_rng(4).choice(delta, (20_000, 60)).mean(axis=1)
    assert bootstrap.interval(delta) == pytest.approx(tuple(np.quantile(draws, bootstrap.LEVELS)), abs=0.02)


def stored(runs: list[Record]) -> list[Record]:
    """Records as they are read: what is not finite is null."""
    read: list[Record] = json.loads(json.dumps(runs), parse_constant=lambda _: None)
    return read


def made(runs: list[Record]) -> dict[str, Any]:
    return json.loads(payload.script(payload.build(rows.make(runs), None)))


def test_no_name_can_end_the_element_that_holds_the_data() -> None:
    text = payload.script(payload.build(rows.make([examples.failed()]), "</script>"))
    assert "<" not in text and json.loads(text)["baseline"] == "</script>"


def test_losses_come_back_as_they_were() -> None:
    runs = [examples.record("quarot", "w4a16", 0.02, seed=seed) for seed in (0, 1)]
    (row,) = made(runs)["rows"]
    losses = np.frombuffer(base64.b64decode(row["losses"]["generated"]), dtype="<f4")
    expected = np.mean([run["window_losses"]["generated"] for run in runs], axis=0)
    assert np.abs(losses - expected).max() < 1e-6
    assert row["runs"] == [0, 1]


def test_configs_are_what_all_share_and_what_differs() -> None:
    runs = [examples.record("gptq", bits, 0.01) for bits in ("w4a16", "w3a16g128")]
    data = made(runs)
    assert data["shared"]["config"]["method.name"] == "gptq"
    assert {run["config"]["bits.weight"] for run in data["runs"]} == {3, 4}
    assert "bits.weight" in data["settings"] and "output_dir" not in data["settings"]
    for run, row in zip(data["runs"], rows.make(runs), strict=True):
        whole = dict(rows.flatten(row.runs[0]["config"], keep_seeds=True, every=True))
        assert data["shared"]["config"] | run["config"] == whole


def test_outcomes() -> None:
    assert {row["status"] for row in made(stored(examples.study()))["rows"]} == {"completed", "diverged", "failed"}


def test_columns_of_a_baseline_wait_for_one_only_where_windows_were_recorded() -> None:
    runs = [examples.record(method, "w4a16", 0.01) for method in ("rtn", "gptq")]
    waiting = [column.key for column in columns.find(rows.make(runs), pinned=True) if column.pinned]
    assert waiting == ["verdict/generated", "versus/generated", "ratio/generated"]
    for run in runs:
        del run["window_losses"]
    assert not [column for column in columns.find(rows.make(runs), pinned=True) if column.pinned]


def test_verdicts_are_the_same_in_csv() -> None:
    lines = rows.make([r for r in examples.study() if r["status"] == "completed"])
    compare.against(lines, "gptq")
    (column,) = [column for column in columns.find(lines) if column.key == "verdict/generated"]
    assert {(row.method, row.bits): column.text(row) for row in lines}["quarot", "w4a4kv4"] == "better"
    assert {column.text(row) for row in lines} == {"better", "worse", "undecided", columns.ABSENT}


def test_several_models_are_panels_of_one_figure_on_equal_axes() -> None:
    drawn = plots.figures(examples.models())
    names = [name for name in drawn if name.startswith("pareto/")]
    assert len(names) == 2
    axes = drawn[names[0]].axes
    assert [ax.get_title(loc="left").split(" (")[0] for ax in axes] == ["embedded", "other"]
    assert all(ax.xaxis.get_tick_params()["labelbottom"] for ax in axes)
    assert axes[0].get_xlim() == axes[1].get_xlim() and axes[0].get_ylim() == axes[1].get_ylim()


def test_the_last_panel_of_each_column_has_the_labels() -> None:
    gaps = {"rtn": 0.2, "gptq": 0.1}
    runs = [examples.record(name, "w4a16", gap, model=f"m{i}") for i in range(3) for name, gap in gaps.items()]
    figure = next(iter(plots.figures(runs).values()))
    assert [bool(ax.get_xlabel()) for ax in figure.axes] == [False, True, True, False]
    assert [ax.xaxis.get_tick_params()["labelbottom"] for ax in figure.axes[:3]] == [False, True, True]


def test_figures_are_bounded_and_the_page_says_which_were_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plots.LIMITS, "blocks", 1)
    runs = stored(examples.study())
    drawn, left_out = plots.bounded(rows.make(runs))
    assert [name for name in drawn if name.startswith("blocks/")] == ["blocks/embedded/w3a16g128"]
    assert left_out["blocks"] == ["embedded/w4a16", "embedded/w4a4kv4"]
    page = html.render(runs, rows.make(runs))
    assert "2 more of 3 were not drawn" in page and "embedded · w4a16; embedded · w4a4kv4" in page


def test_a_figure_of_errors_has_the_best_rows_and_says_so() -> None:
    runs = [examples.record("gptq", "w4a16", 0.01 * (1 + i)) for i in range(14)]
    for i, run in enumerate(runs):
        run["config"]["calibration"]["samples"] = i
    (name,) = [name for name in plots.figures(runs) if name.startswith("blocks/")]
    assert name == "blocks/embedded/w4a16/the 12 rows of lowest perplexity of 14"


def test_every_point_of_the_plot_has_the_name_of_its_row() -> None:
    runs = stored(examples.models())
    lines = rows.make(runs)
    page = html.render(runs, lines)
    found = re.findall(r'class="point" data-row="(\d+)"[^>]*aria-label="([^"]*)"', page)
    quantized = [row for row in lines if not row.failed and not row.is_float and row.metrics["perplexity/generated"]]
    assert {int(place) for place, _ in found} == {row.place for row in quantized}
    assert all(name.startswith(f"{lines[int(place)].label}, {lines[int(place)].model}; gap") for place, name in found)


def luminance(colour: str) -> float:
    values = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_can_be_read(scheme: int) -> None:
    """WCAG 2.2: 4.5 for text, 3 for the edges of controls."""
    pairs = re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", STYLE)
    colours = {name: pair[scheme] for name, *pair in pairs}
    assert len(colours) == STYLE.count("light-dark(")
    text = {
        (ink, ground) for ink in ("text", "quiet", "accent", "bad", "good") for ground in ("ground", "card", "soft")
    }
    worst = {pair: contrast(*(colours[name] for name in pair)) for pair in {*text, ("bad", "bad-soft")}}
    assert {pair: value for pair, value in worst.items() if value < 4.5} == {}
    assert min(contrast(colours["edge"], colours[ground]) for ground in ("card", "ground")) >= 3


@pytest.mark.parametrize("name", [*html.SCRIPTS, "report.css"])
def test_the_program_of_the_page_stays_small(name: str) -> None:
    lines = FILES.joinpath(name).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= LINES
    assert max(map(len, lines)) <= 120


def test_the_program_asks_nothing_of_the_network() -> None:
    program = "".join(FILES.joinpath(name).read_text(encoding="utf-8") for name in html.SCRIPTS)
    assert re.findall(r"https?:|fetch\(|import |XMLHttp|innerHTML|eval\(|Math\.random", program + STYLE) == []
