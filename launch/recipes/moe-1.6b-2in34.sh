#!/usr/bin/env bash
# MoE twin of the 1.6B models: 34 experts over 2 ranks; 16 GPUs and more (GPUS=16).
set -euo pipefail
PRESET=moe-1.6b-2in34
LAYOUT=(
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    --micro-batch-size 2 --expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall
)
# shellcheck source=launch/recipes/run.sh
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
