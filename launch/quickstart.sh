#!/usr/bin/env bash
# From nothing to a trained UltraMem GPT: environment, text, training, resume, sample, report.
#   bash launch/quickstart.sh
#   bash launch/quickstart.sh --text PATH --steps 400      (all options: --help)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
SECONDS=0
bash "$root/launch/setup.sh"
export QUICKSTART_SETUP_SECONDS=$SECONDS
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
# -P: a folder named launch where this is called from must not be taken for ours.
exec "$root/.venv/bin/python" -P -m launch.quickstart "$@"
