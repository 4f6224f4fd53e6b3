#!/usr/bin/env bash
# One training, on this node or on many: the same command on each of them.
#   bash launch/torchrun.sh [--dry-run] <flags of `ultramem train`>
#
#   NNODES=1            nodes, or MIN:MAX for as many as there are
#   NPROC=<GPUs, or 2>  ranks on each node; the GPUs that CUDA_VISIBLE_DEVICES leaves
#   MASTER_ADDR, MASTER_PORT=29500   host of the rendezvous, a node of the run; needed with NNODES > 1
#   RUN_ID=ultramem     the same on all nodes of a run, and of this run alone
#   MAX_RESTARTS=3      restarts after a fault, each from the newest complete checkpoint
#   STALL_SECONDS=600   a collective that takes longer ends the attempt
#   JOIN_SECONDS=600    how long a node waits for the others, at the start and after a fault
#   CHECK_SUMS=1        0: checkpoints without sums (--no-verify-integrity), for one saved so, too
#   LOG_DIR=logs        LOG_DIR/<run>/attempt_<n>/<rank>/{stdout,stderr}.log
#   PYTHON=<checkout>/.venv/bin/python
#
# Give --save and --load the same folder: a restart continues from there. SIGTERM or SIGHUP to this
# script saves a checkpoint and ends the run with status 0; SIGKILL ends the run with it. What the
# flags cannot mean is refused: status 2, the reason in the last line, no restart.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck source=launch/settings.sh
source "$root/launch/settings.sh"
dry_run=
if [[ ${1:-} == --dry-run ]]; then
    dry_run=1
    shift
fi

python=${PYTHON:-$root/.venv/bin/python}
require_python "$python"
nodes=${NNODES:-1}
require_nodes "$nodes"
if [[ $nodes == 1:1 ]]; then nodes=1; fi
if [[ $nodes != 1 && -z ${MASTER_ADDR:-} ]]; then
    refuse "NNODES=$nodes needs MASTER_ADDR, the name or address of one of the nodes."
fi
if [[ -z ${NPROC:-} ]]; then
    NPROC=$(count_gpus)
    ((NPROC > 0)) || NPROC=2
fi
require_number NPROC "$NPROC" 1
require_number MASTER_PORT "${MASTER_PORT:=29500}" 1 65535
require_number MAX_RESTARTS "${MAX_RESTARTS:=3}" 0
require_number STALL_SECONDS "${STALL_SECONDS:=600}" 1
require_number JOIN_SECONDS "${JOIN_SECONDS:=600}" 1
require_number CHECK_SUMS "${CHECK_SUMS:=1}" 0 1
logs=${LOG_DIR:-logs}

settings=(
    "PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
    "OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}"
    "CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
    # A node that comes back into a run finds the new round's address only without the shared store.
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
)
if [[ $nodes == 1 ]]; then # port 0: several runs on one machine do not meet
    rendezvous=(--rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0 --local-addr 127.0.0.1)
    rendezvous+=(--rdzv-id "${RUN_ID:-ultramem}")
    settings+=("GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}")
else
    rendezvous=(--rdzv-backend c10d --rdzv-endpoint "${MASTER_ADDR:-127.0.0.1}:$MASTER_PORT")
    rendezvous+=(--rdzv-id "${RUN_ID:-ultramem}")
    rendezvous+=(--rdzv-conf "join_timeout=$JOIN_SECONDS,read_timeout=60")
fi
sums=(--verify-integrity)
if [[ $CHECK_SUMS == 0 ]]; then
    sums=(--no-verify-integrity)
fi
command=(
    "$python" -m torch.distributed.run
    --nnodes "$nodes" --nproc-per-node "$NPROC" "${rendezvous[@]}"
    --max-restarts "$MAX_RESTARTS" --monitor-interval 1
    # SIGTERM is for the ranks, which save; torchrun would end them while they do.
    --signals-to-handle "SIGINT,SIGQUIT"
    --log-dir "$logs" --tee 3
    -m ultramem_megatron train
    # Start-up may take longer than a step: at least a minute, Megatron counts whole ones.
    --distributed-timeout-minutes "$(((STALL_SECONDS + 59) / 60))"
    --distributed-timeout-seconds-after-init "$STALL_SECONDS"
    # The first attempts of a run have nothing to go on from.
    --load-or-start --exit-signal-handler "${sums[@]}"
    "$@"
)

if [[ -n $dry_run ]]; then
    printf '%q ' env "${settings[@]}" "${command[@]}"
    echo
    exit 0
fi

export "${settings[@]}"
# A rank that refuses its flags leaves the reason here. Slurm's script names a file for all nodes.
if [[ -z ${ULTRAMEM_REFUSAL:-} ]]; then
    mkdir -p "$logs"
    ULTRAMEM_REFUSAL=$logs/refusal-$(hostname)-$$.txt
    rm -f "$ULTRAMEM_REFUSAL" # of a former process with this number
fi
export ULTRAMEM_REFUSAL

# torchruns PID: PID and, where PYTHON is a wrapper that stays, what it started: the torchrun itself.
torchruns() {
    local child
    echo "$1"
    for child in $(pgrep -P "$1"); do
        if grep -qzx 'torch\.distributed\.run' "/proc/$child/cmdline" 2>/dev/null; then
            torchruns "$child"
        fi
    done
}

# Once each, and only when Megatron listens: before, the signal is lost; at exit, it would kill.
pass_on_sigterm() {
    local launcher rank ignored waiting=
    launcher=$(torchruns "$agent" | tail -n 1)
    for rank in $(pgrep -P "$launcher"); do
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
    trap '' TERM HUP # torchrun and its ranks inherit this
    export ULTRAMEM_TORCHRUN_PID="$BASHPID"
    exec "${command[@]}"
) &
agent=$!
# When this script is gone, even by SIGKILL, the pipe ends: torchrun follows, its ranks follow it.
exec {alive}> >(
    trap '' TERM HUP INT
    read -r _ || torchruns "$agent" | xargs -r kill -KILL 2>/dev/null
)
stopping=
told=()
trap 'stopping=1' TERM HUP
trap 'kill -INT "$agent"' INT
while kill -0 "$agent" 2>/dev/null; do
    if [[ -s $ULTRAMEM_REFUSAL ]]; then
        # It would start the ranks again; killed, it takes them with it.
        torchruns "$agent" | xargs -r kill -KILL 2>/dev/null || true
        break
    fi
    if [[ -n $stopping ]]; then
        pass_on_sigterm
    fi
    sleep 1 {alive}>&- &
    wait "$!" || true
done
status=0
wait "$agent" 2>/dev/null || status=$?
echo "ended" >&"$alive"
if [[ -s $ULTRAMEM_REFUSAL ]]; then
    echo "torchrun.sh: refused, and not tried again:" >&2
    cat "$ULTRAMEM_REFUSAL" >&2
    exit 2
fi
if ((status > 128)); then
    echo "torchrun.sh: torchrun was killed (signal $((status - 128))), its ranks end with it." \
        "Start again to go on from the newest complete checkpoint." >&2
fi
exit "$status"
