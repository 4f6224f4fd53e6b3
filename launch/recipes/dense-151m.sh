#!/usr/bin/env bash
# Dense twin of the 151M models: data parallelism, from one GPU up.
set -euo pipefail
PRESET=dense-151m
LAYOUT=(
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    --micro-batch-size 16
)
# shellcheck source=launch/recipes/run.sh
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
