"""Rows say who ran, what differs and what was measured; comparisons use pairs."""

from __future__ import annotations

import copy
import math

import pytest
import report_records as examples

from qexp.core.errors import UserError
from qexp.report import columns, compare, rows


def test_seeds_become_one_row_with_mean_and_range() -> None:
    runs = [examples.record("gptq", "w4a16", gap, seed=seed) for seed, gap in enumerate((0.01, 0.02, 0.03))]
    (row,) = rows.make(runs)
    values = [run["metrics"]["perplexity/generated"] for run in runs]
    assert row.metrics["perplexity/generated"] == pytest.approx(sum(values) / 3)
    assert (row.low["perplexity/generated"], row.high["perplexity/generated"]) == (min(values), max(values))
    assert len(rows.make(runs, by_seed=True)) == 3


def test_a_seed_that_diverged_is_not_averaged_away() -> None:
    runs = [examples.record("gptq", "w4a16", 0.01, seed=seed) for seed in (0, 1)]
    runs[1]["metrics"]["perplexity/generated"] = None
    (row,) = rows.make(runs)
    assert row.metrics["perplexity/generated"] is None
    assert row.metrics["gap/generated"] is None


def test_the_gap_is_the_difference_of_log_perplexities() -> None:
    run = examples.record("rtn", "w4a16", 0.1)
    run["metrics"] |= {"perplexity/generated": 20.0, "fp/perplexity/generated": 10.0}
    (row,) = rows.make([run])
    assert row.metrics["gap/generated"] == pytest.approx(math.log(2))


def test_only_stages_that_differ_are_shown() -> None:
    made = rows.make([examples.record("gptq", "w4a16", 0.01), examples.record("quarot", "w4a16", 0.01)])
    assert {row.method: row.stages for row in made} == {
        "gptq": {"transform": "none"},
        "quarot": {"transform": "fold_norm + hadamard"},
    }


def test_an_ablated_setting_is_shown_once_even_where_it_is_interpolated() -> None:
    runs = [examples.record("rtn", "w4a16", 0.01) for _ in range(2)]
    runs[1]["config"]["bits"]["group"] = 64
    runs[1]["config"]["method"]["grid"]["group"] = 64
    made = rows.make(runs)
    assert sorted(row.settings["bits.group"] for row in made) == ["-1", "64"]
    assert all(list(row.settings) == ["bits.group"] for row in made)


def test_where_a_run_was_written_is_no_setting() -> None:
    runs = [examples.record("rtn", "w4a16", 0.01) for _ in range(2)]
    runs[1]["config"]["output_dir"] = "elsewhere"
    assert len(rows.make(runs)) == 1


def test_failed_runs_stay_single_and_last() -> None:
    made = rows.make([examples.failed(), examples.failed(), examples.record("rtn", "w4a16", 0.1)])
    assert [row.failed for row in made] == [False, True, True]


def test_a_run_that_failed_before_its_config_was_resolved_is_a_row() -> None:
    run = examples.failed()
    run["config"] = {}
    assert rows.make([run])[0].method == "?"


@pytest.mark.parametrize(("bits", "gap", "is_float"), [("w16", 0.0, True), ("w16", 0.01, False), ("w4a16", 0.0, False)])
def test_the_float_model_is_known_by_its_numbers(bits: str, gap: float, is_float: bool) -> None:
    assert rows.make([examples.record("any", bits, gap)])[0].is_float is is_float


def pair(gap_a: float, gap_b: float) -> tuple[rows.Row, rows.Row]:
    made = rows.make([examples.record("gptq", "w4a16", gap_a), examples.record("rtn", "w4a16", gap_b)])
    a, b = sorted(made, key=lambda row: row.method)
    return a, b


def test_the_paired_difference_is_that_of_log_perplexities_and_its_interval_holds_it() -> None:
    a, b = pair(0.02, 0.06)
    found = compare.paired(a, b, "generated")
    assert found is not None
    logs = [math.log(row.metrics["perplexity/generated"] or 0) for row in (a, b)]
    assert found.mean == pytest.approx(logs[0] - logs[1])
    assert found.low < found.mean < found.high < 0
    assert found.decided and found.windows == examples.WINDOWS


def test_pairing_removes_what_windows_have_in_common() -> None:
    """Windows differ by 0.2 nats; an unpaired interval of 40 could not see 0.002."""
    a, b = pair(0.0058, 0.0078)
    found = compare.paired(a, b, "generated")
    assert found is not None and found.high - found.low < 0.005


def test_equal_runs_are_not_told_apart() -> None:
    a, _ = pair(0.02, 0.06)
    twin = rows.make([examples.record("rtn", "w4a16", 0.02, noise=1)])[0]
    found = compare.paired(a, twin, "generated")
    assert found is not None and not found.decided


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    import numpy as np

    rng, hits = np.random.default_rng(1), 0
    for _ in range(200):
        a, b = pair(0.02, 0.02)
        for row in (a, b):
            row.runs[0]["window_losses"] = {"generated": list(rng.normal(3.0, 0.1, 40))}
        found = compare.paired(a, b, "generated")
        assert found is not None
        hits += found.low <= 0 <= found.high
    assert 178 <= hits <= 199


def test_other_windows_are_never_paired(caplog: pytest.LogCaptureFixture) -> None:
    a, b = pair(0.02, 0.06)
    b.runs[0]["window_losses"]["generated"].pop()
    assert compare.paired(a, b, "generated") is None
    a, b = pair(0.02, 0.06)
    b.metrics["fp/perplexity/generated"] = 40.0
    assert compare.paired(a, b, "generated") is None
    assert caplog.text.count("no paired interval") == 2


def test_a_baseline_gives_ratio_and_interval_within_its_bits() -> None:
    made = rows.make([r for r in examples.study() if r["status"] == "completed"])
    compare.against(made, "gptq")
    row = next(row for row in made if (row.method, row.bits) == ("quarot", "w4a4kv4"))
    base = next(row for row in made if (row.method, row.bits) == ("gptq", "w4a4kv4"))
    gaps = row.metrics["gap/generated"], base.metrics["gap/generated"]
    assert gaps[0] is not None and gaps[1] is not None
    assert row.metrics["ratio/generated"] == pytest.approx(gaps[0] / gaps[1])
    assert row.high["versus/generated"] < 0
    assert "versus/generated" not in base.metrics
    assert "ratio/generated" not in next(row for row in made if row.is_float).metrics


def test_an_unknown_baseline_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="did you mean gptq"):
        compare.against(rows.make(examples.study()), "gptqq")


def test_the_summary_claims_a_win_only_where_the_interval_allows() -> None:
    lines = {line.split(":")[0]: line for line in compare.summary(rows.make(examples.study()))}
    assert "quarot is best" in lines["embedded, w4a4kv4"] and "it beats gptq by 0.2" in lines["embedded, w4a4kv4"]
    assert "not separable from" in lines["embedded, w4a16"]
    assert len(lines) == 3


def test_the_summary_survives_runs_without_windows() -> None:
    runs = copy.deepcopy(examples.study()[1:3])
    for run in runs:
        del run["window_losses"]
    (line,) = compare.summary(rows.make(runs))
    assert line.endswith("No paired interval.")


def test_the_float_model_at_other_bits_is_one_row() -> None:
    runs = [examples.record("fp16", "w16", 0.0), examples.record("fp16", "w16", 0.0)]
    runs[1]["config"]["bits"] = {"name": "w4a4", "weight": 4, "act": 4, "kv": 16, "group": -1}
    runs[1]["config"]["method"]["grid"]["bits"] = 4
    runs.append(examples.record("rtn", "w4a16", 0.01))
    made = rows.make(runs)
    assert [(row.method, row.bits, len(row.runs)) for row in made] == [("fp16", "w16a16", 2), ("rtn", "w4a16", 1)]
    compare.against(made, "fp16")
    assert made[1].metrics["versus/generated"] == pytest.approx(made[1].metrics["gap/generated"])


def test_a_stress_tested_model_is_another_model() -> None:
    runs = [examples.record("rtn", "w4a16", 0.01) for _ in range(3)]
    runs[1]["config"]["model"]["outliers"] = {"kind": "rotate", "channels": 0, "scale": 1.0}
    runs[2]["config"]["model"]["outliers"] = {"kind": "scale", "channels": 4, "scale": 30.0}
    assert [row.model for row in rows.make(runs)] == ["embedded", "embedded +rotate", "embedded +scale 4 x 30"]


def test_stages_of_the_float_row_hide_and_show_nothing() -> None:
    made = rows.make([examples.record("fp16", "w16", 0.0), examples.record("rtn", "w4a16", 0.01)])
    assert [row.stages for row in made] == [{}, {}]


def test_where_the_class_of_recipes_lives_is_no_setting() -> None:
    runs = [examples.record("gptq", "w4a16", 0.01, seed=seed) for seed in (0, 1)]
    for run, where in zip(runs, ("old.Method", "new.Method"), strict=True):
        run["config"]["method"]["_target_"] = where
    (row,) = rows.make(runs)
    assert len(row.runs) == 2


def test_a_quantizer_of_16_bits_is_no_stage() -> None:
    runs = [examples.record(name, "w4a16", gap) for name, gap in (("gptq", 0.01), ("quarot", 0.02))]
    runs[0]["config"]["method"]["act"] = {"_target_": "stages.act.per_token.PerToken", "bits": 16}
    runs[1]["config"]["method"]["act"] = {"_target_": "stages.act.per_token.PerToken", "bits": 8}
    assert sorted(row.stages["act"] for row in rows.make(runs)) == ["none", "per_token"]


def test_many_settings_are_one_column_and_apart_in_csv() -> None:
    runs = [examples.record("gptq", "w4a16", 0.01 * i) for i in range(1, 4)]
    for i, run in enumerate(runs):
        run["config"]["method"]["solver"] |= {"a": i, "b": -i, "c": i * i}
    found = columns.find(rows.make(runs))
    assert [column.title for column in found if column.key.startswith("setting") and not column.csv_only] == [
        "settings"
    ]
    assert sum(column.key.startswith("setting/") and column.csv_only for column in found) == 3
    (shown,) = [column for column in found if column.key == "settings"]
    assert shown.text(rows.make(runs)[0]) == "solver.a=0, solver.b=0, solver.c=0"
