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


def check_vllm_version(version: str | None = None) -> None:
    """Refuse an untested vLLM, or warn if ``ERA_ALLOW_UNTESTED_VLLM=1`` is set.

    Args:
        version: Default: the installed one. (``vllm.__version__``, since the CPU wheel's
            distribution has another name.)

    Raises:
        UnsupportedError: the version is outside of 0.32.x.
    """
    if version is None:
        import vllm

        version = vllm.__version__
    if version.startswith(f"{TESTED}."):
        return
    text = (
        f"era_vllm: got vLLM {version}, tested with {TESTED}.x; install 'vllm>={TESTED},<0.33', or "
        f"set {OVERRIDE}=1 to try this one (answers may be wrong)"
    )
    if os.environ.get(OVERRIDE) != "1":
        raise UnsupportedError(text)
    logger.warning("%s", text)
