#!/usr/bin/env bash
# Upstream's own unit tests on this CPU, with our patches applied; patches/README.md says what they tell.
#   MEGATRON_LM_PATH=../Megatron-LM bash tests/upstream.sh                 one rank, all folders (hours)
#   MEGATRON_LM_PATH=... bash tests/upstream.sh --ranks 4 distributed      four ranks, one folder
#   MEGATRON_LM_PATH=... bash tests/upstream.sh test_utils.py -- -k safe   after --: for pytest
# Results are in --out (runs/upstream-ranksN): what is there is not run again, so that a run can be
# ended and started anew. Status 1 if something failed that no line of tests/upstream/reasons.txt covers.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
if [[ -z ${MEGATRON_LM_PATH:-} ]]; then
    echo "error: MEGATRON_LM_PATH is not set. Set it to a checkout of Megatron-LM, branch core_r0.19.0." >&2
    exit 2
fi
MEGATRON_LM_PATH=$(realpath -m "$MEGATRON_LM_PATH")
export MEGATRON_LM_PATH CUDA_VISIBLE_DEVICES=
cd "$root"
[[ -x .venv/bin/python ]] || bash launch/setup.sh >&2
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1 MPLBACKEND=Agg PYTHONWARNINGS=ignore
export PYTHONDONTWRITEBYTECODE=1
export TRITON_INTERPRET=1 # upstream's kernels run, slowly, where Triton would compile them for a GPU
exec .venv/bin/python -m tests.upstream "$@"
