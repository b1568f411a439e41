#!/usr/bin/env bash
# Make the secrets that deploy/compose.yaml mounts, where they do not exist yet:
#     deploy/secrets/api_keys           keys of clients, one a line: add your own
#     deploy/secrets/metrics_key        Prometheus's key to /metrics
#     deploy/secrets/grafana_password   of Grafana's user admin
# The folder is closed to other users of this machine; the files are readable inside of it, because
# a container without privileges reads them under its own user id.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/secrets"
chmod 700 .
for name in api_keys metrics_key grafana_password; do
    if [[ ! -s $name ]]; then
        printf 'era-%s\n' "$(head -c 24 /dev/urandom | base64 | tr '+/' '-_')" >"$name"
        echo "made deploy/secrets/$name"
    fi
    chmod 644 "$name"
done
