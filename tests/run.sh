#!/usr/bin/env bash
# Makes the environment, if need be, and runs the tests.
#   bash tests/run.sh                        everything
#   bash tests/run.sh tests/data -k utf      pytest's arguments
#   bash tests/run.sh --slow                 what is left out otherwise: launched runs that are hurt
#   bash tests/run.sh --long                 what CI leaves out too: every recipe and the tutorials, as they stand
#   bash tests/run.sh --gpu                  kernels on this machine's GPU, which the others do not use
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$root"
bash launch/setup.sh
# One thread per process: the tests start several, and more threads than cores slow all down.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" MKL_NUM_THREADS="${MKL_NUM_THREADS:-1}"
export HF_HUB_OFFLINE=1 MPLBACKEND=Agg
if (($# == 0)); then # two files at a time; what waits for ranks leaves the other's core free
    set -- -n 2 --dist loadfile
elif [[ ${1:-} == --slow || ${1:-} == --long || ${1:-} == --gpu ]]; then
    [[ $1 != --gpu ]] || export ULTRAMEM_TEST_GPU=1
    set -- -m "${1#--}" "${@:2}"
fi
exec .venv/bin/python -m pytest --durations=15 "$@"
