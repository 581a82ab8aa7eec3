#!/bin/sh
# Two "nodes" on this machine, each a torchrun of its own with a port of its own, train one prefix together.
# On two machines: run one of the two commands on each, with the first one's address in place of 127.0.0.1.
#
#     sh examples/two_nodes.sh examples/torchrun_loop.py --model my-model --out capitals --steps 50
set -eu

PORT=${PORT:-29400}
PROCESSES=${PROCESSES:-1} # a node: as many as it has GPUs

node() { # its number, then the script and its arguments
    rank=$1
    shift
    torchrun --nnodes 2 --node-rank "$rank" --nproc-per-node "$PROCESSES" \
        --master-addr 127.0.0.1 --master-port "$PORT" "$@"
}

node 1 "$@" &
other=$!
trap 'kill "$other" 2>/dev/null || true' EXIT INT TERM
node 0 "$@"
wait "$other"
trap - EXIT
