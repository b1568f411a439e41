#!/usr/bin/env bash
# Real requests: a picture, two pictures and, where the model takes them, a video. Fail unless the
# server is ready, answers have text, `era` says what was pruned of each, and /metrics counted it.
#     deploy/smoke.sh [URL] [IMAGE_TOKENS]
# IMAGE_TOKENS: what the picture costs the served model unpruned, where you know it.
# Needs Python alone. Keys: $API_KEY and $METRICS_KEY, or the first ones in deploy/secrets, where
# keys.sh made them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
PYTHONPATH=loadtest exec python3 smoke.py "${1:-http://127.0.0.1:8000}" ${2:+"$2"}
