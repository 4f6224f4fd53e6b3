#!/usr/bin/env bash
# Makes an environment with FBGEMM for CPUs, apart from .venv: it wants another torch.
#   bash launch/benchmarks/setup_fbgemm.sh          in .venv-fbgemm: some 6 GB, once
#   FBGEMM_ENV=/elsewhere bash launch/benchmarks/setup_fbgemm.sh
# `ultramem bench kernels run` finds it there, and has a row more beside the lookup.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
env=${FBGEMM_ENV:-$root/.venv-fbgemm}
packages=("fbgemm-gpu-cpu==1.9.0" "torch==2.14.1" "numpy")
stamp=$env/.made-from
# shellcheck source=launch/settings.sh
source "$root/launch/settings.sh"
# shellcheck source=launch/find_python.sh
source "$root/launch/find_python.sh"

main() {
    take_no_words "$0" "$@"
    if [[ -f $stamp ]] && [[ $(<"$stamp") == "${packages[*]}" ]]; then
        return
    fi
    if [[ -e $env && ! -f $env/.being-made && ! -f $stamp ]] && [[ -n $(ls -A "$env") ]]; then
        echo "error: $env is there and not made by this script. Set FBGEMM_ENV to another folder." >&2
        return 1
    fi
    make_venv "$env"
    : >"$env/.being-made"
    env -u PYTHONHOME -u PYTHONPATH PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 \
        "$env/bin/python" -m pip --quiet install "${packages[@]}"
    echo "${packages[*]}" >"$stamp"
    rm "$env/.being-made"
    echo "FBGEMM is in $env."
}

main "$@"
