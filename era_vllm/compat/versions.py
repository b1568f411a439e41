"""Between which versions the seams of this folder hold; checked when a server starts.

Each seam also fails by itself where what it needs stands elsewhere: nothing is served half bounded.
A new minor version is let through for that reason, a new major one is not. vLLM's own range is in
``vllm_plugin/version``.
"""

import os
from importlib.metadata import version
from typing import Final

from packaging.version import Version

from era_vllm.errors import UnsupportedError

BOUNDS: Final = {
    "uvicorn": ("0.30", "1"),
    "h11": ("0.14", "1"),
    "starlette": ("0.40", "2"),
    "fastapi": ("0.115", "1"),
    "pydantic": ("2.10", "3"),
}
"""Distribution -> (from, below). Tested: those that vLLM 0.32 installs."""
OVERRIDE: Final = "ERA_ALLOW_UNTESTED_VLLM"


def check_server_versions() -> None:
    """Check the packages that vLLM's server is made of.

    Raises:
        UnsupportedError: one is outside of its bounds, and ``ERA_ALLOW_UNTESTED_VLLM`` is not 1.
    """
    for name, (lowest, below) in BOUNDS.items():
        found = version(name)
        if not Version(lowest) <= Version(found) < Version(below):
            if os.environ.get(OVERRIDE) == "1":
                continue
            raise UnsupportedError(
                f"{name}: got version {found}, tested from {lowest} and below {below}; install "
                f"'{name}>={lowest},<{below}', or set {OVERRIDE}=1 to try this one"
            )
