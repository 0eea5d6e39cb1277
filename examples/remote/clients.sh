#!/usr/bin/env bash
# Three clients on this machine, each with the text of one installed package; the server: bash examples/remote/server.sh
#
# Ctrl-C and the same command again: they go on. What stands behind the command is passed on to each of them.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
certs=runs/remote/certs
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}   # they share this machine's cores

client() {  # NAME PACKAGE: hosfl join, its name in front of what it says
    hosfl join --server "localhost:${PORT:-8470}" --config "$here/client.yaml" --certs "$certs/$1" \
        --state "runs/remote/state/$1" --data.init_args.packages="[$2]" "${@:3}" 2>&1 |
        (trap '' INT; sed -u "s/^/$1  /")
}

ended() {  # PROCESS: its exit code; a signal ends bash's wait, not the process
    local code=0
    wait "$1" || code=$?
    while kill -0 "$1" 2>/dev/null; do code=0; wait "$1" || code=$?; done
    return $code
}

[ -d $certs/lab-c ] || echo "waiting for the certificates, which server.sh makes"
until [ -d $certs/lab-c ]; do sleep 1; done

set -m   # each is a job of its own, which Ctrl-C reaches by the trap alone
clients=() status=0
trap 'for one in "${clients[@]}"; do kill -INT -- "-$one" 2>/dev/null || true; done' INT TERM
client lab-a numpy "$@" & clients+=($!)
client lab-b torch "$@" & clients+=($!)
client lab-c transformers "$@" & clients+=($!)
for one in "${clients[@]}"; do ended "$one" || status=$?; done
exit $status
