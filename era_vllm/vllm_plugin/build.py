"""Which code makes the numbers: part of every cache key, since caches outlive processes.

A version alone does not tell two unreleased builds apart, nor two versions of a policy that is not
ours. So the code itself is hashed: the same on every machine that has the same files.
"""

import hashlib
import inspect
from functools import cache
from pathlib import Path
from typing import Final

import era_vllm
from era_vllm.policies import policy_class

_NUMBERS: Final = ("attention", "compat", "models", "policies", "steps", "vllm_plugin")
"""Folders of the package; of its own files all."""


@cache
def build(policy: str) -> str:
    """Return our version, a hash of our code, and one of the module of a policy from elsewhere."""
    root = Path(inspect.getfile(era_vllm)).parent
    files = [*root.glob("*.py"), *(f for name in _NUMBERS for f in (root / name).rglob("*.py"))]
    own = hashlib.sha256()
    for path in sorted(files):
        own.update(path.relative_to(root).as_posix().encode())
        own.update(path.read_bytes())
    parts = [era_vllm.__version__, own.hexdigest()[:12]]
    if ":" in policy:
        source = Path(inspect.getfile(policy_class(policy))).read_bytes()
        parts.append(hashlib.sha256(source).hexdigest()[:12])
    return " ".join(parts)
