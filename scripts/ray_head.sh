#!/usr/bin/env bash
# A real Ray head on this host, to which TorchX's Ray scheduler submits.
#
#   scripts/ray_head.sh install  makes .venv-ray: requirements/ray.txt, and through it the packages of .venv
#   scripts/ray_head.sh up       installs if need be, and starts the head
#   scripts/ray_head.sh run COMMAND...  runs a command where it reaches the head, whose job server is 127.0.0.1:8265
#   scripts/ray_head.sh status   prints the head's resources; exit code 1 if it is not up
#   scripts/ray_head.sh down     stops the head
#
# A client of a Ray head can run code on it, and Ray listens on every interface: in place of 127.0.0.1 it takes the host's
# routable address. So the head gets a network namespace with no interface but loopback. Needs root.
set -euo pipefail
cd "$(dirname "$0")/.."

BASE=${VENV:-.venv}
VENV_RAY=$(realpath -m "${VENV_RAY:-$BASE-ray}")
NAMESPACE=${RAY_NAMESPACE:-torchrec-qr-ray}
PORT=8265
GCS_PORT=6379
FOLDER=/var/tmp/$NAMESPACE
PID=$FOLDER/head.pid
LOG=$FOLDER/head.log
export RAY_USAGE_STATS_ENABLED=0

fail() { echo "ray_head.sh: $*" >&2; exit 1; }
. scripts/daemons.sh

install() {
    local stamp=$VENV_RAY/.locked
    [ "$stamp" -nt requirements/ray.txt ] && return
    [ -x "$BASE/bin/python" ] || fail "$BASE is not there: make install"
    rm -rf "$VENV_RAY"
    "$BASE/bin/python" -m venv "$VENV_RAY"
    # Packages of its own come first, those of the base after: torch is not installed a second time.
    "$BASE/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
        >"$("$VENV_RAY/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
    "$VENV_RAY/bin/python" -m pip install --disable-pip-version-check -qq --no-deps -r requirements/ray.txt
    touch "$stamp"
}

inside() { ip netns exec "$NAMESPACE" "$@"; }

answers() { inside "$VENV_RAY/bin/python" -c "
import sys, urllib.request
urllib.request.urlopen('http://127.0.0.1:$PORT/api/version', timeout=5)" >/dev/null 2>&1; }

is_running() { process_in "$PID" >/dev/null; }

up() {
    [ "$(id -u)" = 0 ] || fail "needs root (sudo $0 up)"
    command -v ip >/dev/null || fail "ip is not there: install iproute2"
    own_folder "$FOLDER"
    install
    is_running && answers && return
    # In there the host's name must not mean an address of the host's: this file takes the place of /etc/hosts.
    mkdir -p "/etc/netns/$NAMESPACE"
    echo "127.0.0.1 localhost $(hostname)" >"/etc/netns/$NAMESPACE/hosts"
    ip netns list | grep -qw "$NAMESPACE" || ip netns add "$NAMESPACE"
    ip -n "$NAMESPACE" link set lo up
    # Its bin comes first: the server starts a job's driver by the name python3.
    PATH=$VENV_RAY/bin:$PATH setsid ip netns exec "$NAMESPACE" "$VENV_RAY/bin/python" -m ray.scripts.scripts \
        start --head --block --port="$GCS_PORT" --num-cpus=4 --dashboard-host=127.0.0.1 --dashboard-port="$PORT" \
        --disable-usage-stats </dev/null >"$LOG" 2>&1 &
    note_process $! "$PID"
    local deadline=$((SECONDS + 120))
    until answers; do
        is_running && [ $SECONDS -lt $deadline ] || { cat "$LOG" >&2; fail "the head did not come up"; }
        sleep 0.5
    done
}

status() {
    is_running && answers || fail "not up"
    RAY_ADDRESS=127.0.0.1:$GCS_PORT inside "$VENV_RAY/bin/python" -m ray.scripts.scripts status
}

down() {
    [ "$(id -u)" = 0 ] || fail "needs root (sudo $0 down)"
    own_folder "$FOLDER"
    # With --block, the process ends all others of the head when it gets the signal.
    end_process "$PID" 150 group
    rm -rf "$FOLDER"
    ip netns delete "$NAMESPACE" 2>/dev/null || true
    rm -rf "/etc/netns/$NAMESPACE"
}

case ${1:-} in
    install | up | status | down) "$1" ;;
    run) inside "${@:2}" ;;
    *) sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
