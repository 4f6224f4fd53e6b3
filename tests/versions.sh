#!/usr/bin/env bash
# What runs with which megatron-core: a table in Markdown, one column a version.
#   bash tests/versions.sh [VERSION ...]      by default 0.17.1 0.18.2 0.19.2
#
# Each version is installed into .versions/ beside the environment of launch/setup.sh, which gives
# everything else. "refused" means status 2 with an error that names the version needed; the output
# of what failed is in .versions/<version>/log.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$root"
[[ -x .venv/bin/python ]] || bash launch/setup.sh >&2
python=$root/.venv/bin/python
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore MPLBACKEND=Agg
versions=("$@")
((${#versions[@]})) || versions=(0.17.1 0.18.2 0.19.2)

tiny=(
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 32
    --max-position-embeddings 32 --position-embedding-type rope --micro-batch-size 2
    --global-batch-size 4 --train-iters 3 --lr 1e-3 --mock-data --tokenizer-type NullTokenizer
    --vocab-size 512 --eval-iters 0 --eval-interval 1000
    --ultramem-spans 1:2 --ultramem-num-keys 12 --ultramem-topk 6
)
features=(
    "layer, retrieval, golden values|-m pytest tests/memory/test_layer.py tests/memory/retrieval tests/memory/test_official_v1.py"
    "tables over ranks|-m pytest tests/memory/tables"
    "a loop of your own: DP, TP, tables, checkpoints|-m pytest tests/launch/test_own_loop.py"
    "\`ultramem train\`|-m ultramem_megatron train ${tiny[*]}"
    "\`ultramem plan\`|-m ultramem_megatron plan ${tiny[*]}"
)

try() { # feature's command, version: prints works, refused or FAILED
    local log=.versions/$2/log status=0
    # shellcheck disable=SC2086 # several words
    PYTHONPATH=$root/.versions/$2:$root "$python" $1 >"$log.part" 2>&1 || status=$?
    cat "$log.part" >>"$log"
    if ((status == 0)); then
        echo works
    elif ((status == 2)) && grep -q "^error: this command needs megatron-core" "$log.part"; then
        echo refused
    else
        echo FAILED
    fi
    rm "$log.part"
}

header="| megatron-core |"
rule="|---|"
for version in "${versions[@]}"; do
    if [[ ! -d .versions/$version/megatron ]]; then
        "$python" -m pip install --quiet --no-deps --target ".versions/$version" \
            "megatron-core==$version" >&2
    fi
    : >".versions/$version/log"
    header+=" $version |"
    rule+="---|"
done
printf '%s\n%s\n' "$header" "$rule"
failed=0
for feature in "${features[@]}"; do
    row="| ${feature%%|*} |"
    for version in "${versions[@]}"; do
        result=$(try "${feature#*|}" "$version")
        row+=" $result |"
        [[ $result != FAILED ]] || failed=1
    done
    echo "$row"
done
exit "$failed"
