"""A search draws overrides, gives each trial to one worker, loses none to a killed one, and ends with the front."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import report_records
import yaml
from optuna.trial import FixedTrial, TrialState

from qexp import compose, search, search_front, search_plan, search_space
from qexp.core.errors import UserError
from qexp.report import record
from qexp.search_desk import MOST_DEATHS, MOST_FAILURES, counted
from qexp.search_plan import Plan
from qexp.search_worker import work

TEXT = """
method: [rtn, gptq]
bits: [w2a16g64, w3a16g64, w4a16g64]
method.solver.damp_fraction: {low: 1e-3, high: 0.1, log: true, when: {method: gptq}}
"""


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    with compose.hydra():
        yield


def space_of(text: str) -> search_space.Space:
    return search_space.parse("mine", yaml.safe_load(text))


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    (tmp_path / "mine.yaml").write_text(TEXT)
    return Plan(
        space=str(tmp_path / "mine.yaml"),
        fixed=("tracking=none",),
        objectives=("divergence/kl/generated:min", "size/bits_per_weight:min"),
        study="mine",
        folder=str(tmp_path / "out"),
        storage=str(tmp_path / "study.journal"),
        trials=8,
        sampler="random",
        seed=0,
    )


class Runs:
    """Stands for qexp: a record whose KL follows from the words, written where a run writes it; counts its work."""

    def __init__(self, fails: str = "no such word") -> None:
        self.fails, self.words = fails, list[list[str]]()

    def __call__(self, words: Sequence[str], sweep: str) -> Path:
        self.words.append(list(words))
        if self.fails in " ".join(words):
            raise RuntimeError("out of\nmemory")
        values = dict(word.split("=", 1) for word in words)
        weight = int(values["bits"][1])
        run = report_records.record(values["method"], "w4a16", 1 / weight**2)
        run["metrics"]["divergence/kl/generated"] = (1.0 if values["method"] == "rtn" else 0.5) / weight**2
        run["metrics"]["size/bits_per_weight"] = weight
        folder = Path(values["output_dir"]) / f"{len(self.words)}-{sweep}"
        record.write(folder, run)
        return folder


def test_a_space_is_drawn_as_overrides() -> None:
    space = space_of(TEXT + "method/transform: {choices: [[], [fold_norm, hadamard]], when: {method: [gptq]}}\nseed: 3")
    one = {"method": "gptq", "bits": "w3a16g64", "method.solver.damp_fraction": 0.0123456789, "seed": "3"}
    assert space.draw(FixedTrial(one | {"method/transform": "[fold_norm,hadamard]"})) == {
        "method": "gptq",
        "bits": "w3a16g64",
        "method.solver.damp_fraction": "0.0123457",
        "method/transform": "[fold_norm,hadamard]",
        "seed": "3",
    }
    assert space.draw(FixedTrial(one | {"method": "rtn"})) == {"method": "rtn", "bits": "w3a16g64", "seed": "3"}
    assert space.varying == ("method", "bits", "method.solver.damp_fraction", "method/transform")


def test_numbers_are_whole_where_both_ends_are() -> None:
    whole, real = space_of("a.b: {low: 2, high: 4}\nc.d: {low: 2, high: 4.5}").parameters
    assert isinstance(whole, search_space.Range) and whole.whole and whole.ends == ("2", "4")
    assert isinstance(real, search_space.Range) and not real.whole and real.ends == ("2", "4.5")


def test_every_end_is_probed_under_every_group() -> None:
    probes = list(space_of(TEXT).probes())
    assert {(p["method"], p["bits"]) for p in probes} == {
        (method, f"w{bits}a16g64") for method in ("rtn", "gptq") for bits in (2, 3, 4)
    }
    damps = {(p["bits"], p.get("method.solver.damp_fraction")) for p in probes if p["method"] == "gptq"}
    assert damps == {(f"w{bits}a16g64", damp) for bits in (2, 3, 4) for damp in ("0.001", "0.1")}
    assert all("method.solver.damp_fraction" not in p for p in probes if p["method"] == "rtn")


def test_of_a_large_space_a_sample_is_probed() -> None:
    space = space_of("\n".join(f"{key}: [{', '.join(map(str, range(40)))}]" for key in "abcdefgh"))
    probes = list(space.probes())
    assert len(probes) == search_space.MOST_PROBES
    assert all(len({probe[key] for probe in probes}) > 30 for key in "abcdefgh")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[1, 2]", "is list; need a mapping"),
        ("a: {low: 1}", "neither choices nor both of low and high"),
        ("a: {low: 3, high: 1}", "from 3 to 1; need low below high"),
        ("a: {low: 0, high: 1, log: true}", "low above 0"),
        ("a: {low: x, high: 1}", "a has 'x'; need numbers"),
        ("a: {lo: 1, high: 2}", "a has lo; need of low"),
        ("a: []", "a has no choices"),
        ("a: [1, 1]", "a choice twice"),
        ("a: {choices: [1], when: {b: 1}}\nb: [1]", "depends on b; need a list of choices above it"),
        ("b: [1]\na: {choices: [1], when: {b: 2}}", "depends on b=2; need one of 1"),
    ],
)
def test_a_bad_space_is_one_line(text: str, told: str) -> None:
    with pytest.raises(UserError, match=r"^[^\n]*$") as raised:
        space_of(text)
    assert told in str(raised.value)


@pytest.mark.parametrize("name", ["bits_and_groups", "gptq"])
@pytest.mark.slow
def test_the_saved_spaces_can_be_searched(name: str, plan: Plan) -> None:
    space = search_space.read(name)
    search_plan.check(replace(plan, space=name, fixed=()), space)
    assert len(list(space.probes())) > 5


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["space=nope"], "known: bits_and_groups, gptq"),
        ([], "0 spaces; need one"),
        (["space=gptq", "--objectives", "size/bitz:min"], "did you mean size/bytes?"),
        (["space=gptq", "--objectives", "size/bytes"], "<metric>:min or <metric>:max"),
        (["space=gptq", "--objectives", "speed/decode_tokens_per_s:max"], "is not measured"),
        (["space=gptq", "bits.wait=3"], "did you mean bits.weight?"),
        (["space=gptq", "bits=4"], "bits=4 names nothing"),
        (["space=gptq", "output_dir=/proc/here"], "cannot be used"),
        (["space=gptq", "eval=none"], "need objectives"),
        (["space=gptq", "device=abacus"], "device='abacus' is unknown"),
        (["space={mine}", "method/solver=rtn"], "when: {method: [gptq]}"),
        (["space=gptq", "--storage", "nosql://x"], "--storage nosql://x"),
    ],
)
def test_a_mistake_is_told_before_any_trial(
    arguments: list[str], told: str, plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.format(mine=plan.space) if word.startswith("space={") else word for word in arguments]
    with pytest.raises(SystemExit) as ended:
        search.main([f"output_dir={tmp_path}/out", *words])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("qexp-search: ") and told in error and error.count("\n") == 1
    assert not list(tmp_path.glob("out/*/record.json"))


def test_what_follows_objectives_may_be_overrides() -> None:
    arguments = search._parser().parse_intermixed_args(
        ["space=gptq", "--objectives", "size/bytes:min", "cost/quantize_seconds:min", "bits=w3a16", "--trials", "3"]
    )
    plan = search.plan_of(arguments)
    assert plan.objectives == ("size/bytes:min", "cost/quantize_seconds:min")
    assert (plan.fixed, plan.folder, plan.study, plan.trials) == (("bits=w3a16",), "outputs/gptq", "gptq", 3)
    assert Plan.from_json(plan.to_json()) == plan


def test_without_optuna_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(SystemExit) as ended:
        search.main(["space=gptq"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == 'qexp-search: optuna is not installed; need pip install "qexp[search]"\n'


def test_bits_set_one_by_one_are_named_as_in_any_other_run(plan: Plan) -> None:
    words = plan.overrides({"method": "gptq", "bits.weight": "3", "bits.group": "64"})
    assert words[-1] == "bits.name=w3a16g64"
    assert compose.composed(words)["bits"] == compose.composed(["bits=w3a16g64"])["bits"]
    assert plan.overrides({"bits": "w3a16g64"})[-1] == "bits=w3a16g64"


def test_a_search_ends_with_the_front(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    desk, runs = plan.desk(), Runs()
    work(desk, plan, "one", runs)
    ended = counted(desk.study.get_trials())
    assert len(ended) == len(runs.words) == plan.trials
    assert len({tuple(words) for words in runs.words}) == plan.trials, "a setting was run twice"

    points = search_front.front(desk.study, plan)
    tried = {(values["method"], values["bits"]) for t in ended for values in [t.user_attrs["drawn"]]}
    best = {("gptq" if ("gptq", bits) in tried else "rtn", bits) for _, bits in tried}
    assert {(p.drawn["method"], p.drawn["bits"]) for p in points} == best
    assert [p.values for p in points] == sorted(p.values for p in points)

    paths = search_front.write(plan, points, len(ended))
    told = json.loads(paths[0].read_text())
    assert told["study"] == "mine" and told["trials"] == plan.trials
    for entry, point in zip(told["front"], points, strict=True):
        stored = record.read(Path(entry["folder"]) / "record.json")["metrics"]
        assert entry["values"] == {key: stored[key] for key in ("divergence/kl/generated", "size/bits_per_weight")}
        assert entry["overrides"] == list(point.overrides)
        compose.composed(entry["overrides"])
    lines = list(csv.DictReader(paths[1].open()))
    assert [float(line["size/bits_per_weight"]) for line in lines] == [p.values[1] for p in points]

    search_front.show(plan, desk.space, points)
    shown = capsys.readouterr().out
    assert all(point.command in shown for point in points) and "Pareto front" in shown


def test_an_interrupted_search_draws_what_a_whole_one_draws(plan: Plan, tmp_path: Path) -> None:
    whole = Runs()
    work(plan.desk(), plan, "one", whole)
    short = replace(plan, storage=str(tmp_path / "short.journal"), trials=3)
    parts = Runs()
    work(short.desk(), short, "one", parts)
    assert len(parts.words) == 3
    longer = replace(short, trials=plan.trials)
    work(longer.desk(), longer, "two", parts)
    assert parts.words == whole.words


def test_a_trial_that_fails_has_its_cause_and_the_search_goes_on(plan: Plan) -> None:
    desk, runs = plan.desk(), Runs(fails="w2a16g64")
    work(desk, plan, "one", runs)
    states = [t.state for t in counted(desk.study.get_trials())]
    assert len(states) == plan.trials and 0 < states.count(TrialState.FAIL) < plan.trials
    causes = search_front.causes(desk.study)
    assert len(causes) == states.count(TrialState.FAIL)
    assert all("bits=w2a16g64" in line and line.endswith("RuntimeError: out of memory") for line in causes)


def test_a_search_of_which_nothing_works_stops(plan: Plan) -> None:
    runs = Runs(fails="method")
    work(plan.desk(), plan, "one", runs)
    assert len(runs.words) == MOST_FAILURES


def test_a_small_space_is_searched_whole_and_no_further(plan: Plan) -> None:
    Path(plan.space).write_text("method: [rtn, gptq]\nbits: [w2a16g64, w3a16g64]")
    runs = Runs()
    work(plan.desk(), plan, "one", runs)
    assert len(runs.words) == 4


def test_a_value_that_is_not_finite_fails_the_trial(plan: Plan) -> None:
    class Broken(Runs):
        def __call__(self, words: Sequence[str], sweep: str) -> Path:
            folder = super().__call__(words, sweep)
            run = record.read(folder / "record.json")
            run["metrics"]["divergence/kl/generated"] = float("nan")
            record.write(folder, run)
            return folder

    desk = plan.desk()
    work(desk, plan, "one", Broken())
    assert all(line.endswith("divergence/kl/generated is not finite") for line in search_front.causes(desk.study))
    assert search_front.front(desk.study, plan) == []


def test_a_study_is_not_mixed_with_another(plan: Plan) -> None:
    plan.desk()
    with pytest.raises(UserError, match="begun with another objectives"):
        replace(plan, objectives=("size/bytes:min", "size/bits_per_weight:min")).desk()
    with pytest.raises(UserError, match="begun with another fixed"):
        replace(plan, fixed=("seed=1",)).desk()
    replace(plan, trials=80, sampler="tpe").desk()


@pytest.mark.parametrize("storage", ["journal", "sqlite"])
def test_a_database_serves_as_well_as_a_journal(storage: str, plan: Plan, tmp_path: Path) -> None:
    where = f"sqlite:///{tmp_path}/study.db" if storage == "sqlite" else plan.storage
    one = replace(plan, storage=where, trials=3, sampler="nsga2")
    work(one.desk(), one, "one", Runs())
    assert len(counted(one.desk().study.get_trials())) == 3


DIES = """
import os, signal, sys
from pathlib import Path
from qexp import compose
from qexp.search_plan import Plan
from qexp.search_worker import work

def die(words, sweep):
    Path(sys.argv[2]).write_text(" ".join(words))
    os.kill(os.getpid(), signal.SIGKILL)

plan = Plan.from_json(sys.argv[1])
with compose.hydra():
    work(plan.desk(), plan, sys.argv[3], die)
"""


def killed(plan: Plan, tmp_path: Path, worker: str) -> list[str]:
    """The words of the trial over which a worker was killed."""
    arguments = [plan.to_json(), str(tmp_path / "words"), worker]
    done = subprocess.run([sys.executable, "-c", DIES, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return (tmp_path / "words").read_text().split(" ")


def test_the_trial_of_a_killed_worker_is_run_again(plan: Plan, tmp_path: Path) -> None:
    words = killed(plan, tmp_path, "dead")
    desk, runs = plan.desk(), Runs()
    assert [t.state for t in desk.study.get_trials()] == [TrialState.RUNNING]
    assert not desk.is_alive("dead")
    work(desk, plan, "alive", runs)
    assert runs.words[0] == words, "the lost trial comes first, with the same words: the run continues"
    assert len(runs.words) == len(counted(desk.study.get_trials())) == plan.trials, "nothing lost, nothing too much"
    assert not [t for t in desk.study.get_trials() if t.state == TrialState.RUNNING]


def test_a_trial_over_which_every_worker_dies_is_given_up(plan: Plan, tmp_path: Path) -> None:
    words = {tuple(killed(plan, tmp_path, f"dead{i}")) for i in range(MOST_DEATHS)}
    assert len(words) == 1
    desk, runs = plan.desk(), Runs()
    work(desk, plan, "alive", runs)
    assert next(iter(words)) not in {tuple(one) for one in runs.words}
    assert f"its process died {MOST_DEATHS} times" in search_front.causes(desk.study)[0]


def test_the_trial_of_a_living_worker_is_left_to_it(plan: Plan) -> None:
    desk = plan.desk()
    with desk.working("busy"):
        taken = desk.take("busy")
        assert taken is not None
        others = Runs()
        work(plan.desk(), plan, "other", others)
        assert desk.study.get_trials()[0].state == TrialState.RUNNING
        assert len(others.words) == plan.trials - 1, "together they have the trials that were asked for"
        desk.finish(taken[0], [0.1, 2.0], Path("somewhere"))
    assert not desk.is_alive("busy")
    assert len(counted(desk.study.get_trials())) == plan.trials


def test_a_worker_that_died_at_the_desk_leaves_no_trial_behind(plan: Plan) -> None:
    desk = plan.desk()
    desk.study.ask()  # RUNNING, unsigned, nothing drawn
    runs = Runs()
    work(desk, plan, "alive", runs)
    assert len(runs.words) == plan.trials


def test_samplers_know_their_names() -> None:
    from qexp.search_desk import SAMPLERS, sampler_of

    kinds: list[Any] = [optuna.samplers.TPESampler, optuna.samplers.NSGAIISampler, optuna.samplers.RandomSampler]
    assert [type(sampler_of(name, 0, 0)) for name in SAMPLERS] == kinds
