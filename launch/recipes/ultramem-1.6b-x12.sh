#!/usr/bin/env bash
# UltraMem 1.6B: tensor parallelism over 2 GPUs; each table over all ranks of the run.
set -euo pipefail
PRESET=ultramem-1.6b-x12
LAYOUT=(
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    --micro-batch-size 4 --tensor-model-parallel-size 2 --sequence-parallel
)
# shellcheck source=launch/recipes/run.sh
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
