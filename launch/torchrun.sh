#!/usr/bin/env bash
# One training, on this node or on many: the same command on each of them.
#   bash launch/torchrun.sh [--dry-run] <flags of `ultramem train`>
#
#   NNODES=1            nodes
#   NPROC=<GPUs, or 2>  ranks on each node
#   MASTER_ADDR, MASTER_PORT=29500   host of the rendezvous, a node of the run; needed with NNODES > 1
#   RUN_ID=ultramem     the same on all nodes of a run, and of this run alone
#   MAX_RESTARTS=3      restarts after a fault, each from the newest complete checkpoint
#   STALL_SECONDS=600   a collective that takes longer ends the attempt
#   JOIN_SECONDS=600    how long a node waits for the others, at the start and after a fault
#   CHECK_SUMS=1        0: do not check the checkpoint, for one saved without --verify-integrity
#   LOG_DIR=logs        LOG_DIR/<run>/attempt_<n>/<rank>/{stdout,stderr}.log
#   PYTHON=<checkout>/.venv/bin/python
#
# Give --save and --load the same folder: a restart continues from there. SIGTERM to this script
# saves a checkpoint and ends the run with status 0.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
dry_run=
if [[ ${1:-} == --dry-run ]]; then
    dry_run=1
    shift
fi

count_gpus() {
    local gpus
    gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || true
    echo "$((gpus > 0 ? gpus : 2))"
}

python=${PYTHON:-$root/.venv/bin/python}
nodes=${NNODES:-1}
if ((nodes > 1)) && [[ -z ${MASTER_ADDR:-} ]]; then
    echo "error: NNODES=$nodes needs MASTER_ADDR, the name or address of one of the nodes." >&2
    exit 2
fi
endpoint=${MASTER_ADDR:-127.0.0.1}:${MASTER_PORT:-29500}
rendezvous=(--rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id "${RUN_ID:-ultramem}")
rendezvous+=(--rdzv-conf "join_timeout=${JOIN_SECONDS:-600},read_timeout=60")
if ((nodes == 1)); then # port 0: several runs on one machine do not meet
    rendezvous=(--rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0 --local-addr 127.0.0.1)
    rendezvous+=(--rdzv-id "${RUN_ID:-ultramem}")
    : "${GLOO_SOCKET_IFNAME:=lo}"
    export GLOO_SOCKET_IFNAME
fi
stall=${STALL_SECONDS:-600}
sums=(--verify-integrity)
if [[ ${CHECK_SUMS:-1} == 0 ]]; then
    sums=()
fi
command=(
    "$python" -m torch.distributed.run
    --nnodes "$nodes" --nproc-per-node "${NPROC:-$(count_gpus)}" "${rendezvous[@]}"
    --max-restarts "${MAX_RESTARTS:-3}" --monitor-interval 1
    # SIGTERM is for the ranks, which save; torchrun would end them while they do.
    --signals-to-handle "SIGINT,SIGHUP,SIGQUIT"
    --log-dir "${LOG_DIR:-logs}" --tee 3
    -m ultramem_megatron train
    # Start-up may take longer than a step: at least a minute, Megatron counts whole ones.
    --distributed-timeout-minutes "$(((stall + 59) / 60))"
    --distributed-timeout-seconds-after-init "$stall"
    --exit-signal-handler "${sums[@]}"
    "$@"
)

if [[ -n $dry_run ]]; then
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
# A node that comes back into a run finds the new round's address only without the shared store.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# Once each, and only when Megatron listens: before, the signal is lost; at exit, it would kill.
pass_on_sigterm() {
    local rank ignored waiting=
    for rank in $(pgrep -P "$agent"); do
        ignored=$(sed -n 's/^SigIgn:\t//p' "/proc/$rank/status" 2>/dev/null) || continue
        if ((16#${ignored:-0} & 1 << 14)); then
            waiting=1
        elif [[ -z ${told[$rank]:-} ]]; then
            told[rank]=1
            kill -TERM "$rank" 2>/dev/null || true
        fi
    done
    [[ -z $waiting ]] || echo "torchrun.sh: SIGTERM waits for training to begin"
}

(
    trap '' TERM # torchrun and its ranks inherit this
    export ULTRAMEM_TORCHRUN_PID="$BASHPID"
    exec "${command[@]}"
) &
agent=$!
stopping=
told=()
trap 'stopping=1' TERM
trap 'kill -INT "$agent"' INT
while kill -0 "$agent" 2>/dev/null; do
    if [[ -n $stopping ]]; then
        pass_on_sigterm
    fi
    sleep 1 &
    wait "$!" || true
done
status=0
wait "$agent" || status=$?
if ((status > 128)); then
    echo "torchrun.sh: torchrun was killed (signal $((status - 128))), its ranks end with it." \
        "Start again to go on from the newest complete checkpoint." >&2
fi
exit "$status"
