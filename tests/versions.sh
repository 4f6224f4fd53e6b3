#!/usr/bin/env bash
# What runs with which megatron-core, and with which torch: two tables in Markdown.
#   bash tests/versions.sh
#   MEGATRON="0.18.2" TORCH="" bash tests/versions.sh       some of them; TORCH="": none
#
# Each megatron-core is installed into .versions/ beside the environment of launch/setup.sh, which
# gives everything else; each torch gets an environment of its own there (5 GB). "refused" means
# status 2 with an error that names the version needed; output is in .versions/*/log.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$root"
[[ -x .venv/bin/python ]] || bash launch/setup.sh >&2
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore MPLBACKEND=Agg
read -ra megatrons <<<"${MEGATRON-0.17.1 0.18.2 0.19.2}"
read -ra torches <<<"${TORCH-2.11.0}" # the oldest that pyproject.toml promises

tiny=(
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 32
    --max-position-embeddings 32 --position-embedding-type rope --micro-batch-size 2
    --global-batch-size 4 --train-iters 3 --lr 1e-3 --mock-data --tokenizer-type NullTokenizer
    --vocab-size 512 --eval-iters 0 --eval-interval 1000
    --ultramem-spans 1:2 --ultramem-num-keys 12 --ultramem-topk 6
)
rows_of_megatron=(
    "layer, retrieval, golden values|-m pytest tests/memory/test_layer.py tests/memory/retrieval tests/memory/test_official_v1.py"
    "tables over ranks|-m pytest tests/memory/tables"
    "a loop of your own: DP, TP, tables, checkpoints|-m pytest tests/launch/test_own_loop.py"
    "\`ultramem train\`|-m ultramem_megatron train ${tiny[*]}"
    "\`ultramem plan\`|-m ultramem_megatron plan ${tiny[*]}"
)
rows_of_torch=(
    "layers, tables|-m pytest tests/memory"
    "kernels, interpreted and compiled|-m pytest tests/kernels"
    "\`ultramem train\`|-m ultramem_megatron train ${tiny[*]}"
)

megatron_beside_the_rest() { # version
    python=$root/.venv/bin/python packages=$folder
    [[ -d $folder/megatron ]] || "$python" -m pip install --quiet --no-deps \
        --target "$folder" "megatron-core==$1" >&2
}

torch_with_the_rest() { # version
    python=$folder/bin/python packages=
    [[ ! -e $folder/complete ]] || return 0
    .venv/bin/python -m venv --clear "$folder"
    grep -vE '^(torch|numpy)==' requirements.txt >"$folder/others.txt"
    # Triton 3.6, of torch 2.11, interprets kernels with what NumPy 2.4 no longer does.
    "$python" -m pip install --quiet "torch==$1" "numpy<2.4" --requirement "$folder/others.txt" \
        pytest hypothesis >&2
    : >"$folder/complete"
}

try() { # command: prints works, refused or FAILED
    local status=0
    # shellcheck disable=SC2086 # several words
    PYTHONPATH=${packages:+$packages:}$root "$python" $1 >"$folder/log.part" 2>&1 || status=$?
    cat "$folder/log.part" >>"$folder/log"
    if ((status == 0)); then
        echo works
    elif ((status == 2)) && grep -q "^error: this command needs megatron-core" "$folder/log.part"; then
        echo refused
    else
        echo FAILED
    fi
    rm "$folder/log.part"
}

failed=0
table() { # what is varied; of its versions and rows
    local version row result line
    ((${#versions[@]})) || return 0
    printf '|'
    printf ' %s |' "$1" "${versions[@]}"
    printf '\n|---|'
    printf -- '---|%.0s' "${versions[@]}"
    echo
    for row in "${rows[@]}"; do
        line="| ${row%%|*} |"
        for version in "${versions[@]}"; do
            folder=$root/.versions/$1-$version
            if [[ $1 == torch ]]; then
                torch_with_the_rest "$version"
            else
                megatron_beside_the_rest "$version"
            fi
            result=$(try "${row#*|}")
            line+=" $result |"
            [[ $result != FAILED ]] || failed=1
        done
        echo "$line"
    done
    echo
}

rm -f .versions/*/log
versions=("${megatrons[@]}") rows=("${rows_of_megatron[@]}")
table megatron-core
versions=("${torches[@]}") rows=("${rows_of_torch[@]}")
table torch
exit "$failed"
