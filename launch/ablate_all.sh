#!/usr/bin/env bash
# Trains the models of all experiments at small scale, in about ten hours of a core; writes all CSVs of
# experiments in launch/results anew, and draws every picture there again. What is trained already stays.
#   bash launch/ablate_all.sh [--jobs 2] [--seeds 1 2 3]                      (all options: --help)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
bash "$root/launch/setup.sh" >&2
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
"$root/.venv/bin/python" -P -m launch.ablations all "$@"
"$root/.venv/bin/python" -P -m launch.ablations.tuning "$@"
results=$root/launch/results
"$root/.venv/bin/python" -P -m ultramem_megatron paper topology --csv "$results/topology.csv" --plot "$results/topology.png"
exec "$root/.venv/bin/python" -P -m launch.plots
