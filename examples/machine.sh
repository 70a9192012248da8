#!/bin/sh
# Stands in for a hypervisor and one machine: `wilco provision … --spawn examples/machine.sh` starts it
# once per guest. It boots, starts the guest agent, starts the agent again when that is killed, and
# powers off on SIGTERM.
#
# From wilco:          WILCO_GUEST WILCO_INCARNATION WILCO_BROKER WILCO_EXE
# From the fleet file: BOOT=never         the machine comes up, its agent never does
#                      BOOT_DELAY=4       seconds before the agent starts
#                      KILL_IN_PREPARE=1  the machine is reset once, while its prepare runs
#                      PREPARE_SECONDS=2, FAIL_PREPARE=text: see prepare.sh
# Everything is written below $WILCO_FLEET_DIR (default: fleet).
set -u

fleet=${WILCO_FLEET_DIR:-fleet}
dir=$fleet/machines/$WILCO_GUEST.$WILCO_INCARNATION
program=${WILCO_PREPARE:-$(dirname "$0")/prepare.sh}
conflict=4 # wilco's exit code when another process is this guest already
guest='' sleeper='' watchdog=''

power_off() {
    trap '' TERM INT
    [ -n "$sleeper" ] && kill "$sleeper" 2>/dev/null
    [ -n "$guest" ] && kill -TERM "$guest" 2>/dev/null && wait "$guest"
    exit 0
}
trap power_off TERM INT
trap '[ -n "$watchdog" ] && kill "$watchdog" 2>/dev/null' EXIT

# A sleep that a signal can end at once.
pause() {
    sleep "$1" &
    sleeper=$!
    wait "$sleeper"
    sleeper=''
}

start_guest() {
    "$WILCO_EXE" guest "$WILCO_GUEST" --incarnation "$WILCO_INCARNATION" \
        --exec "$program" --journal "$dir/journal.db" --wait 10m >>"$dir/console.log" 2>&1 &
    guest=$!
    echo "$guest" >"$dir/guest.pid"
}

# Machines outlive a control plane that crashes, but nobody wants them for ever after an example.
(
    while kill -0 "$PPID" 2>/dev/null; do sleep 5; done
    sleep "${ORPHAN_SECONDS:-60}"
    kill "$$"
) &
watchdog=$!

mkdir -p "$dir"
echo "$$" >"$dir/machine.pid"
pause "${BOOT_DELAY:-0}"
while [ "${BOOT:-}" = never ]; do pause 3600; done

start_guest
if [ -n "${KILL_IN_PREPARE:-}" ] && mkdir "$dir/reset" 2>/dev/null; then
    # prepare.sh says when it really runs: no guessing with time.
    while [ ! -s "$dir/preparing" ] && kill -0 "$guest" 2>/dev/null; do pause 0.1; done
    if [ -s "$dir/preparing" ]; then
        kill -KILL "$guest" "$(cat "$dir/preparing")"
        wait "$guest" 2>/dev/null
        echo "-- machine reset in mid-prepare --" >>"$dir/console.log"
        pause 1
        start_guest
    fi
fi

while :; do
    wait "$guest"
    status=$?
    # 137: killed. An agent is supervised: it starts again, with the same journal.
    [ "$status" -eq 137 ] || break
    echo "-- agent killed, started again --" >>"$dir/console.log"
    start_guest
done
[ "$status" -eq "$conflict" ] && echo "$WILCO_GUEST: another process is this guest already" >&2
exit "$status"
