#!/bin/sh
# What a guest agent does on its first command, in small: reads the prepare payload on stdin, writes the
# datastore's configuration, says so as JSON on stdout. `wilco guest --exec` runs it.
#
# It also appends one line to $WILCO_FLEET_DIR/runs.log before it does anything: that file counts how
# often each prepare really ran, and wilco has no hand in it.
set -eu

fleet=${WILCO_FLEET_DIR:-fleet}
dir=$fleet/machines/$WILCO_GUEST.$WILCO_INCARNATION
mkdir -p "$dir"
echo "$WILCO_GUEST $WILCO_INCARNATION $WILCO_COMMAND" >>"$fleet/runs.log"
payload=$(cat)

# The value of a JSON string field, unescaped. Enough for what this example is sent.
field() {
    printf '%s\n' "$payload" | awk -v key="\"$1\":\"" '
        { at = index($0, key); if (!at) exit
          rest = substr($0, at + length(key)); match(rest, /^([^"\\]|\\.)*/)
          text = substr(rest, 1, RLENGTH)
          gsub(/\\n/, "\n", text); gsub(/\\t/, "\t", text); gsub(/\\"/, "\"", text); gsub(/\\\\/, "\\", text)
          printf "%s", text }'
}

if [ -n "${KILL_IN_PREPARE:-}" ]; then
    echo "$$" >"$dir/preparing"
    exec sleep 60 # until machine.sh resets the machine
fi
sleep "${PREPARE_SECONDS:-0}"
if [ -n "${FAIL_PREPARE:-}" ]; then
    echo "$FAIL_PREPARE" >&2
    exit 1
fi

manager=$(field manager)
config=$dir/$manager.conf
field config_contents >"$config.new"
mv "$config.new" "$config"
printf '{"datastore":"%s","version":"%s","config_bytes":%s,"address":"%s"}\n' \
    "$manager" "$(field version)" "$(wc -c <"$config" | tr -d ' ')" "$(field address)"
