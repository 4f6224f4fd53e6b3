#!/usr/bin/env bash
# Trains the models of this experiment at small scale; writes launch/results/main_params.csv and its picture.
#   bash launch/ablate_main_params.sh [--jobs 2] [--seeds 1 2 3]                  (all options: --help)
#   bash launch/ablate_main_params.sh --scale full -- FLAGS      prints the paper's runs, one command a line
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
bash "$root/launch/setup.sh" >&2
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$root/.venv/bin/python" -P -m launch.ablations main_params "$@"
