#!/usr/bin/env bash
# UltraMem 151M: data parallelism; each table over all ranks of the run.
set -euo pipefail
PRESET=ultramem-151m-x12
LAYOUT=(
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    --micro-batch-size 16
)
# shellcheck source=launch/recipes/run.sh
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
