#!/usr/bin/env bash
# A real Slurm cluster of two nodes on this one host: munge, MariaDB, slurmdbd, slurmctld and two slurmd, all with
# their own configuration, ports and data in one folder, so that nothing of a Slurm that the host may have is touched.
#
#   scripts/slurm_cluster.sh up      installs what is missing (Debian, Ubuntu), starts what is not running
#   scripts/slurm_cluster.sh env     prints the exports that Slurm's commands and TorchX need: eval "$(… env)"
#   scripts/slurm_cluster.sh status  prints the state of the nodes; exit code 1 if the cluster is not up
#   scripts/slurm_cluster.sh down    stops the cluster and removes its folder
#
# Needs root, and runs the jobs of root alone: the folder, with the cluster's keys in it, is closed to all others. The
# nodes' names go to /etc/hosts.
set -euo pipefail

CLUSTER=${SLURM_CLUSTER_DIR:-/var/tmp/torchrec-qr-slurm}
NODES=(qrn1 qrn2)
CPUS=$(nproc)
# Twice the cores, as both nodes share them: a job of two ranks must fit one node of a one-core machine too.
NODE_CPUS=$((CPUS * 2 > 4 ? CPUS * 2 : 4))
HOSTS_LINE="127.0.0.1 ${NODES[*]} # torchrec-qr-slurm"
export SLURM_CONF=$CLUSTER/etc/slurm.conf
export PATH=$PATH:/usr/sbin:/sbin

fail() { echo "slurm_cluster.sh: $*" >&2; exit 1; }
# shellcheck source=scripts/daemons.sh
. "$(dirname "$0")/daemons.sh"

# wait_for SECONDS WHAT COMMAND...: until the command succeeds; shows the errors in the logs if it does not.
wait_for() {
    local deadline=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        if [ $SECONDS -ge $deadline ]; then
            grep -H -i -E 'error|fatal' "$CLUSTER"/log/*.log | tail -n 20 >&2 || true
            fail "$what did not come up"
        fi
        sleep 0.2
    done
}

is_running() { process_in "$CLUSTER/run/$1.pid" >/dev/null; }  # NAME

# start NAME COMMAND...: a daemon in the foreground of a session of its own, so that one pid is one daemon.
start() {
    local name=$1
    shift
    is_running "$name" && return
    setsid "$@" </dev/null >>"$CLUSTER/log/$name.log" 2>&1 &
    note_process $! "$CLUSTER/run/$name.pid"
}

stop() { end_process "$CLUSTER/run/$1.pid" 50; }  # NAME

install_packages() {
    local missing=()
    command -v slurmctld >/dev/null && command -v slurmd >/dev/null || missing+=(slurm-wlm)
    command -v slurmdbd >/dev/null || missing+=(slurmdbd)
    command -v munged >/dev/null || missing+=(munge)
    command -v mariadbd >/dev/null || missing+=(mariadb-server)
    [ ${#missing[@]} -gt 0 ] || return 0
    command -v apt-get >/dev/null || fail "missing, and no apt-get to install them: ${missing[*]}"
    echo "Installing ${missing[*]}."
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

free_ports() {  # N: prints N free ports
    python3 - "$1" <<'PYTHON'
import socket, sys
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(int(sys.argv[1]))]
print(*(s.getsockname()[1] for s in sockets))
PYTHON
}

configure() {
    mkdir -p "$CLUSTER"/{etc,log,run,db,state,spool}
    local host ports
    host=$(hostname -s)
    read -ra ports <<<"$(free_ports 5)"
    local munge="AuthType=auth/munge
AuthInfo=socket=$CLUSTER/run/munge.socket,cred_expire=20"
    echo "${ports[0]}" >"$CLUSTER/etc/db_port"
    dd if=/dev/urandom of="$CLUSTER/etc/munge.key" bs=1024 count=1 status=none
    chmod 400 "$CLUSTER/etc/munge.key"

    # The cluster has real queues, srun and accounting (TorchX reads a job's state from it). Features that need more than
    # a container has, such as cgroups, are off.
    cat >"$SLURM_CONF" <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[2]}
SlurmUser=root
SlurmdUser=root
$munge
StateSaveLocation=$CLUSTER/state
SlurmdSpoolDir=$CLUSTER/spool/%n
SlurmctldPidFile=$CLUSTER/run/slurmctld.own.pid
SlurmdPidFile=$CLUSTER/run/%n.own.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# TorchX makes a job of several nodes a heterogeneous one, which only the backfill scheduler starts: every 30 s by default.
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
MpiDefault=none
# By default every daemon listens on all of the host's interfaces.
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ReturnToService=2
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=${ports[1]}
# This is the socket of MUNGE if it is not at its default place.
AccountingStoragePass=$CLUSTER/run/munge.socket
NodeName=${NODES[0]} NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[3]} CPUs=$NODE_CPUS RealMemory=4096
NodeName=${NODES[1]} NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[4]} CPUs=$NODE_CPUS RealMemory=4096
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
    (
        umask 077
        cat >"$CLUSTER/etc/slurmdbd.conf" <<CONF
DbdHost=$host
DbdAddr=127.0.0.1
DbdPort=${ports[1]}
CommunicationParameters=NoInAddrAny
SlurmUser=root
$munge
PidFile=$CLUSTER/run/slurmdbd.own.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=${ports[0]}
StorageUser=slurm
StoragePass=slurm
CONF
    )
}

db() { mariadb --no-defaults --user=root --socket="$CLUSTER/run/db.socket" "$@"; }
both_idle() { [ "$(sinfo -h -N -o '%t' | grep -c -x idle)" = 2 ]; }

up() {
    [ "$(id -u)" = 0 ] || fail "needs root (sudo $0 up)"
    own_folder "$CLUSTER"
    install_packages
    [ -f "$SLURM_CONF" ] || configure
    grep -qxF "$HOSTS_LINE" /etc/hosts || echo "$HOSTS_LINE" >>/etc/hosts

    start munged munged --foreground --force --key-file="$CLUSTER/etc/munge.key" --socket="$CLUSTER/run/munge.socket" \
        --pid-file="$CLUSTER/run/munged.own.pid" --log-file="$CLUSTER/log/munged.log" --seed-file="$CLUSTER/run/munged.seed"

    [ -d "$CLUSTER/db/mysql" ] ||
        mariadb-install-db --no-defaults --user=root --datadir="$CLUSTER/db" --auth-root-authentication-method=normal \
            --skip-test-db >"$CLUSTER/log/install_db.log" 2>&1
    start mariadbd mariadbd --no-defaults --user=root --datadir="$CLUSTER/db" --socket="$CLUSTER/run/db.socket" \
        --bind-address=127.0.0.1 --port="$(cat "$CLUSTER/etc/db_port")" --skip-name-resolve \
        --pid-file="$CLUSTER/run/mariadbd.own.pid" --innodb-lock-wait-timeout=900
    wait_for 60 munged munge --no-input --socket="$CLUSTER/run/munge.socket"
    wait_for 60 MariaDB db -e "SELECT 1"
    db -e "CREATE DATABASE IF NOT EXISTS slurm_acct_db;
           CREATE USER IF NOT EXISTS slurm@'127.0.0.1' IDENTIFIED BY 'slurm';
           GRANT ALL ON slurm_acct_db.* TO slurm@'127.0.0.1';"

    start slurmdbd slurmdbd -D
    wait_for 60 slurmdbd sacctmgr -n show cluster
    # Without its cluster in the accounting, no job has a state that TorchX can read.
    [ -n "$(sacctmgr -nP show cluster local)" ] || sacctmgr -i add cluster local >/dev/null
    start slurmctld slurmctld -D
    wait_for 60 slurmctld scontrol ping
    local node
    for node in "${NODES[@]}"; do start "$node" slurmd -D -N "$node"; done
    wait_for 60 "two idle nodes" both_idle
    status
}

status() {
    local name
    for name in munged mariadbd slurmdbd slurmctld "${NODES[@]}"; do
        is_running "$name" || fail "not up: $name is not running"
    done
    sinfo -N -o '%N %t %c CPUs %m MB'
}

down() {
    local name
    [ "$(id -u)" = 0 ] || fail "needs root (sudo $0 down)"
    own_folder "$CLUSTER"
    if is_running slurmctld; then scancel --state=RUNNING --quiet || true; scancel --state=PENDING --quiet || true; fi
    for name in "${NODES[@]}" slurmctld slurmdbd mariadbd munged; do stop "$name"; done
    # Not sed -i: in a container /etc/hosts is a mount and cannot be replaced.
    if grep -qxF "$HOSTS_LINE" /etc/hosts; then
        local rest
        rest=$(grep -vxF "$HOSTS_LINE" /etc/hosts)
        echo "$rest" >/etc/hosts
    fi
    rm -rf "$CLUSTER"
}

case ${1:-} in
    up | down | status) "$1" ;;
    env) echo "export SLURM_CONF=$SLURM_CONF" ;;
    *) sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
