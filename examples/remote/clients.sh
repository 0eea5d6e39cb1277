#!/usr/bin/env bash
# Three clients on this machine, each with the text of one installed package; the server: bash examples/remote/server.sh
#
# Ctrl-C and the same command again: they go on. What stands behind the command is passed on to each of them.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
certs=runs/remote/certs

client() {  # NAME PACKAGE
    hosfl join --server "localhost:${PORT:-8470}" --config "$here/client.yaml" --certs "$certs/$1" \
        --state "runs/remote/state/$1" --data.init_args.packages="[$2]" "${@:3}" 2>&1 | sed -u "s/^/$1  /"
}

[ -d $certs/lab-c ] || echo "waiting for the certificates, which server.sh makes"
until [ -d $certs/lab-c ]; do sleep 1; done
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}   # they share this machine's cores

set -m   # each a job of its own: a Ctrl-C is passed on to all, and all are waited for
trap 'for job in $(jobs -p); do kill -INT -- "-$job" 2>/dev/null || true; done' INT TERM
client lab-a numpy "$@" &
client lab-b torch "$@" &
client lab-c transformers "$@" &
status=0
for job in $(jobs -p); do
    wait "$job" || status=$?
done
exit $status
