# What the recipes share: the plan, then the training. Sourced where PRESET and LAYOUT are set.
#   bash launch/recipes/NAME.sh [--dry-run] [more flags of `ultramem train`]
#
#   DATA=prefix       Megatron's indexed data set (DATA.bin, DATA.idx), and
#   TOKENIZER=folder  of a Hugging Face tokenizer; with neither: random mock data
#   RUN=runs/PRESET   checkpoints, TensorBoard
#   ASYNC_SAVE=0      1: training goes on while a checkpoint is written; default: 1 where no GPUs are
#   GPUS              that the printed plan is for; default: NNODES x NPROC, or what the recipe says
# and the settings of launch/torchrun.sh. Later flags override: --wandb-project NAME logs there too.
# shellcheck shell=bash
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
# shellcheck source=launch/settings.sh
source "$root/launch/settings.sh"
python=${PYTHON:-$root/.venv/bin/python}
require_python "$python"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
run=${RUN:-runs/$PRESET}
dry_run=()
if [[ ${1:-} == --dry-run ]]; then
    dry_run=(--dry-run)
    shift
fi

if [[ -n ${DATA:-} && -n ${TOKENIZER:-} ]]; then
    data=(--data-path "$DATA" --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TOKENIZER")
elif [[ -n ${DATA:-} ]]; then
    refuse "DATA=$DATA is given, TOKENIZER is not. Set TOKENIZER to the folder of its tokenizer."
elif [[ -n ${TOKENIZER:-} ]]; then
    refuse "TOKENIZER=$TOKENIZER is given, DATA is not. Set DATA to an indexed data set, a prefix."
else
    data=(--mock-data --tokenizer-type NullTokenizer --vocab-size 50304)
fi
if [[ -z ${GPUS:-} && -n ${NPROC:-} ]]; then
    require_nodes "${NNODES:-1}"
    require_number NPROC "$NPROC" 1
    most=${NNODES:-1}
    GPUS=$((${most#*:} * NPROC))
fi
require_number GPUS "${GPUS:=${PLAN_GPUS:-8}}" 1

# The process that would write for a GPU stays from save to save; nobody has run it yet.
if [[ -z ${ASYNC_SAVE:-} ]]; then
    ASYNC_SAVE=$(($(count_gpus) == 0))
fi
require_number ASYNC_SAVE "$ASYNC_SAVE" 0 1
saves=()
if [[ $ASYNC_SAVE == 1 ]]; then
    saves=(--async-save --use-persistent-ckpt-worker --async-strategy mcore)
fi

preset=$("$python" -m ultramem_megatron presets "$PRESET" --model --training)
read -ra preset <<<"$preset"
flags=(
    "${preset[@]}" "${LAYOUT[@]}" "${data[@]}"
    --save "$run/checkpoints" --load "$run/checkpoints" --ckpt-format torch_dist
    "${saves[@]}"
    --tensorboard-dir "$run/tensorboard" --log-interval 10
    --log-throughput --log-timers-to-tensorboard --log-memory-to-tensorboard
    "$@"
)
if ((${#dry_run[@]} > 0)) || [[ ${SLURM_NODEID:-0} == 0 ]]; then # once, not on every node
    "$python" -m ultramem_megatron plan "$PRESET" --gpus "$GPUS" "${LAYOUT[@]}" "$@"
fi
exec bash "$root/launch/torchrun.sh" "${dry_run[@]}" "${flags[@]}"
