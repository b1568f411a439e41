"""Which code makes the numbers: part of every cache key, since caches outlive processes.

A version alone does not tell two unreleased builds apart, nor two versions of a policy or a family
that is not ours. So the code itself is hashed: the same on every machine that has the same files.
"""

import hashlib
import inspect
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Final

import era_vllm
from era_vllm.policies import policy_class

_NUMBERS: Final = ("attention", "compat", "models", "policies", "steps", "vllm_plugin")
"""Folders of the package; of its own files all."""


@cache
def build(policy: str, family: str = "") -> str:
    """Return our version, a hash of our code, and one of each module that is not ours.

    Args:
        policy: ``EraConfig.policy``.
        family: ``Family.target``; empty: whatever it is, one of ours. What these modules import
            is not hashed.
    """
    root = Path(inspect.getfile(era_vllm)).parent
    files = [*root.glob("*.py"), *(f for name in _NUMBERS for f in (root / name).rglob("*.py"))]
    own = hashlib.sha256()
    for path in sorted(files):
        own.update(path.relative_to(root).as_posix().encode())
        own.update(path.read_bytes())
    parts = [era_vllm.__version__, own.hexdigest()[:12]]
    if ":" in policy:
        parts.append(_of_file(inspect.getfile(policy_class(policy))))
    module = family.partition(":")[0]
    if module and not module.startswith(f"{era_vllm.__name__}."):
        parts.append(_of_file(inspect.getfile(import_module(module))))
    return " ".join(parts)


def _of_file(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
