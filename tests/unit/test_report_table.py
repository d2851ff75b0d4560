"""The same numbers in the terminal, in Markdown, in CSV and in the HTML; nothing of a record becomes markup."""

from __future__ import annotations

import csv
import io
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import report_records as examples
from matplotlib.figure import Figure

from qexp.report import cli, columns, compare, html, pareto, plots, record, rows, surfaces, table


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("report") / "runs"
    for i, run in enumerate(examples.study()):
        record.write(runs / f"{i:02d}", run)
    return runs


@pytest.fixture(scope="module")
def figures(folder: Path) -> dict[str, Figure]:
    return plots.figures(record.find([folder]))


@pytest.fixture(scope="module")
def lines(folder: Path) -> list[rows.Row]:
    made = rows.make(record.find([folder]))
    compare.against(made, "gptq")
    return made


def test_csv_holds_the_record_s_own_values(lines: list[rows.Row]) -> None:
    read = list(csv.DictReader(io.StringIO(table.comma_separated(lines), newline="")))
    assert len(read) == len(lines) == 12
    line = next(r for r in read if (r["method"], r["bits"]) == ("rtn", "w4a16"))
    metrics = examples.record("rtn", "w4a16", 0.012)["metrics"]
    for key in ("perplexity/generated", "size/bytes", "accuracy/qexp_grammar/stderr", "divergence/kl/generated"):
        assert float(line[key]) == metrics[key]
    assert float(line["perplexity/generated/ci95/low"]) == metrics["perplexity/generated/ci95"][0]
    assert read[-1]["method"] == examples.UGLY and read[-1]["perplexity/generated"] == ""


def test_failed_and_diverged_runs_say_so(lines: list[rows.Row]) -> None:
    text = table.markdown(lines)
    assert "failed: NumericalError: H of block 3 &lt;down_proj> is not positive definite" in text
    assert "| diverged |" in text


def test_markdown_keeps_its_shape_whatever_the_names(lines: list[rows.Row]) -> None:
    body = table.markdown(lines).splitlines()
    bars = {len(re.findall(r"(?<!\\)\|", line)) for line in body}
    assert len(bars) == 1 and len(body) == len(lines) + 2
    assert "<script" not in "".join(body)


def test_columns_without_a_value_are_left_out(lines: list[rows.Row]) -> None:
    keys = [column.key for column in columns.find(lines)]
    assert "speed/decode_tokens_per_s" not in keys
    assert keys[0] == "method" and keys[-1] == "status"


def test_two_sets_are_told_apart_in_titles() -> None:
    run = examples.record("rtn", "w4a16", 0.1)
    run["metrics"] |= {"perplexity/c4": 50.0, "fp/perplexity/c4": 49.0}
    titles = [column.title for column in columns.find(rows.make([run]))]
    assert {"ppl generated", "ppl c4", "gap c4"} <= set(titles)


def test_published_stands_beside_measured() -> None:
    run = examples.record("rtn", "w4a16", 0.1)
    run["published"] = [
        {"value": 6.11, "source": "2308.13137 Table 1", "metric": "perplexity/generated", "fp_value": 5.47}
    ]
    made = rows.make([run])
    assert next(c for c in columns.find(made) if c.title == "published").text(made[0]) == "6.11"
    page = html.render([run], made)
    assert "2308.13137 Table 1" in page and "+0.1106" in page  # log(6.11 / 5.47)


@pytest.mark.parametrize(("value", "text"), [(999, "999 B"), (6144, "6.144 kB"), (3.25e6, "3.25 MB"), (14e9, "14 GB")])
def test_bytes_are_readable(value: float, text: str) -> None:
    assert columns.readable(value, "bytes") == text


class Strict(HTMLParser):
    """Collects scripts, ids and addresses of a page, and fails on tags that do not close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.scripts = 0
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.ids += [v or "" for k, v in attrs if k == "id"]
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]
        if tag not in ("meta", "input", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(folder: Path, lines: list[rows.Row]) -> str:
    return html.render(record.find([folder]), lines, "gptq")


def test_the_page_is_complete_escaped_and_small(page: str) -> None:
    seen = Strict()
    seen.feed(page)
    assert seen.open == [] and seen.scripts == 2  # the data and the program
    assert len(seen.ids) == len(set(seen.ids))
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in seen.links)
    assert {link[1:] for link in seen.links if link.startswith("#")} <= set(seen.ids)
    assert "&lt;script&gt;alert(1)" in page and "\\u003cb>CPU" in page and "<b>CPU" not in page
    assert len(page) < 6_000_000


def test_the_page_has_every_section_and_every_run(page: str) -> None:
    for heading in ("Comparison", "Quality over size", "Error per block", "Losses of what was learned", "Runs"):
        assert f">{heading}</h2>" in page
    assert page.count("<details") == len(examples.study())
    assert page.count("<figure") == 1 + 3 + 1 + 2 + 1


def test_a_page_of_failures_alone_can_be_made() -> None:
    run = examples.failed()
    assert "not positive definite" in html.render([run], rows.make([run]))


def test_figures_are_named_for_tracking_and_become_png(figures: dict[str, Figure]) -> None:
    assert list(figures)[:2] == ["pareto/embedded", "blocks/embedded/w3a16g128"]
    assert any(name.startswith("activations/embedded/quarot w4a4kv4/") for name in figures)
    assert plots.png(figures["pareto/embedded"]).startswith(b"\x89PNG")


def test_labels_of_the_pareto_plot_do_not_overlap(figures: dict[str, Figure]) -> None:
    for ax in figures["pareto/embedded"].axes:
        boxes = [text.get_window_extent() for text in ax.texts if text.get_text()]
        assert len(boxes) >= 8
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        points = [ax.transData.transform(point) for line in ax.lines for point in line.get_xydata()]
        assert not any(box.contains(*point) for box in boxes for point in points)


def test_names_that_look_like_mathematics_are_drawn_as_they_are() -> None:
    run = examples.record("rtn", "w4a16", 0.1)
    run["config"]["method"]["name"] = r"$\frac{$ a_1$"
    assert all(plots.png(figure) for figure in plots.figures([run]).values())


def test_both_surfaces_share_their_z_axis_and_a_lone_outlier_survives_reduction() -> None:
    entry = examples.with_activations(examples.record("rtn", "w4a16", 0.1))["diagnostics"]["activations"][0]
    entry["before"] = [[0.0] * 700 for _ in range(300)]
    entry["before"][123][456] = 77.0
    axes = surfaces.surface(entry).axes
    assert [ax.get_zlim()[1] for ax in axes] == [77.0, 77.0]  # type: ignore[attr-defined]
    assert surfaces._reduce(np.asarray(entry["before"])).max() == 77.0


def test_the_command_writes_what_it_is_asked_for(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new"
    names = {"--html": out / "r.html", "--csv": out / "r.csv", "--markdown": out / "r.md"}
    cli.main([str(folder), "--baseline", "gptq", *(str(part) for pair in names.items() for part in pair)])
    said = capsys.readouterr().out
    assert all(path.stat().st_size > 500 and f"wrote {path}" in said for path in names.values())
    assert "not separable" in said and "positive definite" in said and "44.52" in said


@pytest.mark.parametrize("arguments", [["{tmp}"], ["{tmp}/missing"], ["{runs}", "--baseline", "nobody"]])
def test_a_user_s_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(SystemExit) as caught:
        cli.main([a.format(tmp=empty, runs=folder) for a in arguments])
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.startswith("qexp-report: ") and error.count("\n") == 1


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom qexp.report import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'numpy', 'pandas', 'rich', 'jinja2'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--baseline" in done.stdout


def test_activations_are_drawn_once_per_composition_of_transforms() -> None:
    runs = [examples.with_activations(examples.record(m, "w4a16", 0.01)) for m in ("rtn", "gptq", "quarot")]
    runs.append(examples.with_activations(examples.record("quarot", "w4a4kv4", 0.05)))
    drawn = [row.label for row, _ in surfaces.distinct(rows.make(runs))]
    assert drawn == ["quarot w4a16"], "rtn and gptq leave activations as they are, and bits do not matter"
    assert [row.method for row, _ in surfaces.distinct(rows.make(runs[:2]))] == ["gptq"]


def test_each_activation_setting_has_a_frontier_of_its_own() -> None:
    lines = rows.make([examples.record("rtn", "w4a16", 0.01), examples.record("rtn", "w4a4kv4", 0.3)])
    (ax, *_) = pareto.draw(lines).axes
    assert len([line for line in ax.lines if line.get_linestyle() != "None"]) == 2
    low, high = ax.get_xlim()
    assert high - low >= 0.5


def test_a_narrow_terminal_drops_what_the_method_implies_and_keeps_what_was_swapped() -> None:
    swapped = examples.record("gptq", "w4a16", 0.02)
    swapped["config"]["method"]["solver"] = {"_target_": "qexp.stages.solver.rtn.Rtn"}
    runs = [examples.record("gptq", "w4a16", 0.01), swapped, examples.record("quarot", "w4a16", 0.01)]
    spare = {column.key: column.spare for column in columns.find(rows.make(runs))}
    assert spare["stage/solver"] == 0
    assert spare["stage/transform"] > max(spare[key] for key in ("gap/generated", "cost/quantize_seconds"))
