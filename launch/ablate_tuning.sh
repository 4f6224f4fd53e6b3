#!/usr/bin/env bash
# Teaches a trained model new definitions in several ways; writes launch/results/tuning.csv and its picture.
#   bash launch/ablate_tuning.sh [--jobs 1] [--seeds 1 2 3]                  (all options: --help)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
bash "$root/launch/setup.sh" >&2
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$root/.venv/bin/python" -P -m launch.ablations.tuning "$@"
