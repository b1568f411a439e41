"""vLLM's three chat routes with a field ``era``: its own handlers, and a word on what was done.

The field goes to the renderer in the request's scope, and the report comes back in it
(``era_vllm/vllm_plugin/requests.py``). Leaves out every other route: ``fields`` refuses the field
there.
"""

from collections.abc import Iterator
from http import HTTPStatus
from typing import Annotated, Final

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import WithJsonSchema
from vllm.entrypoints.anthropic import api_router as messages_api
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.openai.chat_completion import api_router as chat_api
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.responses import api_router as responses_api
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import VLLMValidationError

from era_vllm.config import EraConfig
from era_vllm.vllm_plugin.requests import (
    FIELD,
    FieldError,
    ImageReport,
    asked_rate,
    current,
    image_details,
    image_rates,
    is_image,
    reports,
)
from era_vllm_server.metrics import REJECTED
from era_vllm_server.middleware.body import Body
from era_vllm_server.responses import Place, in_chat, in_messages, in_responses, with_era

router = APIRouter()
EraField = Annotated[
    object,
    WithJsonSchema(
        {
            "description": "How much to prune all images of this request.",
            "anyOf": [
                {
                    "type": "object",
                    "properties": {
                        "pruning_rate": {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
                        "level": {"type": "string"},
                    },
                    "additionalProperties": False,
                    "minProperties": 1,
                    "maxProperties": 1,
                },
                {"type": "null"},
            ],
        }
    ),
]


class EraChatRequest(ChatCompletionRequest):
    """vLLM's request, with the field."""

    era: EraField = None


class EraResponsesRequest(ResponsesRequest):
    """vLLM's request, with the field."""

    era: EraField = None


class EraMessagesRequest(AnthropicMessagesRequest):
    """vLLM's request, with the field."""

    era: EraField = None


def _route(stock: APIRouter, path: str) -> APIRoute:
    return next(
        route for route in stock.routes if isinstance(route, APIRoute) and route.path == path
    )


_CHAT: Final = _route(chat_api.router, "/v1/chat/completions")
_RESPONSES: Final = _route(responses_api.router, "/v1/responses")
_MESSAGES: Final = _route(messages_api.router, "/v1/messages")


@router.post(_CHAT.path, dependencies=_CHAT.dependencies, responses=_CHAT.responses)
async def chat(request: EraChatRequest, raw_request: Request) -> Response:
    """Create a chat completion."""
    return await _answer(_CHAT, request, raw_request, in_chat)


@router.post(_RESPONSES.path, dependencies=_RESPONSES.dependencies, responses=_RESPONSES.responses)
async def responses(request: EraResponsesRequest, raw_request: Request) -> Response:
    """Create a response."""
    return await _answer(_RESPONSES, request, raw_request, in_responses)


@router.post(_MESSAGES.path, dependencies=_MESSAGES.dependencies, responses=_MESSAGES.responses)
async def messages(request: EraMessagesRequest, raw_request: Request) -> Response:
    """Create a message."""
    try:
        return await _answer(_MESSAGES, request, raw_request, in_messages)
    except VLLMValidationError as error:
        return messages_api.translate_error_response(create_error_response(error))


def attach(app: FastAPI) -> None:
    """Add the routes, and the layer that reads every body; inside of vLLM's authentication."""
    app.include_router(router)
    app.add_middleware(
        Body,
        take_era=frozenset({_CHAT.path, _RESPONSES.path, _MESSAGES.path}),
        policy=app.state.era_config.policy,
        allow_image_uuid=app.state.era_settings.allow_image_uuid,
    )


async def _answer(
    stock: APIRoute,
    request: EraChatRequest | EraResponsesRequest | EraMessagesRequest,
    raw_request: Request,
    place: Place,
) -> Response:
    """Let vLLM answer; then say what was done.

    Raises:
        VLLMValidationError: the field is malformed or out of bounds; a 400.
    """
    config: EraConfig = raw_request.app.state.era_config
    scope = current()
    assert scope is not None, "Body opens one for every request"
    unseen = list[ImageReport]()
    try:
        scope.asked = asked_rate(request.era, config)
        if config.max_pruning_rate == 0:
            unseen = _seen_by_nobody(await raw_request.json(), scope.asked, config)
    except FieldError as error:
        REJECTED.labels(FIELD).inc()
        raise VLLMValidationError(str(error), parameter=error.field) from error
    response: Response | None = await stock.endpoint(request, raw_request)
    if response is None:  # the client has gone
        return response
    if unseen and response.status_code == HTTPStatus.OK:
        scope.report(unseen)
    images = [image.as_dict() for image in scope.images]
    policy = config.policy if config.max_pruning_rate else None
    return with_era(response, {"policy": policy, "images": images}, place)


def _pictures(said: object) -> Iterator[dict[str, object]]:
    """Yield the parts of a body's messages that are images, those in a tool's answer too.

    Anthropic's parts of type ``image`` come out as what vLLM makes of them.
    """
    if isinstance(said, list):
        for one in said:
            yield from _pictures(one)
    elif isinstance(said, dict):
        if is_image(said):
            yield said
        elif said.get("type") == "image" and "source" in said:
            yield {"type": "image_url", "image_url": {}}
        else:
            for name in ("content", "output"):
                yield from _pictures(said.get(name))


def _seen_by_nobody(
    body: dict[str, object], asked: float | None, config: EraConfig
) -> list[ImageReport]:
    """Return what is known of a request's images where the renderer is vLLM's own."""
    details = image_details(
        [{"content": list(_pictures(body.get("messages") or body.get("input")))}]
    )
    unknown = [None] * len(details)
    return reports(image_rates(details, asked, config), unknown, unknown, config)
