# The scripts that start daemons as root source this file. It makes a folder that nobody else can write into, and ends a
# process id only while it is that of the process that was started.

# own_folder DIR: makes DIR, of root alone; fails if somebody else has made it, or it is a link.
own_folder() {
    mkdir -m 700 "$1" 2>/dev/null || true
    [ ! -L "$1" ] && [ -d "$1" ] && [ "$(stat -c '%u' "$1")" = 0 ] ||
        fail "$1 is not a folder that root made; allowed: a folder of root's, or none. Look at it, and remove it"
    chmod 700 "$1"
}

# start_time PID: when it started, in clock ticks since boot; fails if there is none. It cuts at the last parenthesis, because
# the name of a process, in parentheses, may hold anything.
start_time() {
    local stat
    stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
    read -ra stat <<<"${stat##*) }"
    echo "${stat[19]}"
}

# note_process PID FILE: writes what `process_in` reads.
note_process() { echo "$1 $(start_time "$1")" >"$2"; }

# process_in FILE: prints the process id of FILE if it is still the process that started at the time in FILE.
process_in() {
    local pid started
    read -r pid started 2>/dev/null <"$1" || return 1
    [[ $pid =~ ^[1-9][0-9]*$ ]] && [ -n "$started" ] && [ "$(start_time "$pid")" = "$started" ] && echo "$pid"
}

# end_process FILE TENTHS [GROUP]: ends the process of FILE, and kills it, or its group, if it is there after so many
# tenths of a second; removes FILE.
end_process() {
    local pid
    if pid=$(process_in "$1"); then
        kill "$pid" 2>/dev/null || true
        for _ in $(seq "$2"); do process_in "$1" >/dev/null || break; sleep 0.1; done
        if process_in "$1" >/dev/null; then kill -KILL -- "${3:+-}$pid" 2>/dev/null || true; fi
    fi
    rm -f "$1"
}
