#!/usr/bin/env bash
# Prometheus for the runs of this machine, at http://127.0.0.1:9090, until Ctrl-C; PORT and DATA are its port and folder.
set -euo pipefail

command -v prometheus >/dev/null || { echo "install Prometheus first: apt-get install prometheus" >&2; exit 1; }
here=$(cd "$(dirname "$0")" && pwd)
port=${PORT:-9090}
data=${DATA:-$HOME/.cache/lowbit/prometheus}
targets=/tmp/lowbit-ray
sessions=${RAY_TMPDIR:-${TMPDIR:-/tmp}}  # where `lowbit train` puts them, as its first line says if it is elsewhere
mkdir -p "$data" "$targets"

# A run without a cluster has a Ray of its own in a folder of its own, and Prometheus looks for names that vary in one
# folder alone: there goes each session's list of targets, for as long as the session lives.
collect_targets() {
    while true; do
        for list in "$targets"/*.json; do
            [ -e "$sessions/$(basename "$list" .json)" ] || rm -f "$list"
        done
        for session in "$sessions"/lowbit-ray-*; do
            list="$targets/$(basename "$session").json"
            cp "$session/prom_metrics_service_discovery.json" "$list.new" 2>/dev/null && mv "$list.new" "$list"
        done
        sleep 5
    done
}
collect_targets &
prometheus --config.file="$here/prometheus.yml" --web.listen-address="127.0.0.1:$port" \
    --storage.tsdb.path="$data" --log.level=warn &
trap 'kill $(jobs -p) 2>/dev/null' EXIT
trap exit INT TERM
echo "Prometheus: http://127.0.0.1:$port, data in $data"
wait -n  # Prometheus ends by itself only when it cannot start
