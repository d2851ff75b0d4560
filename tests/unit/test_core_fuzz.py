"""Random calls of the CPU core: every tier against the plain one, between guard pages (csrc/tests/fuzz.h).

Without libFuzzer the bytes are merely random; with it, inputs that reach new code breed. ``make fuzz`` goes on for as
long as one likes. A failing input replays: ``fuzz RUNS SEED`` and ``fuzzer FILE`` say which call it was.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import core_fuzz
import pytest
from core_alone import address, run_alone

from qexp.kernels import build

RUNS = 4000  # about 15 s with the sanitizers
SECONDS = 30

pytestmark = [pytest.mark.slow]


def test_random_calls_agree_with_the_plain_tier(tmp_path: Path, record_property: pytest.RecordProperty) -> None:
    if not build.load():
        pytest.skip(f"no compiled kernels: {build.info()['reason']}")
    printed = run_alone(tmp_path, "fuzz", core_fuzz.core(), "address", address, [str(RUNS)])
    record_property("runs", RUNS)
    assert f"{RUNS} runs, all well" in printed


def test_coverage_guided_calls_agree_with_the_plain_tier(tmp_path: Path, record_property) -> None:
    if not build.load():
        pytest.skip(f"no compiled kernels: {build.info()['reason']}")
    compiler = core_fuzz.clang()
    if compiler is None:
        pytest.skip("no clang++ on this machine, so no libFuzzer")
    if not core_fuzz.has_runtime(compiler, tmp_path):
        pytest.skip(f"{compiler} comes without libFuzzer (Debian: libclang-rt-14-dev)")
    program = core_fuzz.fuzzer(tmp_path, compiler)
    words = [f"-max_total_time={SECONDS}", "-seed=1", *core_fuzz.OPTIONS, f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run([program, *words], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    runs = int(re.search(r"Done (\d+) runs", done.stderr)[1])
    record_property("runs", runs)
    assert runs > 100
