"""Synthetic records for the tests of the report: plausible numbers, and every ugly case a folder of runs can hold."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

from qexp.report.record import SCHEMA, Record

WINDOWS = 40
FLOAT_LOSS = math.log(44.8)
UGLY = "naïve|<script>alert(1)</script> 量化"
STAGES: dict[str, dict[str, list[str]]] = {
    "fp16": {"transform": [], "grid": ["none"], "solver": ["rtn"]},
    "rtn": {"transform": [], "grid": ["integer"], "solver": ["rtn"]},
    "gptq": {"transform": [], "grid": ["integer"], "solver": ["gptq"]},
    "quarot": {"transform": ["fold_norm", "hadamard"], "grid": ["integer"], "solver": ["gptq"]},
    "smoothquant": {"transform": ["smooth"], "grid": ["integer"], "solver": ["rtn"]},
}
GAPS = {"w4a16": 0.01, "w3a16g128": 0.04, "w4a4kv4": 0.2}
OTHER = (("rtn", "w4a16", 0.03), ("gptq", "w4a16", 0.01), ("quarot", "w4a16", 0.02))
BITS = {"w4a16": (4, 16, 16, -1), "w3a16g128": (3, 16, 16, 128), "w4a4kv4": (4, 4, 4, -1), "w16": (16, 16, 16, -1)}


def config(method: str, bits: str, model: str = "embedded", seed: int = 0) -> dict[str, Any]:
    kinds = STAGES.get(method, STAGES["rtn"])
    weight, act, kv, group = BITS[bits]
    return {
        "seed": seed,
        "output_dir": f"outputs/{method}-{bits}-{seed}",
        "model": {"name": model, "path": None, "outliers": None},
        "bits": {"name": bits, "weight": weight, "act": act, "kv": kv, "group": group},
        "method": {
            "name": method,
            "transform": {name: _member("transform", name) for name in kinds["transform"]},
            "grid": _member("grid", kinds["grid"][0]) | {"bits": weight, "group": group},
            "solver": _member("solver", kinds["solver"][0]),
            "tuner": {},
        },
        "calibration": {"name": "generated", "samples": 128, "seed": seed},
        "eval": {"perplexity": ["generated"], "window_tokens": None, "limit": None},
    }


def record(method: str, bits: str, gap: float, *, seed: int = 0, model: str = "embedded", noise: int = 0) -> Record:
    """A completed run about ``gap`` nats above the float model; windows share their difficulty."""
    hard = random.Random("windows")
    own = random.Random(f"{method}{bits}{seed}{noise}")
    losses = [FLOAT_LOSS + hard.gauss(0, 0.2) + gap * (1 + own.gauss(0, 0.25)) for _ in range(WINDOWS)]
    perplexity = math.exp(sum(losses) / WINDOWS)
    hard = random.Random("windows")
    base = math.exp(sum(FLOAT_LOSS + hard.gauss(0, 0.2) for _ in range(WINDOWS)) / WINDOWS)
    weight, act, _, group = BITS[bits]
    return {
        "schema": SCHEMA,
        "status": "completed",
        "fingerprint": f"{random.Random(f'{method}{bits}{seed}{model}').getrandbits(48):012x}",
        "name": f"{method}-{bits}-s{seed}",
        "config": config(method, bits, model, seed),
        "warnings": [],
        "environment": {"torch": "2.13.0", "device": "cpu", "commit": "0123abc"},
        "metrics": {
            "perplexity/generated": perplexity,
            "fp/perplexity/generated": base,
            "perplexity/generated/ci95": [perplexity * 0.94, perplexity * 1.06],
            "divergence/kl/generated": max(gap, 0) * 1.4,
            "divergence/top1/generated": 1 - min(0.9, 2 * math.sqrt(max(gap, 0))) / 3,
            "accuracy/qexp_grammar": 0.81 - gap,
            "accuracy/qexp_grammar/stderr": 0.012,
            "fp/accuracy/qexp_grammar": 0.812,
            "size/bits_per_weight": weight + (0.25 if group == 128 else 0.06 if weight < 16 else 0),
            "size/bytes": int(6.5e6 * weight / 8),
            "size/kv_bytes_per_token": 6144,
        },
        "cost": {"quantize_seconds": 11.7 + own.random(), "evaluate_seconds": 21.2, "peak_rss_bytes": 910_000_000},
        "blocks": _blocks(gap if act < 16 else gap / 2, weight, own) if weight < 16 else [],
        "published": [],
        "window_losses": {"generated": losses},
    }


def failed() -> Record:
    """A run that died before it measured anything, under a hostile name."""
    run = record("rtn", "w4a16", 0.0)
    run["config"]["method"]["name"] = UGLY
    run.update(status="failed", name=UGLY, metrics={}, cost={}, blocks=[], fingerprint="dead00000000")
    run["error"] = "NumericalError: H of block 3 <down_proj> is not positive definite\n  damp 0.01"
    run["warnings"] = ["fell back to <b>CPU</b>"]
    del run["window_losses"]
    return run


def diverged() -> Record:
    """A run whose perplexity is not a number."""
    run = record("smoothquant", "w3a16g128", 0.2)
    run["metrics"]["perplexity/generated"] = math.nan
    run["metrics"]["divergence/kl/generated"] = math.inf
    run["window_losses"] = {"generated": [math.nan] * WINDOWS}
    return run


def with_activations(run: Record, layer: str = "layers.3.mlp.down_proj") -> Record:
    """Add an outlier surface: two channels thirty times the others before, none after."""
    own = random.Random(layer)
    before = [[abs(own.gauss(0, 1)) * (30 if c in (17, 40) else 1) for c in range(64)] for _ in range(48)]
    after = [[abs(own.gauss(0, 4)) for _ in range(64)] for _ in range(48)]
    entry = {"layer": layer, "before": before, "after": after, "kurtosis_before": 188.2, "kurtosis_after": 3.1}
    loud: dict[str, float | None] = {"kurtosis": 188.2, "peak": 31.0, "sqnr_db": 11.0}
    quiet: dict[str, float | None] = {"kurtosis": 3.1, "peak": 2.0, "sqnr_db": 19.5}
    inputs = [{"layer": f"layers.{i}.mlp.down_proj", "before": loud, "after": quiet} for i in range(6)]
    losses = {"learned_rotation": [4.2 + math.exp(-i / 20) for i in range(100)]}
    run["diagnostics"] = {"activations": [entry], "inputs": inputs, "losses": losses}  # type: ignore[typeddict-item]
    for block in run["blocks"]:
        told = {"plain": 0.2, "start": 0.11, "best": 0.01 * (1 + block["index"]), "seconds": 3.0}
        block["learned"] = {"kronecker": told}  # type: ignore[typeddict-unknown-key]
        block["losses"] = {"kronecker": [0.1 / (1 + i + block["index"]) for i in range(32)]}  # type: ignore[typeddict-unknown-key]
    return run


def study() -> list[Record]:
    """A float row, three methods at three bits, one setting with two seeds, a failed and a diverged run."""
    runs = [record("fp16", "w16", 0.0)]
    gaps = {"w4a16": (0.012, 0.006, 0.0058), "w3a16g128": (0.061, 0.027, 0.021), "w4a4kv4": (0.31, 0.27, 0.041)}
    for bits, (rtn, gptq, quarot) in gaps.items():
        runs += [record("rtn", bits, rtn), record("gptq", bits, gptq), record("quarot", bits, quarot)]
    runs.append(record("quarot", "w4a4kv4", 0.045, seed=1))
    with_activations(runs[9])
    runs[8]["warnings"] = ["token limit clipped to 512"]
    return [*runs, failed(), diverged()]


def models() -> list[Record]:
    """The study, and a second model without the float row; one of its rows has another window count."""
    others = [record(m, b, gap, model="other") for m, b, gap in OTHER]
    assert "window_losses" in others[-1]
    others[-1]["window_losses"]["generated"].pop()
    return [*study(), *others]


def many(settings: int = 21) -> list[Record]:
    """48 times ``settings`` records: four models, three bits, four methods, so many numbers of samples."""
    runs = []
    factors = {"rtn": 2.0, "gptq": 1.0, "quarot": 0.7, "smoothquant": 1.5}
    for model, bits, (method, factor), i in itertools.product(
        ("embedded", "llama3_8b", "qwen3_0_6b", "mistral_7b"), GAPS, factors.items(), range(settings)
    ):
        run = record(method, bits, GAPS[bits] * factor * (1 + i / 40), model=model, noise=i)
        run["config"]["calibration"]["samples"] = 8 * (i + 1)
        run["fingerprint"] = f"{len(runs):012x}"
        run["name"] += f"-{i}"
        runs.append(run)
    return runs


def _member(kind: str, name: str) -> dict[str, Any]:
    return {"_target_": f"qexp.stages.{kind}.{name}.{name.title().replace('_', '')}"}


def _blocks(gap: float, weight: int, own: random.Random) -> list[Any]:
    names = [*(f"self_attn.{n}_proj" for n in "qkvo"), *(f"mlp.{n}_proj" for n in ("gate", "up", "down"))]
    return [
        {
            "index": i,
            "seconds": 1.9,
            "layers": [
                {
                    "name": f"model.layers.{i}.{n}",
                    "bits": weight,
                    "error": gap * math.exp(own.gauss(0, 0.5)) / 3,
                    "sqnr_db": 20.0,
                }
                for n in names
            ],
        }
        for i in range(6)
    ]
