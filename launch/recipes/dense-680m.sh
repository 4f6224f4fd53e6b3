#!/usr/bin/env bash
# Dense twin of the 680M models: data parallelism, 8 GPUs and more.
set -euo pipefail
PRESET=dense-680m
LAYOUT=(
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    --micro-batch-size 8
)
# shellcheck source=launch/recipes/run.sh
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
