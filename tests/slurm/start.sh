#!/usr/bin/env bash
# A Slurm of one node on this machine, for tests/test_slurm.py, as root: start.sh [FOLDER], start.sh stop [FOLDER].
# It needs Debian's slurm-wlm and munge; clients find it by SLURM_CONF, which `start` prints.
set -euo pipefail
stop=
[[ ${1:-} == stop ]] && stop=yes && shift
folder=${1:-/tmp/slurm-of-one-node}

if [[ $stop ]]; then
    for daemon in slurmd slurmctld munged; do
        [[ -s $folder/$daemon.pid ]] && kill "$(cat "$folder/$daemon.pid")" || true
    done
    exit
fi

mkdir -p "$folder"/{state,spool}
chmod 755 "$folder" # munged insists
[[ -s $folder/munge.key ]] || (umask 077 && dd if=/dev/urandom of="$folder/munge.key" bs=128 count=1 status=none)
host=$(hostname -s)
cat >"$folder/slurm.conf" <<CONF
ClusterName=one
SlurmctldHost=$host
SlurmUser=root
SlurmdUser=root
AuthInfo=socket=$folder/munge.socket,cred_expire=5 # requeued jobs wait as long; by default two minutes
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=1
MpiDefault=none
ReturnToService=2
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
NodeName=$host CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
CONF
export SLURM_CONF=$folder/slurm.conf
munged --force --key-file "$folder/munge.key" --socket "$folder/munge.socket" --pid-file "$folder/munged.pid" \
    --log-file "$folder/munged.log" --seed-file "$folder/munge.seed"
slurmctld
slurmd
for _ in $(seq 50); do
    sinfo --noheader --format %T 2>/dev/null | grep -q idle && break
    sleep 0.2
done
sinfo
echo "export SLURM_CONF=$SLURM_CONF"
