"""Between which versions the seams of this folder are to hold; checked when a server starts.

They are run with what vLLM 0.32 installs (uvicorn 0.54, Starlette 1.10, FastAPI 0.136, h11 0.16,
pydantic 2.14), and end the start where what they need stands elsewhere. So a newer minor version is
let through, a new major one is not. vLLM's own range is in ``vllm_plugin/version``.
"""

import os
from importlib.metadata import version
from typing import Final

from packaging.version import Version

from era_vllm.errors import UnsupportedError

BOUNDS: Final = {
    "uvicorn": ("0.40", "1"),
    "h11": ("0.16", "1"),
    "starlette": ("1", "2"),
    "fastapi": ("0.115", "1"),
    "pydantic": ("2.12", "3"),
}
"""Distribution -> (from, below)."""
OVERRIDE: Final = "ERA_ALLOW_UNTESTED_VLLM"


def check_server_versions() -> None:
    """Check the packages that vLLM's server is made of.

    Raises:
        UnsupportedError: one is outside of its bounds, and ``ERA_ALLOW_UNTESTED_VLLM`` is not 1.
    """
    for name, (lowest, below) in BOUNDS.items():
        found = version(name)
        tested = Version(lowest) <= Version(found) < Version(below)
        if not tested and os.environ.get(OVERRIDE) != "1":
            raise UnsupportedError(
                f"{name}: got version {found}, needed from {lowest} and below {below}; install "
                f"'{name}>={lowest},<{below}', or set {OVERRIDE}=1 to try this one"
            )
