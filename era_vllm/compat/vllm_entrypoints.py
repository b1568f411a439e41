"""vLLM's HTTP server: its parser, routers, errors and names, which are nobody's promise.

Upstream, 0.32 -> 0.33 where it moves: ``cli_env_setup`` in
vllm/entrypoints/serve/utils/api_utils.py -> entrypoints/common/startup.py; ``MM_PARSER_MAP`` and
``TEXT_PART_TYPES`` in vllm/renderers/chat_utils.py -> chat_utils/chat_message.py; a handler whose
client has gone returns None -> an empty response. Remove the first of each pair with 0.32, and the
module when vLLM has an API for servers that extend its own.
"""
# What others import from here.
# ruff: noqa: F401
# pyright: reportUnusedImport=false

from vllm.entrypoints.anthropic import api_router as messages_api
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.entrypoints.launchers.utils.constants import H11_MAX_INCOMPLETE_EVENT_SIZE_DEFAULT
from vllm.entrypoints.openai.chat_completion import api_router as chat_api
from vllm.entrypoints.openai.responses import api_router as responses_api
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.entrypoints.serve.tokenize import api_router as tokenize_api
from vllm.entrypoints.serve.utils.api_utils import validate_json_request, with_cancellation
from vllm.v1.metrics.prometheus import get_prometheus_registry

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
