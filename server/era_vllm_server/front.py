"""What turns vLLM's server into ours: one middleware, one endpoint plugin, one media connector.

``with_front`` decides vLLM's flags and variables for them, so that ``era-vllm serve`` and the plain
``vllm serve`` line that it prints start the same server.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import entry_points
from typing import Final

from era_vllm.vllm_plugin.launch import PLUGIN, Launch
from era_vllm_server.settings import ServerSettings

MIDDLEWARE: Final = "era_vllm_server.guard.Guard"
CONNECTOR: Final = "era"
_GROUPS: Final = (
    "vllm.general_plugins",
    "vllm.platform_plugins",
    "vllm.io_processor_plugins",
    "vllm.stat_logger_plugins",
)
_ENDPOINTS: Final = "vllm.endpoint_plugins"


def with_front(
    launch: Launch, typed: Sequence[str], settings: ServerSettings, shutdown_timeout: int
) -> tuple[Launch, list[str]]:
    """Return a launch, and the words typed, with the front's own added.

    Args:
        launch: Of the engine.
        typed: Model and flags of ``vllm serve``, as typed.
        settings: Of the front.
        shutdown_timeout: What vLLM reads as ``--shutdown-timeout`` from them; 0 = not typed.
    """
    words = [*typed, "--middleware", MIDDLEWARE]  # behind the user's own: the last is outermost
    if not shutdown_timeout:  # it must outlast our own drain
        words += ["--shutdown-timeout", str(int(settings.drain_timeout_s) + 10)]
    environment = {
        "VLLM_PLUGINS": ",".join(_installed()),
        "VLLM_MEDIA_CONNECTOR": CONNECTOR,
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
        "VLLM_MAX_IMAGE_PIXELS": str(settings.max_image_pixels),
        **settings.variables(),
        **launch.environment,
    }
    if PLUGIN in os.environ.get("VLLM_PLUGINS", "").split(","):
        del environment["VLLM_PLUGINS"]
    return replace(launch, environment=environment), words


def _installed() -> list[str]:
    """Return every plugin that vLLM loads while ``VLLM_PLUGINS`` is not set, and ours.

    Endpoint plugins are loaded only where the variable names them, which it must for ours: other
    packages' stay off.
    """
    off = {point.name for point in entry_points(group=_ENDPOINTS)}
    names = {point.name for group in _GROUPS for point in entry_points(group=group)}
    return sorted((names - off) | {PLUGIN})
