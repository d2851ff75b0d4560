#!/bin/sh
# Builds the CUDA kernels, checks them and prints their speed against the ceilings of the same run (G1 to G8 of
# docs/kernels.md). Under 8 minutes on an H200.  Usage, from a checkout, no installation: benchmarks/gpu.sh [OUT_FOLDER]
#
# Needs a python3 with a CUDA build of torch (any from 2.6 on), pytest and hypothesis; and nvcc 12.5 or newer. Without
# nvcc, carry a library: on another machine with nvcc run
#     QEXP_CUDA_ARCHS=90a python3 -c 'from qexp.kernels import cuda_build; print(cuda_build.library())'
# and start this script with QEXP_CUDA_LIBRARY set to the file that it names (it includes no torch and links CUDA's
# runtime statically, so it needs the driver alone).
set -u
cd "$(dirname "$0")/.." || exit 1
out=${1:-${OUT:-build/gpu}}
mkdir -p "$out"
export PYTHONPATH="$PWD:$PWD/tests:$PWD/tests/unit${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 QEXP_CACHE="${QEXP_CACHE:-$PWD/build/cache}"
python=${PYTHON:-python3}
status=0

echo "== build"
"$python" -c '
import time, torch
from qexp.kernels import cuda
start = time.time()
assert cuda.load(), cuda.reason()
print(torch.cuda.get_device_name(), "torch", torch.__version__, "archs", cuda.built_archs(), f"{time.time() - start:.0f} s")
' || exit 1

echo "== check"
timeout 150 "$python" -m pytest -q -m gpu -n 0 -p no:cacheprovider -k "not sanitizer and not emulation" tests/unit/test_cuda_ops.py \
    >"$out/check.log" 2>&1 || status=1
tail -n 12 "$out/check.log"

echo "== speed"
timeout 200 "$python" benchmarks/gpu_kernels.py --json "$out/gpu_kernels.json" 2>&1 | tee "$out/speed.log" || status=1

echo "== compute-sanitizer"
timeout 110 "$python" -m pytest -q -m gpu -n 0 -p no:cacheprovider -k "sanitizer or emulation" tests/unit/test_cuda_ops.py \
    >"$out/sanitizer.log" 2>&1 || status=1
tail -n 6 "$out/sanitizer.log"
exit $status
