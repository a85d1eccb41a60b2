#!/usr/bin/env bash
# A Slurm cluster of three nodes on this machine, for tests of multinode_trainer.slurm.
#
#   scripts/slurm_test_cluster.sh install         Debian's packages, if they are not there
#   scripts/slurm_test_cluster.sh start FOLDER    munged, slurmctld and three slurmd; all they write is in FOLDER
#   scripts/slurm_test_cluster.sh lose FOLDER     kill the second node with all that runs on it, as a power cut does
#   scripts/slurm_test_cluster.sh stop FOLDER     end them, and whatever their jobs have left running
#
# As root. Slurm's programs find the cluster by SLURM_CONF=FOLDER/slurm.conf. The nodes have the name of this
# machine, which resolves, and the same with "-2" and "-3". A job in the partition urgent preempts one in main.
set -euo pipefail

die() {
    printf '%s\n' "$*" >&2
    exit 1
}

command=${1:-} folder=${2:-} host=$(hostname -s)
export SLURM_CONF=$folder/slurm.conf PATH=$PATH:/usr/sbin

install_packages() {
    if command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null; then
        return
    fi
    command -v apt-get >/dev/null || die "There is no apt-get: install slurmctld, slurmd and munged."
    # Services that a package would start are for a cluster that is not this one.
    local policy=/usr/sbin/policy-rc.d
    if [[ ! -e $policy ]]; then
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod +x "$policy"
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    fi
    export DEBIAN_FRONTEND=noninteractive
    local packages=(--yes --no-install-recommends -o Acquire::http::Timeout=20 slurmctld slurmd munge)
    apt-get install "${packages[@]}" || { apt-get update && apt-get install "${packages[@]}"; }
}

free_ports() {
    python3 -c 'import socket
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(4)]
print(*(s.getsockname()[1] for s in sockets))'
}

write_config() {
    local control first second third
    read -r control first second third < <(free_ports)
    cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort=$control
# A job that is queued again must wait until the credential of its first start has expired.
AuthInfo=socket=$folder/munge.socket,cred_expire=5
AuthType=auth/munge
CryptoType=crypto/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
# Nodes are what jobs share out, so cores are counted as if there were enough.
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
# All as short as Slurm has it.
SlurmdTimeout=6
InactiveLimit=0
KillWait=2
MinJobAge=300
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0
SchedulerType=sched/backfill
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=$host NodeHostname=$host NodeAddr=127.0.0.1 Port=$first CPUs=4
NodeName=$host-2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$second CPUs=4
NodeName=$host-3 NodeHostname=$host NodeAddr=127.0.0.1 Port=$third CPUs=4
PartitionName=main Nodes=$host,$host-[2-3] Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=$host,$host-[2-3] PriorityTier=2 PreemptMode=OFF
CONF
}

start() {
    mkdir -p "$folder/state"
    chmod 755 "$folder"
    if [[ -e $folder/slurmctld.pid ]]; then
        stop
    fi
    write_config
    head -c 128 /dev/urandom >"$folder/munge.key"
    chmod 400 "$folder/munge.key"
    munged --force --socket="$folder/munge.socket" --key-file="$folder/munge.key" \
        --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" --seed-file="$folder/munge.seed"
    slurmctld -c
    for node in "$host" "$host-2" "$host-3"; do slurmd -N "$node"; done
    for _ in {1..200}; do
        [[ $(sinfo --noheader --partition=main --states=idle --format=%D 2>/dev/null) == 3 ]] && return
        sleep 0.1
    done
    sinfo >&2 || true
    tail -n 5 "$folder"/*.log >&2
    die "The nodes did not become idle."
}

# Kill the processes of this cluster's node $1, and the daemons of their job steps, which are the parents of
# the first of them.
kill_all_on() {
    local pid parent
    # Processes end meanwhile, so that much here may fail.
    { grep -lsxzF "SLURM_CONF=$SLURM_CONF" /proc/[0-9]*/environ || true; } | cut -d / -f 3 | while read -r pid; do
        grep -qsxzF "SLURMD_NODENAME=$1" "/proc/$pid/environ" || continue
        parent=$(awk '/^PPid:/ { print $2 }' "/proc/$pid/status" 2>/dev/null) || continue
        if [[ $(cat "/proc/$parent/comm" 2>/dev/null) == slurmstepd ]]; then
            kill -KILL "$parent" 2>/dev/null || true
        fi
        kill -KILL "$pid" 2>/dev/null || true
    done
}

lose() {
    kill -KILL "$(cat "$folder/slurmd-$host-2.pid")"
    kill_all_on "$host-2"
}

stop() {
    scancel --signal=KILL --user=root 2>/dev/null || true
    for _ in {1..50}; do
        [[ -n $(squeue --noheader 2>/dev/null) ]] || break
        sleep 0.1
    done
    local name
    for name in "slurmd-$host" "slurmd-$host-2" "slurmd-$host-3" slurmctld munged; do
        [[ ! -s $folder/$name.pid ]] || kill -KILL "$(cat "$folder/$name.pid")" 2>/dev/null || true
        rm -f "$folder/$name.pid"
    done
    for name in "$host" "$host-2" "$host-3"; do kill_all_on "$name"; done
}

case $command in
install) install_packages ;;
start | lose | stop)
    [[ $folder == /* ]] || die "FOLDER is an absolute path."
    "$command"
    ;;
*) die "$(sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}")" ;;
esac
