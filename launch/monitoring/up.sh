#!/usr/bin/env bash
# Prometheus for the runs of this machine, at http://127.0.0.1:9090, until Ctrl-C; PORT and DATA are its port and folder.
set -euo pipefail

command -v prometheus >/dev/null || { echo "install Prometheus first: apt-get install prometheus" >&2; exit 1; }
here=$(cd "$(dirname "$0")" && pwd)
port=${PORT:-9090}
data=${DATA:-$HOME/.cache/lowbit/prometheus}
links=/tmp/lowbit-ray
mkdir -p "$data" "$links"

# A run without a cluster has a Ray of its own, in a folder of its own, and Prometheus looks for names that vary in one
# folder alone: there each session gets a link, for as long as it lives.
link_sessions() {
    while true; do
        find "$links" -xtype l -delete
        for file in /tmp/lowbit-ray-*/prom_metrics_service_discovery.json; do
            if [ -e "$file" ]; then ln -sfn "$file" "$links/$(basename "$(dirname "$file")").json"; fi
        done
        sleep 5
    done
}
link_sessions &
trap 'kill $!' EXIT

echo "Prometheus: http://127.0.0.1:$port, data in $data"
prometheus --config.file="$here/prometheus.yml" --web.listen-address="127.0.0.1:$port" \
    --storage.tsdb.path="$data" --log.level=warn
