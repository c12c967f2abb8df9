#!/usr/bin/env bash
# A Ray cluster on this machine alone, for trying what a cluster does: `cluster.sh up [N]` starts a head and N
# nodes (2) that come back when they die, `cluster.sh down` ends them.  Everything listens on 127.0.0.1 and asks
# for the token in ~/.ray/auth_token, which is made if there is none.
#
# PORT (6379) is the head's, DASHBOARD (8265) the dashboard's; CPUS is what each node offers, by default its share
# of the processors; NODE_OPTIONS go to `ray start` of each node.
source "$(dirname "$0")/setup.sh"

# Its nodes end themselves soon after the head has: it cannot come back while there are any of the one before.
export RAY_gcs_rpc_server_reconnect_timeout_s=10

state=$PWD/.cluster      # process numbers and logs
folders=/tmp/ray-$UID    # of Ray, for sockets: their names must be short
port=${PORT:-6379} dashboard=${DASHBOARD:-8265}
address=127.0.0.1:$port

usage() {
    echo "usage: cluster.sh up [N] | down" >&2
    exit 2
}

# A file of its user alone, and never an argument or an output: who has the token can run any program.
make_token() {
    local file=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
    if [ ! -s "$file" ]; then
        mkdir -p "$(dirname "$file")"
        (umask 077 && python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$file")
    fi
    chmod 600 "$file"
}

start() {
    local name=$1
    shift
    # A session of its own, so that what ends this shell does not end the node.
    RAY_COMMAND="python launch/loopback_ray.py" setsid bash launch/node.sh "$@" </dev/null >"$state/$name.log" 2>&1 &
    echo $! >"$state/$name.pid"
}

is_alive() {
    [ -f "$1" ] && kill -0 "$(cat "$1")" 2>/dev/null
}

up() {
    local nodes=$1 i file taken
    [[ $nodes =~ ^[1-9][0-9]*$ ]] || usage
    for file in "$state"/*.pid; do
        if is_alive "$file"; then
            echo "a cluster is up already; end it by: bash launch/cluster.sh down" >&2
            exit 1
        fi
    done
    for taken in "$port" "$dashboard"; do
        if (: >"/dev/tcp/127.0.0.1/$taken") 2>/dev/null; then
            echo "port $taken is taken; write another, for example: PORT=6479 DASHBOARD=8365 bash launch/cluster.sh up" >&2
            exit 1
        fi
    done
    mkdir -p "$state"
    rm -f "$state"/*.pid "$state"/*.log
    make_token

    local cores cpus
    cores=$(python -c 'from lowbit_dist.machine import processors; print(processors())')
    cpus=${CPUS:-$((cores / nodes > 0 ? cores / nodes : 1))}
    # Services choose their ports themselves: the usual ones are meant for one node a machine.
    local options=(
        --node-ip-address=127.0.0.1 --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0
        --object-store-memory=$((256 << 20))
    )
    # The head has no processors to offer: it stays while a node with workers dies.
    start head --head --port="$port" --num-cpus=0 --num-gpus=0 \
        --dashboard-host=127.0.0.1 --dashboard-port="$dashboard" \
        --ray-client-server-port=$((port + 1)) "${options[@]}"
    await 1
    for ((i = 1; i <= nodes; i++)); do
        # A folder of its own: nodes that share one delete each other's copies of a job's source.
        # shellcheck disable=SC2086  # several options in one variable
        start "node-$i" --address="$address" --num-cpus="$cpus" --temp-dir="$folders/node-$i" \
            "${options[@]}" ${NODE_OPTIONS:-}
    done
    await $((nodes + 1))
    cat <<TEXT

The cluster is up: $nodes nodes with $cpus processors each, logs in .cluster/.
Its dashboard is http://127.0.0.1:$dashboard, and asks for the token in ~/.ray/auth_token.

    source .venv/bin/activate
    lowbit submit configs/quickstart.yaml --address http://127.0.0.1:$dashboard --follow

It ends with: bash launch/cluster.sh down
TEXT
}

# Until so many nodes are alive.
await() {
    if ! RAY_AUTH_MODE=token RAY_ADDRESS=$address python launch/await_nodes.py "$1" 90; then
        echo "its nodes say:" >&2
        tail -n 5 "$state"/*.log >&2
        down
        exit 1
    fi
}

down() {
    local file waited
    for file in "$state"/*.pid; do
        if is_alive "$file"; then
            kill -TERM "$(cat "$file")" 2>/dev/null || true
        fi
    done
    for file in "$state"/*.pid; do
        for ((waited = 0; waited < 30; waited++)); do
            is_alive "$file" || break
            sleep 1
        done
        if is_alive "$file"; then
            kill -KILL -- "-$(cat "$file")" 2>/dev/null || true
        fi
        rm -f "$file"
    done
    rm -rf "$folders"
    # Where Ray notes the last cluster: a client without an address would look for this one.
    if [ "$(cat /tmp/ray/ray_current_cluster 2>/dev/null)" = "$address" ]; then
        rm -f /tmp/ray/ray_current_cluster
    fi
}

case ${1:-} in
up) up "${2:-2}" ;;
down) down ;;
*) usage ;;
esac
