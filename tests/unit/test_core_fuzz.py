"""Random calls of the CPU core: every tier against the plain one, between guard pages (csrc/tests/fuzz.h).

Without libFuzzer the bytes are merely random; with it, inputs that reach new code breed. ``make fuzz`` goes on for as
long as one likes. A failing input replays: ``fuzz RUNS SEED`` and ``fuzzer FILE`` say which call it was.
"""

from __future__ import annotations

import logging
import re
import subprocess
from pathlib import Path

import core_fuzz
import pytest
from core_alone import address, run_alone

from qexp.kernels import build

log = logging.getLogger(__name__)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not build.load(), reason="no compiled kernels here: no C++ compiler, or it failed"),
]


@pytest.mark.parametrize("runs", [6000])  # about 15 s, after two minutes of compiling
def test_random_calls_agree_with_the_plain_tier(runs: int, tmp_path: Path) -> None:
    printed = run_alone(tmp_path, "fuzz", core_fuzz.core(), "address", address, [str(runs)])
    log.info(printed.strip())
    assert f"{runs} runs, all well" in printed


@pytest.mark.parametrize("seconds", [30])
def test_coverage_guided_calls_agree_with_the_plain_tier(seconds: int, tmp_path: Path) -> None:
    compiler = core_fuzz.clang()
    if compiler is None:
        pytest.skip("no clang++ on this machine, so no libFuzzer")
    if not core_fuzz.has_runtime(compiler, tmp_path):
        pytest.skip(f"{compiler} comes without libFuzzer (Debian: libclang-rt-14-dev)")
    program = core_fuzz.fuzzer(tmp_path, compiler)
    words = [f"-max_total_time={seconds}", "-seed=1", *core_fuzz.OPTIONS, f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run([program, *words], capture_output=True, text=True, timeout=20 * seconds, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    said = re.search(r"Done (\d+) runs", done.stderr)
    assert said is not None and int(said[1]) > 100, done.stderr[-4000:]
    log.info("%s of %d s; %s", said[0], seconds, re.findall(r"cov: .*", done.stderr)[-1])
