#!/usr/bin/env bash
# Dense twin of the 1.6B models: data parallelism, 8 GPUs and more.
set -euo pipefail
PRESET=dense-1.6b
LAYOUT=(
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    --micro-batch-size 4
)
# shellcheck source=launch/recipes/run.sh
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
