#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU: builds the extension with this machine's own torch and nvcc, runs the GPU tests and the
# benches, and writes a card per bench. Needs no network and nothing but torch, nvcc, a C++ compiler, ninja, pytest and hypothesis.
#
#   [OUT=results] [COMMIT=...] [PYTHON=python3] [CUDA_HOME=/usr/local/cuda] bash tools/gpu_check.sh
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-results}
PYTHON=${PYTHON:-python3}
COMMIT=${COMMIT:-$(git describe --always --dirty 2>/dev/null || echo unknown)}
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD
# The toolkit as NVIDIA installs it, unless told otherwise: an nvcc in PATH may be a wrapper elsewhere.
if [ -z "${CUDA_HOME:-}" ] && [ -x /usr/local/cuda/bin/nvcc ]; then export CUDA_HOME=/usr/local/cuda; fi

echo "== machine"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
nvcc --version | tail -2
"$PYTHON" -c 'import sys, torch; print("python", sys.version.split()[0], "torch", torch.__version__, "cuda", torch.version.cuda)'

echo "== build"
time M2_FORCE_CUDA=1 "$PYTHON" setup.py -q build_ext --inplace
"$PYTHON" -c 'from megatron_m2.ops import _extension; assert _extension.available("cuda")'

echo "== tests"
"$PYTHON" -m pytest -q tests/gpu tests/ops

echo "== benches"
"$PYTHON" tools/bench/ops.py --device cuda --cards "$OUT" --commit "$COMMIT"
"$PYTHON" tools/bench/prefix_tree.py --device cuda --cards "$OUT" --commit "$COMMIT"
