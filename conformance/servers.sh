#!/bin/sh
# Installs what the tests start for themselves, where it is missing: Debian's packages rabbitmq-server,
# nats-server and redis-server, and faketime for a guest whose clock is wrong. Nothing is left running.
set -eu

missing=''
command -v nats-server >/dev/null || missing="$missing nats-server"
command -v redis-server >/dev/null || missing="$missing redis-server"
command -v faketime >/dev/null || missing="$missing faketime"
[ -x /usr/lib/rabbitmq/bin/rabbitmq-server ] || command -v rabbitmq-server >/dev/null ||
    missing="$missing rabbitmq-server"
[ -n "$missing" ] || exit 0

if ! command -v apt-get >/dev/null; then
    echo "install these packages, then run this again:$missing" >&2
    exit 1
fi
as_root=''
[ "$(id -u)" = 0 ] || as_root=sudo

# Debian starts a server when it is installed, unless this file says no; the tests start their own.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' | $as_root tee "$policy" >/dev/null
    $as_root chmod +x "$policy"
    trap '$as_root rm -f "$policy"' EXIT
fi
$as_root apt-get update -q
# shellcheck disable=SC2086 # one word a package
DEBIAN_FRONTEND=noninteractive $as_root apt-get install -q -y --no-install-recommends $missing
