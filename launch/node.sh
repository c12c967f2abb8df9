#!/usr/bin/env bash
# One node of a Ray cluster, in the foreground: `node.sh OPTIONS` is `ray start OPTIONS`, and comes back when it
# dies, until it is told to end.  Used by the clusters of one machine, of containers and of a batch system.
set -euo pipefail

export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
# How soon the head takes a node that does not answer for lost: five times 3 seconds, not five times 10.
export RAY_health_check_initial_delay_ms=5000 RAY_health_check_period_ms=1000
export RAY_health_check_timeout_ms=3000 RAY_health_check_failure_threshold=5
# Ray's workers have a niceness of 15 otherwise, and starve beside anything else that computes.
export RAY_worker_niceness=${RAY_worker_niceness:-0}
# Seconds that a node which is told to end waits for its work; a run has then saved its checkpoint already.
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=${RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S:-5}

ray=
stop() {
    trap '' TERM INT
    if [ -n "$ray" ]; then
        kill -TERM "$ray" 2>/dev/null || true
        wait "$ray" || true
    fi
    exit 0
}
trap stop TERM INT

# Ray's own `--block` goes on waiting when its raylet has ended in good order, as it does after being cut off
# from the head for long.  Such a node serves nobody, so it counts as dead.
watch() {
    local seen=
    while kill -0 "$ray" 2>/dev/null; do
        if pgrep -P "$ray" raylet >/dev/null; then
            seen=yes
        elif [ -n "$seen" ]; then
            kill -TERM "$ray" 2>/dev/null || true
            return
        fi
        sleep 2 &
        wait $! # a signal interrupts `wait`, not `sleep`
    done
}

# Ray starts a head without its dashboard, and so without jobs, where the port is not free yet, as it is for a minute
# after a head has died.
await_dashboard_port() {
    local option waited
    for option in "$@"; do
        [[ $option == --dashboard-port=* ]] || continue
        for ((waited = 0; waited < 90; waited++)); do
            python -c 'import socket, sys; socket.socket().bind(("127.0.0.1", int(sys.argv[1])))' \
                "${option#*=}" 2>/dev/null && break
            sleep 1 &
            wait $!
        done
    done
}

while true; do
    await_dashboard_port "$@"
    ${RAY_COMMAND:-ray} start "$@" --disable-usage-stats --block &
    ray=$!
    watch
    wait "$ray" && code=0 || code=$?
    echo "$(date '+%F %T') this node ended ($code) and starts again" >&2
    sleep 2 &
    wait $!
done
