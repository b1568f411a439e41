#!/usr/bin/env bash
# Run one make target of this tree in a Linux container, where the machine itself cannot:
#     deploy/in_container.sh test
# The environment lives in a volume, so it is made once; the tree is mounted, so results stay.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
target=${1:?name a make target, as in: deploy/in_container.sh test}
if ! docker info >/dev/null 2>&1; then
    echo "make $target: on $(uname -s) $(uname -m) this runs in a Linux container, and no running" \
        "Docker was found: install Docker (or start it) and repeat." >&2
    exit 1
fi
docker build --quiet --target tools --tag era-vllm-tools \
    --build-arg BASE_IMAGE="${BASE_IMAGE:-python:3.12-slim-bookworm}" . >/dev/null
terminal=()
[[ -t 1 ]] && terminal=(--tty)
exec docker run --rm --init ${terminal[@]+"${terminal[@]}"} --shm-size 1g \
    --volume "$PWD:/src" --volume era-vllm-environment:/environment --workdir /src \
    --env ERA_VENV=/environment/venv --env FAST="${FAST:-}" --env CI="${CI:-}" \
    --env JOBS="${JOBS:-2}" \
    era-vllm-tools make "$target"
