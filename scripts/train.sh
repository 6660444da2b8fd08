#!/usr/bin/env bash
# Trains on this machine or on many: one process per GPU, on CPUs as many as NPROC says. When a process dies or stalls, all are started
# again and go on from the newest checkpoint. The arguments are those of `python -m megatron_m2.train`.
#
#   scripts/train.sh model=tiny data.path=data/mine run.dir=runs/tiny
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 scripts/train.sh parallel.tp=2 run.dir=/shared/run    # the other node: NODE_RANK=1
#
# NPROC         processes per node                                        the number of GPUs, without any 1
# NNODES        nodes                                                     1
# NODE_RANK     number of this node, from 0                               0
# MASTER_ADDR   address of node 0, for the others to reach it             127.0.0.1 for one node
# MASTER_PORT   a free port there                                         29500, for one node any that is free
# LOCAL_ADDR    address of this node, where its host name does not give one that the others can reach
# MAX_RESTARTS  how often to start again before giving up                 10
# PYTHON        interpreter                                               that of .venv, where there is one, else python
#
# Ends with the status of the run: 0 complete, 143 stopped by SIGTERM or SIGUSR1 after saving, 2 something is wrong with the arguments.
set -euo pipefail

repo=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$repo${PYTHONPATH:+:$PYTHONPATH}
[[ -x $repo/.venv/bin/python ]] && venv=$repo/.venv/bin/python || venv=python
PYTHON=${PYTHON:-$venv}
GPUS=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || GPUS=0
NPROC=${NPROC:-$((GPUS > 0 ? GPUS : 1))}
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
MAX_RESTARTS=${MAX_RESTARTS:-10}

# ---- what is wrong is said now, by one process and in one line --------------------------------------------------------------------

wrong() {
    echo "error: $1" >&2
    exit 2
}
whole() { # name, value, least
    [[ $2 =~ ^(0|[1-9][0-9]{0,5})$ ]] && (($2 >= $3)) || wrong "$1 = $2: must be a whole number, nearest is $3"
}
whole NPROC "$NPROC" 1
whole NNODES "$NNODES" 1
whole NODE_RANK "$NODE_RANK" 0
whole MAX_RESTARTS "$MAX_RESTARTS" 0
((NODE_RANK < NNODES)) || wrong "NODE_RANK = $NODE_RANK: must be below NNODES = $NNODES; nearest is $((NNODES - 1))"
[[ $NNODES == 1 || -n ${MASTER_ADDR:-} ]] || wrong "MASTER_ADDR = : must be the address of node 0 when NNODES = $NNODES"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) > NPROC ? $(nproc) / NPROC : 1))}
# of the GPUs of this node the last one is asked for
LOCAL_RANK=$((NPROC - 1)) "$PYTHON" -m megatron_m2.train --check $((NNODES * NPROC)) "$@"

# ---- where the nodes meet ---------------------------------------------------------------------------------------------------------

if [[ $NNODES == 1 ]]; then
    MASTER_ADDR=127.0.0.1
    LOCAL_ADDR=127.0.0.1
    free_port='import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
    MASTER_PORT=${MASTER_PORT:-$("$PYTHON" -c "$free_port")}
fi
MASTER_PORT=${MASTER_PORT:-29500}
[[ $NODE_RANK == 0 ]] && is_host=true || is_host=false

# torchrun's store outlives the ranks: the watchdog's board
export M2_BOARD=$MASTER_ADDR:$MASTER_PORT
# ... but the ranks themselves meet in a new store at every start: in a shared one those started again would look for the dead
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# what another start would not help ends with status 0 for torchrun, and with its true status in this file
M2_STATUS=$(mktemp)
export M2_STATUS
trap 'rm -f "$M2_STATUS"' EXIT

# ---- the processes ----------------------------------------------------------------------------------------------------------------

# SIGUSR1, a batch system's warning, may reach every process of the job: the ranks save and end, all others wait for that
trap '' USR1
"$PYTHON" -m torch.distributed.run --nnodes "$NNODES" --nproc-per-node "$NPROC" --max-restarts "$MAX_RESTARTS" \
    --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id m2 --rdzv-conf "is_host=$is_host" \
    ${LOCAL_ADDR:+--local-addr "$LOCAL_ADDR"} -m megatron_m2.train "$@" &
torchrun=$!
trap 'kill -TERM $torchrun' TERM INT # torchrun passes it on to the ranks
while kill -0 $torchrun 2>/dev/null; do
    wait $torchrun || true # also ends when a signal is trapped
done
status=0
wait $torchrun || status=$?
exit "$(grep . "$M2_STATUS" || echo "$status")"
