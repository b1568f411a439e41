"""Which vLLM this version was tested with; anything else is refused where pruning is switched on.

Not called from ``register()``: an exception there would kill a stock vLLM that merely has the
package installed.
"""

import logging
import os
from typing import Final

from era_vllm.errors import UnsupportedError

logger = logging.getLogger(__name__)

TESTED: Final = "0.32"
OVERRIDE: Final = "ERA_ALLOW_UNTESTED_VLLM"
INSTALL: Final = (
    "pip install 'era-vllm[cuda]' (NVIDIA GPU), or without one 'era-vllm[cpu]' with PyTorch's CPU "
    "index as --extra-index-url, as deploy/environment.sh (make env) does"
)


def check_vllm_version(version: str | None = None) -> None:
    """Refuse an untested vLLM, or warn if ``ERA_ALLOW_UNTESTED_VLLM=1`` is set.

    Args:
        version: Default: the installed one. (``vllm.__version__``, since the CPU wheel's
            distribution has another name.)

    Raises:
        UnsupportedError: no vLLM is installed, or its version is outside of 0.32.x.
    """
    version = installed_version() if version is None else version
    if version is None:
        raise UnsupportedError(f"era_vllm prunes inside of vLLM, which is not installed; {INSTALL}")
    if version.startswith(f"{TESTED}."):
        return
    text = (
        f"era_vllm: got vLLM {version}, tested with {TESTED}.x; install 'vllm>={TESTED},<0.33', or "
        f"set {OVERRIDE}=1 to try this one (answers may be wrong)"
    )
    if os.environ.get(OVERRIDE) != "1":
        raise UnsupportedError(text)
    logger.warning("%s", text)


def installed_version() -> str | None:
    """Return vLLM's version, or None where it is not installed."""
    try:
        import vllm
    except ModuleNotFoundError as error:
        if error.name != "vllm":  # it is there, and broken
            raise
        return None
    return vllm.__version__
