#!/usr/bin/env bash
# MoE twin of the 680M models: 33 experts over 3 ranks, so multiples of 3 GPUs (24 by default).
set -euo pipefail
PLAN_GPUS=24
PRESET=moe-680m-2in33
LAYOUT=(
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    --micro-batch-size 4 --global-batch-size 2016 # 24 does not divide the paper's 2048
    --expert-model-parallel-size 3 --moe-token-dispatcher-type alltoall
)
# shellcheck source=launch/recipes/run.sh
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
