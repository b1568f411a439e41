"""Names of vLLM's server that stand elsewhere from one version to the next.

Upstream, 0.32 -> 0.33: ``cli_env_setup`` in vllm/entrypoints/serve/utils/api_utils.py ->
entrypoints/common/startup.py; ``MM_PARSER_MAP`` and ``TEXT_PART_TYPES`` in
vllm/renderers/chat_utils.py -> chat_utils/chat_message.py. Remove the first of each pair with 0.32.
"""

from vllm.entrypoints.launchers.utils.constants import H11_MAX_INCOMPLETE_EVENT_SIZE_DEFAULT

try:
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
except ImportError:
    from vllm.entrypoints.common.startup import cli_env_setup  # type: ignore[no-redef]

try:
    from vllm.renderers.chat_utils import MM_PARSER_MAP, TEXT_PART_TYPES
except ImportError:
    from vllm.renderers.chat_utils.chat_message import (  # type: ignore[no-redef]
        MM_PARSER_MAP,
        TEXT_PART_TYPES,
    )

__all__ = [
    "H11_MAX_INCOMPLETE_EVENT_SIZE_DEFAULT",
    "MM_PARSER_MAP",
    "TEXT_PART_TYPES",
    "cli_env_setup",
]
