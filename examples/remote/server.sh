#!/usr/bin/env bash
# A server on this machine; in another window: bash examples/remote/clients.sh
#
# Ctrl-C and the same command again: the run goes on. A new run: rm -r runs/remote
# What stands behind the command is passed on: bash examples/remote/server.sh --trainer.max_rounds=100
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
certs=runs/remote/certs

# At the first use: a CA, and a folder for every site. On real machines each folder goes to its site, and the CA stays.
[ -d $certs/ca ] || hosfl certs init --out $certs/ca
[ -d $certs/server ] || hosfl certs server --ca $certs/ca --host localhost 127.0.0.1 --out $certs/server
for name in lab-a lab-b lab-c; do
    [ -d $certs/$name ] || hosfl certs client --ca $certs/ca --name $name --out $certs/$name
done

exec hosfl serve --config "$here/server.yaml" --clients "$here/clients.yaml" --certs $certs/server \
    --listen "127.0.0.1:${PORT:-8470}" --run runs/remote/run "$@"
