#!/usr/bin/env bash
# Runs scripts/slurm/train.sbatch under a real Slurm on this machine: controller, node daemon and munge of Debian's packages, in a folder
# of their own. The job is warned once, as before its time limit; it must save, requeue itself, go on and end with the figures of a run
# that nothing disturbed. Needs root, Debian or Ubuntu, and the network if the packages are not there yet.
#
#   [PYTHON=.venv/bin/python] bash tools/check_slurm.sh
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=$(realpath -s "${PYTHON:-.venv/bin/python}")
export PYTHON NPROC=1 OMP_NUM_THREADS=1

if ! command -v slurmctld slurmd munged sbatch >/dev/null; then
    apt-get update -q
    DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends slurm-wlm munge
fi

# ---- a cluster of one node --------------------------------------------------------------------------------------------------------

dir=$(mktemp -d)
chmod 755 "$dir"
host=$(hostname -s)
export SLURM_CONF=$dir/slurm.conf
mkdir "$dir/munge" "$dir/state" "$dir/spool"
chmod 700 "$dir/munge"
head -c 128 /dev/urandom >"$dir/munge/key"
chmod 400 "$dir/munge/key"
read -r controller_port node_port < <("$PYTHON" - <<'PY'
import socket
sockets = [socket.socket() for _ in range(2)]
for s in sockets:
    s.bind(("127.0.0.1", 0))
print(*(s.getsockname()[1] for s in sockets))
PY
)
cat >"$SLURM_CONF" <<CONF
ClusterName=check
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$controller_port
SlurmdPort=$node_port
SlurmUser=root
AuthType=auth/munge
# a requeued job waits until its old credentials have expired: 120 s by default
AuthInfo=socket=$dir/munge/socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/linear
MpiDefault=none
ReturnToService=2
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc)
PartitionName=check Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF

pids=()
stop() {
    scancel --user=root 2>/dev/null || true
    sleep 1
    kill "${pids[@]}" 2>/dev/null || true
    wait
    rm -rf "$dir"
}
trap stop EXIT
munged --foreground --force --key-file="$dir/munge/key" --socket="$dir/munge/socket" --pid-file="$dir/munge/pid" \
    --log-file="$dir/munge/log" --seed-file="$dir/munge/seed" 2>>"$dir/munged.log" &
pids+=($!)
until [[ -S $dir/munge/socket ]]; do sleep 0.1; done
slurmctld -D >>"$dir/daemons.log" 2>&1 &
pids+=($!)
slurmd -D >>"$dir/daemons.log" 2>&1 &
pids+=($!)
for _ in $(seq 100); do
    [[ $(sinfo --noheader --format=%T 2>/dev/null) == idle ]] && break
    sleep 0.3
done
sinfo

fail() {
    echo "FAILED: $1" >&2
    tail -n 20 "$dir"/*.log >&2
    exit 1
}
wait_for() { # what, command: until it succeeds
    for _ in $(seq 600); do
        eval "$2" && return
        sleep 0.5
    done
    fail "$1"
}
field() { # of a job: as scontrol names it
    scontrol --oneliner show job "$1" | grep -o " $2=[^ ]*" | cut -d= -f2
}

# ---- the runs ---------------------------------------------------------------------------------------------------------------------

"$PYTHON" tools/prepare_data.py --out "$dir/data" --vocab-size 320 --source folder:megatron_m2
overrides=(model=tiny model.vocab_size=320 "data.path=$dir/data" '~data.blend.prose' data.seq_len=64 data.tokens_per_forest=256
    stage.steps=120 stage.warmup_steps=4 stage.decay_steps=20 stage.forests_per_step=2 run.log_every=1 run.eval_every=0
    run.sample_tokens=0 run.export=false run.wandb=disabled run.device=cpu)
rows() { # figures of a run that do not measure the machine
    "$PYTHON" - "$1/metrics.jsonl" <<'PY'
import json, sys
for line in open(sys.argv[1]):
    print({k: v for k, v in json.loads(line).items() if not k.startswith(("throughput/", "time/", "gpu/"))})
PY
}

echo "== undisturbed, without Slurm"
scripts/train.sh "${overrides[@]}" run.dir="$dir/undisturbed" 2>>"$dir/undisturbed.log" || fail "the undisturbed run"

echo "== under Slurm, warned once"
job=$(sbatch --parsable --time=10 --output="$dir/job.log" scripts/slurm/train.sbatch "${overrides[@]}" run.dir="$dir/job")
wait_for "no step of the job" "[[ -s $dir/job/metrics.jsonl ]]"
scancel --batch --signal=USR1 "$job"
wait_for "the job did not requeue itself" "[[ \$(field $job Restarts) == 1 ]]"
echo "requeued after step $(tail -n 1 "$dir/job/metrics.jsonl" | grep -o '"step": [0-9]*')"
wait_for "the job did not end" "[[ \$(field $job JobState) =~ COMPLETED|FAILED|CANCELLED|TIMEOUT ]]"
[[ $(field "$job" JobState) == COMPLETED ]] || fail "the job ended as $(field "$job" JobState)"
grep -a "stopped by SIGUSR1 after step" "$dir/job.log" || fail "no word of the signal"
grep -a "resuming at step" "$dir/job.log" || fail "the job began anew"
cmp <(rows "$dir/undisturbed") <(rows "$dir/job") || fail "other figures than undisturbed"

echo "== under Slurm, with a layout that cannot be"
wrong=$(sbatch --parsable --time=10 --output="$dir/wrong.log" scripts/slurm/train.sbatch "${overrides[@]}" parallel.tp=3 run.dir="$dir/wrong")
wait_for "the job did not end" "[[ \$(field $wrong JobState) =~ COMPLETED|FAILED ]]"
[[ $(field "$wrong" JobState) == FAILED && $(field "$wrong" ExitCode) == 2:0 ]] || fail "status $(field "$wrong" ExitCode)"
grep -a "^error" "$dir/wrong.log"
echo "OK: $(rows "$dir/job" | wc -l) steps under Slurm, through one requeue, as without it"
