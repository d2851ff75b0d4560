"""Published beside measured: when a number came out, when it did not, and when that cannot be said."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
import report_records as examples

from qexp.report import cli, html, rows, table, verdicts
from qexp.report.record import write

PRINTED = {
    "value": 5.83,
    "source": "2308.13137 Table 1",
    "metric": "perplexity/wikitext2",
    "fp_value": 5.47,
    "note": "",
}


def record(measured: float | None, float_measured: float = 5.474, **evaluation: Any) -> Any:
    run = examples.record("gptq", "w4a16", 0.1, model="llama-2-7b")
    run["metrics"] |= {"perplexity/wikitext2": measured, "fp/perplexity/wikitext2": float_measured}
    run["config"]["eval"] |= evaluation
    run["published"] = [dict(PRINTED)]
    return run


def only(run: Any, within: float = verdicts.WITHIN) -> verdicts.Comparison:
    (found,) = verdicts.compare(rows.make([run]), within)
    return found


@pytest.mark.parametrize(
    ("measured", "within", "verdict", "reproduced"),
    [
        (5.83, 2.0, "within 2 %", True),
        (5.94, 2.0, "within 2 %", True),
        (5.95, 2.0, "2.1 % above", False),
        (5.95, 2.5, "within 2.5 %", True),
        (5.70, 2.0, "2.2 % below", False),
        (None, 2.0, "diverged", None),
    ],
)
def test_the_verdict(measured: float | None, within: float, verdict: str, reproduced: bool | None) -> None:
    found = only(record(measured), within)
    assert (found.verdict, found.reproduced) == (verdict, reproduced)


def test_a_part_of_the_windows_is_not_judged() -> None:
    found = only(record(5.83, limit=8))
    assert (found.verdict, found.reproduced) == ("not judged: 8 windows only", None)
    assert found.difference == 0.0, "the numbers are shown all the same"


def test_another_float_model_is_not_judged() -> None:
    assert only(record(5.83, 5.53)).verdict == "not judged: float model 5.53, printed 5.47"
    assert only(record(5.83, 5.52)).reproduced is True


def test_a_metric_that_was_not_measured_says_so() -> None:
    run = record(5.83)
    run["published"][0]["metric"] = "perplexity/c4"
    assert only(run).verdict == "not measured"


def test_seeds_are_judged_by_their_mean() -> None:
    runs = [record(5.70), record(5.96)]
    runs[1]["config"]["seed"] = 1
    (found,) = verdicts.compare(rows.make(runs))
    assert found.measured == pytest.approx(5.83) and found.reproduced


def test_the_summary_counts() -> None:
    lines = rows.make([record(5.83), record(6.5, alone=1), record(5.83, limit=8)])
    found = verdicts.compare(lines)
    assert verdicts.summary(found) == ["published numbers: 1 of 2 within 2 % of the printed perplexity, 1 not judged"]
    assert verdicts.summary([only(record(None))]) == ["published numbers: 1 not judged"]
    assert verdicts.summary([]) == [] and verdicts.markdown([]) == ""


def test_the_command_prints_it_and_every_file_has_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a", record(5.95))
    files = {name: tmp_path / f"report.{name}" for name in ("html", "csv", "markdown")}
    flags = [text for name, path in files.items() for text in (f"--{name}", str(path))]
    cli.main([str(tmp_path), *flags])
    out = capsys.readouterr().out
    for text in (out, files["html"].read_text(), files["markdown"].read_text()):
        assert "2.1 % above" in text and "+2.1 %" in text and "0 of 1 within 2 %" in text
    (row,) = csv.DictReader(io.StringIO(files["csv"].read_text()))
    assert float(row["published/perplexity/wikitext2/difference_percent"]) == pytest.approx(2.058, abs=1e-3)
    assert row["published/perplexity/wikitext2/source"] == "2308.13137 Table 1"
    cli.main([str(tmp_path), "--within", "3"])
    assert "within 3 %" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        cli.main([str(tmp_path), "--within", "-1"])
    assert ended.value.code == 2 and capsys.readouterr().err == "qexp-report: --within -1; need percent, 0 or more\n"


def test_a_report_without_published_numbers_has_no_such_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = examples.record("rtn", "w4a16", 0.1)
    write(tmp_path / "a", run)
    cli.main([str(tmp_path)])
    assert "verdict" not in capsys.readouterr().out
    lines = rows.make([run])
    assert 'id="published"' not in html.render([run], lines)
    assert "published" not in table.comma_separated(lines).splitlines()[0]


def test_text_of_records_is_escaped() -> None:
    run = record(5.83)
    run["published"][0] |= {"source": examples.UGLY, "note": examples.UGLY}
    lines = rows.make([run])
    assert "<script>alert" not in html.render([run], lines) + verdicts.markdown(verdicts.compare(lines))
    bars = {line.replace("\\|", "").count("|") for line in verdicts.markdown(verdicts.compare(lines)).splitlines()[4:]}
    assert bars == {len(verdicts.HEADINGS) + 1}
