#!/usr/bin/env bash
# Start a SLURM of two nodes, n1 and n2, on this machine, or stop it again:
#   bash up.sh DIR          then use it with SLURM_CONF=DIR/slurm.conf
#   bash up.sh DIR --stop
# DIR gets configuration, state and logs. Needs root, and Debian's slurmctld, slurmd, slurm-client and munge.
# Partition `main` is what jobs use; one in `high` pre-empts it: USR2, 20 seconds, then the queue.
set -euo pipefail
dir=$1
conf=$dir/slurm.conf
names="127.0.0.1 n1 n2  # $dir"

stop() { # jobs first, then what they report to; munge last, since all of them talk through it
    local file hosts
    scancel --user "$(id -un)" 2>/dev/null || true
    wait_for no_jobs || true
    for file in "$dir"/slurm*.pid; do end "$file"; done
    end "$dir/munged.pid"
    # no sed -i: in a container /etc/hosts can be written, but not replaced
    if hosts=$(grep -vxF "$names" /etc/hosts); then printf '%s\n' "$hosts" >/etc/hosts; fi
}

no_jobs() { [ -z "$(squeue -h)" ]; }

end() { # the process whose id is in this file, and wait until it is gone
    local pid
    if [ ! -s "$1" ]; then return; fi
    pid=$(cat "$1")
    kill "$pid" 2>/dev/null || return 0
    wait_for gone "$pid"
}

gone() { ! kill -0 "$1"; }

wait_for() { # up to 20 seconds for a command to succeed
    local _
    for _ in $(seq 200); do
        if "$@" >/dev/null 2>&1; then return; fi
        sleep 0.1
    done
    echo "up.sh: gave up on: $*" >&2
    return 1
}

both_idle() { [ "$(sinfo -h -N -p main -o %t | grep -c idle)" = 2 ]; }

start_munge() { # one for the machine: used where it runs already, else ours, stopped with the rest
    if munge -n >/dev/null 2>&1; then return; fi
    install -d -m 0755 -o munge -g munge /run/munge
    runuser -u munge -- munged --force
    cp /run/munge/munged.pid "$dir/munged.pid"
}

write_configuration() {
    local host port
    host=$(hostname -s)
    port=$((20000 + $$ % 10000)) # not SLURM's own: another one may run here
    cat >"$conf" <<END
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_min_interval=100000,sched_interval=1,bf_interval=1
KillWait=5
SlurmdTimeout=10
MailProg=/bin/true
ReturnToService=2
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd-%n.log
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=4 RealMemory=4000
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=4 RealMemory=4000
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=20
PartitionName=high Nodes=n1,n2 MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
END
}

export SLURM_CONF=$conf
if [ "${2:-}" = --stop ]; then
    stop
    exit
fi
mkdir -p "$dir"/{state,log,spool/n1,spool/n2}
write_configuration
start_munge
echo "$names" >>/etc/hosts
slurmctld
slurmd -N n1
slurmd -N n2
wait_for both_idle
