# What the recipes share: the plan, then the training. Sourced where PRESET and LAYOUT are set.
#   bash launch/recipes/NAME.sh [--dry-run] [more flags of `ultramem train`]
#
#   DATA=prefix       Megatron's indexed data set (DATA.bin, DATA.idx); none: random mock data
#   TOKENIZER=folder  of a Hugging Face tokenizer; needed with DATA
#   RUN=runs/PRESET   checkpoints, TensorBoard
# and the settings of launch/torchrun.sh.
# shellcheck shell=bash
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
python=${PYTHON:-$root/.venv/bin/python}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
run=${RUN:-runs/$PRESET}
dry_run=()
if [[ ${1:-} == --dry-run ]]; then
    dry_run=(--dry-run)
    shift
fi

read -ra preset <<<"$("$python" -m ultramem_megatron presets "$PRESET" --model --training)"
if [[ -n ${DATA:-} ]]; then
    data=(--data-path "$DATA" --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TOKENIZER")
else
    data=(--mock-data --tokenizer-type NullTokenizer --vocab-size 50304)
fi
flags=(
    "${preset[@]}" "${LAYOUT[@]}" "${data[@]}"
    --save "$run/checkpoints" --load "$run/checkpoints" --save-interval 1000 --ckpt-format torch_dist
    --tensorboard-dir "$run/tensorboard" --log-interval 10
    "$@"
)
if ((${#dry_run[@]} > 0)) || [[ ${SLURM_NODEID:-0} == 0 ]]; then # once, not on every node
    "$python" -m ultramem_megatron plan "$PRESET" --gpus "${GPUS:-8}" "${LAYOUT[@]}" "$@"
fi
exec bash "$root/launch/torchrun.sh" "${dry_run[@]}" "${flags[@]}"
