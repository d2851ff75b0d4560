"""``qexp-bench`` end to end on small shapes: the contract of its JSON, and that nothing measured is a mix-up."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import command, tiny

from qexp import bench, bench_ggml
from qexp.bench_kernels import BETTER_TIERS, Suite, rows
from qexp.bench_peers import PEERS, available
from qexp.bench_timing import QUICK, Pace, in_turn, interleaved, row
from qexp.kernels.ops import kernel_info

ROW = {"op": str, "backend": str, "m": int, "k": int, "n": int, "group": int, "ours_ms": float, "peers": dict}
SUITE = Suite((1, 17), ((256, 128),), (128, 768), 128, 1 << 14)


def silent(_: str, items: Any) -> Any:
    return items


def assert_contract(document: dict[str, Any]) -> None:
    """The keys of design.md section 3, on which scripts outside the project rely."""
    assert {"machine", "rows"} <= document.keys()
    assert {"processor", "cores", "threads", "kernels", "versions", "description"} <= document["machine"].keys()
    for each in document["rows"]:
        assert all(isinstance(each[key], kind) for key, kind in ROW.items()), each
        assert each["floor_ms"] is None or each["floor_ms"] > 0
        assert each["ours_ms"] >= each["ours_min_ms"] > 0
        assert all(isinstance(name, str) and ms > 0 for name, ms in each["peers"].items())


@pytest.mark.slow
def test_kernels_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(["kernels", "--quick", "--json", str(tmp_path / "b.json")])
    document = json.loads((tmp_path / "b.json").read_text())
    assert_contract(document)
    assert {each["op"] for each in document["rows"]} == {"w4a8", "linear_w4a8", "w4a4", "w4a16", "had_quant"}
    assert (tmp_path / "b.png").read_bytes()[:4] == b"\x89PNG"
    shown = capsys.readouterr().out
    assert "vs torch bf16" in shown and document["machine"]["description"] in shown


def test_a_model_end_to_end(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(*tiny(tiny_folder, tmp_path, "method=rtn", "bits=w4a8kv4")).code == 0
    folder = next(tmp_path.glob("*/record.json")).parent
    bench.main(["model", str(folder), "--quick", "--json", str(tmp_path / "m.json")])
    document = json.loads((tmp_path / "m.json").read_text())
    assert_contract(document)
    assert [(each["op"], each["m"]) for each in document["rows"]] == [("prefill", 48), ("decode", 1)]
    assert all(each["peers"].keys() == {"torch bf16", "torch fp32"} for each in document["rows"])
    assert document["model"]["kernels"] == {"w4a8": 21} and document["model"]["kv"] == "4 bits"
    weights = document["model"]["weight_bytes"]
    assert weights["ours"] < weights["torch bf16"] < weights["torch fp32"]
    assert "kernels: {'w4a8': 21}" in capsys.readouterr().out


def test_every_case_and_peer_is_measured() -> None:
    measured, missing = rows(SUITE, QUICK, silent)
    peers = {peer.name for peer in PEERS} - missing.keys()
    products = [each for each in measured if each["op"] != "had_quant"]
    lower = {"own avx2"} if kernel_info()["isa"] in BETTER_TIERS else set()
    assert len(products) == 4 * 2
    assert all(each["peers"].keys() == peers | (lower if each["op"] == "w4a8" else set()) for each in products)
    assert {each["m"] for each in products} == {1, 17}
    assert [(each["k"], each["peers"].keys()) for each in measured if each["op"] == "had_quant"] == [
        (128, {"memcpy"}), (768, {"memcpy"}),
    ]  # fmt: skip
    known = kernel_info()["compiled"]
    assert all((each["floor_ms"] is not None) == known for each in products)


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_a_peer_computes_or_says_why_not(peer: Any) -> None:
    found, missing = available()
    if peer not in found:
        assert "bench-peers" in missing[peer.name]
        pytest.skip(missing[peer.name])
    weight, x = torch.randn(128, 256), torch.randn(3, 256)
    answer = peer.prepare(weight, x, 128)()()
    if isinstance(answer, torch.Tensor):
        assert answer.shape == (3, 128)


def test_ggml_multiplies() -> None:
    pytest.importorskip("ggml", reason="ggml-python is not installed (qexp[bench-peers])")
    weight, x = torch.randn(64, 256), torch.randn(3, 256)
    product = bench_ggml.Product("Q4_0", weight, x)
    product()
    expected = x @ weight.T
    assert (product.answer() - expected).norm() < 0.15 * expected.norm()


def test_contenders_take_turns() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = interleaved(calls, Pace(3, 0.0))
    assert order == [*"aabbcc", *("aabbcc" * 3)]  # two to warm up and count, then rounds of one to wake and one to time
    assert all(len(each) == 3 for each in times.values())


def test_a_turn_is_as_long_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = [0.0], []  # a clock on which a call takes a second

    def call() -> None:
        now[0] += 1
        calls.append(now[0])

    monkeypatch.setattr("qexp.bench_timing.time.perf_counter", lambda: now[0])
    assert interleaved({"a": call}, Pace(1, 7))["a"] == [1000.0]
    assert len(calls) == 2 + 1 + 7


def test_copies_of_weights_are_taken_in_turn() -> None:
    made: list[int] = []
    used: list[int] = []

    def make() -> Any:
        me = len(made) + 1
        made.append(me)
        return lambda: used.append(me)

    call = in_turn(make, 50 << 20, reads_from_memory=True)
    for _ in range(5):
        call()
    assert used == [1, 2, 3, 4, 1]
    in_turn(make, 50 << 20, reads_from_memory=False)()
    assert len(made) == 5


def test_a_row_has_medians_and_least() -> None:
    about = {"op": "w4a8", "backend": "b", "m": 1, "k": 2, "n": 3, "group": 4}
    made = row(about, {"ours": [3.0, 1.0, 2.0], "peer": [6.0, 4.0, 9.0]}, 0.5)
    assert (made["ours_ms"], made["ours_min_ms"], made["peers"], made["peers_min_ms"]) == (
        2.0, 1.0, {"peer": 6.0}, {"peer": 4.0},
    )  # fmt: skip
    assert math.isclose(made["floor_ms"] or 0, 0.5)
