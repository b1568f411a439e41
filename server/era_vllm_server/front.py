"""What turns vLLM's server into ours: one middleware, one endpoint plugin, one media connector.

``with_front`` decides vLLM's flags and variables for them, so that ``era-vllm serve`` and the plain
``vllm serve`` line that it prints start the same server. docs/security.md has a table of them.
"""

import json
import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import entry_points
from typing import Final

from era_vllm.errors import ConfigError, UnsupportedError
from era_vllm.vllm_plugin.launch import Launch, plugins_to_allow
from era_vllm.vllm_plugin.names import PLUGIN
from era_vllm_server.addresses import allowed_hosts
from era_vllm_server.keys import Keys, keys_of
from era_vllm_server.settings import ServerSettings

MIDDLEWARE: Final = "era_vllm_server.middleware.Front"
MAX_HEAD_BYTES: Final = 2**18
"""Of a request's head, its trailers, a chunk's frame: before any key. vLLM's default is 4 MiB."""
CONNECTOR: Final = "era"
LIMITS: Final = {
    "VLLM_MAX_N_SEQUENCES": "128",  # OpenAI's own bound of n; vLLM's is 16384
    "VLLM_MAX_COMPLETION_PROMPTS": "128",  # 1024
    "VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB": "20",  # 256
    "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",  # 1; for what does not fetch through our connector
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "75",  # 5 s, as httpx: a request can meet the closing
}
"""vLLM's own limits, set where the user has not set them; behind each vLLM's default."""
ITEMS: Final = {"image": 16, "video": 2}
"""Most of a prompt; vLLM's default is 999. A pruned item is few tokens and a whole run of the
encoder, so that the length of a prompt no longer bounds the work."""
_OURS: Final = {"VLLM_MEDIA_CONNECTOR": CONNECTOR, "VLLM_USE_RUST_FRONTEND": "0"}
"""Variables without which there is no front; others' values refuse."""
_GROUPS: Final = (
    "vllm.general_plugins",
    "vllm.platform_plugins",
    "vllm.io_processor_plugins",
    "vllm.stat_logger_plugins",
)
_ENDPOINTS: Final = "vllm.endpoint_plugins"
_MARGIN_S: Final = 10
"""For vLLM's own shutdown, once nothing is under way."""


def with_front(
    launch: Launch, typed: Sequence[str], settings: ServerSettings, user: Namespace
) -> tuple[Launch, list[str]]:
    """Return a launch, and the words typed, with the front's own added.

    Args:
        user: What vLLM reads from the words (``app.user_flags``).

    Raises:
        ConfigError: vLLM would end accepted requests before we do, or keys or a domain are no use.
        UnsupportedError: a server or a connector in which ours would not stand.
    """
    _refuse_ways_around(user)
    vllms = user.api_key or [os.environ.get("VLLM_API_KEY")]
    keys_of(settings, Keys.of(filter(None, vllms)))  # now, and not when the model is loaded
    allowed_hosts(user.allowed_media_domains or ())
    drain_s = settings.drain_timeout_s
    words = [*typed, "--middleware", MIDDLEWARE]  # behind the user's own: the last is outermost
    if user.h11_max_incomplete_event_size is None:
        words += ["--h11-max-incomplete-event-size", str(MAX_HEAD_BYTES)]
    if settings.log_json:
        words += ["--disable-uvicorn-access-log", "--logging-config.formatter", "json"]
    if user.shutdown_timeout and user.shutdown_timeout <= drain_s:
        raise ConfigError(
            f"--shutdown-timeout: got {user.shutdown_timeout} s, needed more than "
            f"--era-drain-timeout-s ({drain_s:g} s); vLLM would end the requests that are still "
            "draining"
        )
    if drain_s and not user.shutdown_timeout:
        words += ["--shutdown-timeout", str(int(drain_s) + _MARGIN_S)]
    media = user.limit_mm_per_prompt or {}
    words += _limits(typed, media)
    wanted = {
        "VLLM_MAX_IMAGE_PIXELS": str(settings.max_image_pixels),  # vLLM's default: 178956970
        **LIMITS,
    }
    unset = {name: value for name, value in wanted.items() if name not in os.environ}
    plugins = plugins_to_allow() if "VLLM_PLUGINS" in os.environ else ",".join(_installed())
    environment = {
        **({} if plugins is None else {"VLLM_PLUGINS": plugins}),
        **unset,
        **_OURS,
        **settings.variables(),
        **launch.environment,
    }
    return replace(launch, environment=environment), words


def _refuse_ways_around(user: Namespace) -> None:
    """Refuse what would serve without keys, deadline, limits or the checks of URLs and pictures."""
    http = "needed vLLM's HTTP server in Python, in which keys, limits and pruning rates are"
    if user.grpc or user.grpc_port is not None:
        raise UnsupportedError(f"--grpc, --grpc-port: got one of them, {http}; leave it out")
    if (rust := os.environ.get("VLLM_USE_RUST_FRONTEND", "")) not in ("", "0"):
        raise UnsupportedError(f"VLLM_USE_RUST_FRONTEND: got {rust!r}, {http}; unset it")
    if (name := os.environ.get("VLLM_MEDIA_CONNECTOR", CONNECTOR)) != CONNECTOR:
        raise UnsupportedError(
            f"VLLM_MEDIA_CONNECTOR: got {name!r}, needed {CONNECTOR!r}, which checks where URLs "
            "lead and what pictures hold; unset it"
        )


def _limits(typed: Sequence[str], given: Mapping[str, object]) -> list[str]:
    """Return the words that add the limits of items to what the user says of some of them."""
    flag, more = "--limit-mm-per-prompt", {k: v for k, v in ITEMS.items() if k not in given}
    if not more:
        return []
    if any(word.replace("_", "-").startswith(f"{flag}.") for word in typed):
        # vLLM puts such words behind all others
        return [word for name, most in more.items() for word in (f"{flag}.{name}", str(most))]
    return [flag, json.dumps({**given, **more})]


def _installed() -> list[str]:
    """Return every plugin that vLLM loads while ``VLLM_PLUGINS`` is not set, and ours.

    Endpoint plugins are loaded only where the variable names them, which it must for ours: other
    packages' stay off.
    """
    off = {point.name for point in entry_points(group=_ENDPOINTS)}
    names = {point.name for group in _GROUPS for point in entry_points(group=group)}
    return sorted((names - off) | {PLUGIN})
