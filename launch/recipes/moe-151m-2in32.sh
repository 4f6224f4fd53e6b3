#!/usr/bin/env bash
# MoE twin of the 151M models: 32 experts over 8 ranks, data parallelism.
set -euo pipefail
PRESET=moe-151m-2in32
LAYOUT=(
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    --micro-batch-size 16 --expert-model-parallel-size 8 --moe-token-dispatcher-type alltoall
)
# shellcheck source=launch/recipes/run.sh
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
