"""vLLM's routes for chats, with a field ``era``: its own handlers, and a word on what was done.

The field goes to the renderer in the request's context, and the report comes back in it
(``era_vllm/vllm_plugin/requests.py``). Leaves out every other route: ``fields`` refuses the field
there.
"""

from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from inspect import signature
from typing import Annotated, Any, Final, Union, get_args

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import WithJsonSchema, create_model
from vllm.exceptions import VLLMValidationError

from era_vllm.compat.vllm_entrypoints import chat_api, messages_api, responses_api, tokenize_api
from era_vllm.config import EraConfig
from era_vllm.vllm_plugin.requests import (
    FIELD,
    MODALITIES,
    FieldError,
    ItemReport,
    current,
    image_details,
    is_image,
    is_video,
    item_rates,
    reports,
    requested_rates,
)
from era_vllm_server.metrics import REJECTED
from era_vllm_server.middleware.body import Body
from era_vllm_server.probe import modalities
from era_vllm_server.responses import Place, in_chat, in_messages, in_responses, with_era

_MESSAGES: Final = "/v1/messages"
_ROUTES: Final[Mapping[str, tuple[APIRouter, Place | None]]] = {
    "/v1/chat/completions": (chat_api.router, in_chat),
    "/v1/responses": (responses_api.router, in_responses),
    _MESSAGES: (messages_api.router, in_messages),
    f"{_MESSAGES}/count_tokens": (messages_api.router, None),
    "/tokenize": (tokenize_api.router, None),
}
"""vLLM's router of each, and where an answer says what was done; None = tokens are only counted."""
_SOURCES: Final = {"base64": "data", "url": "url"}
"""Types of an image block's source, and the field that holds the picture or its address."""
_SOURCE: Final = (
    '{"type": "base64", "media_type": "image/png", "data": ...} or {"type": "url", "url": ...}; '
    "send the picture itself, no files are kept here"
)
_RATE: Final = {
    "type": "object",
    "properties": {
        "pruning_rate": {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
        "level": {"type": "string"},
    },
    "additionalProperties": False,
    "minProperties": 1,
    "maxProperties": 1,
}
_EraField = Annotated[
    object,
    WithJsonSchema(
        {
            "description": "How much to prune all items of this request, or by modality.",
            "anyOf": [
                _RATE,
                {
                    "type": "object",
                    "properties": dict.fromkeys(MODALITIES, _RATE),
                    "additionalProperties": False,
                    "minProperties": 1,
                },
                {"type": "null"},
            ],
        }
    ),
]


def attach(app: FastAPI) -> None:
    """Add the routes, and the layer that reads every body; inside of vLLM's authentication."""
    for path, (router, place) in _ROUTES.items():
        routes = [route for route in router.routes if isinstance(route, APIRoute)]
        stock = next(route for route in routes if route.path == path)
        options = {"dependencies": stock.dependencies, "responses": stock.responses}
        app.post(path, name=stock.name, **options)(_handler(stock, place))
    app.add_middleware(
        Body,
        take_era=frozenset(_ROUTES),
        policy=app.state.era_config.policy,
        allow_image_uuid=app.state.era_settings.allow_image_uuid,
        modalities=lambda: _modalities(app),
    )


def _modalities(app: FastAPI) -> tuple[str, ...]:
    """Return what the model takes, which is known once its engine is there."""
    return modalities(app.state)


def _handler(stock: APIRoute, place: Place | None) -> Callable[..., Awaitable[Response | None]]:
    """Return vLLM's handler, whose request has the field and whose answer says what was done."""
    taken = signature(stock.endpoint).parameters["request"].annotation
    models = tuple(
        create_model(f"Era{model.__name__}", __base__=model, era=(_EraField, None))
        for model in get_args(taken) or (taken,)
    )

    async def handler(request: Union[models], raw_request: Request) -> Response:  # noqa: UP007
        config: EraConfig = raw_request.app.state.era_config
        context = current()
        assert context is not None, "Body opens one for every request"
        body: dict[str, Any] = await raw_request.json()  # which FastAPI has parsed
        unseen = dict[str, list[ItemReport]]()
        takes = _modalities(raw_request.app)
        try:
            context.rates = requested_rates(body.get(FIELD), config, takes)
            context.only_counted = place is None
            details = image_details([{"content": _pictures(stock.path, body)}])
            if stock.path.startswith(_MESSAGES):  # in whose conversion they get lost
                context.details = details
            if config.max_pruning_rate == 0:  # and the renderer is vLLM's own
                every = {"image": details, "video": [None] * _videos(body)}
                for modality, of_items in every.items():
                    rates = item_rates(of_items, context.rates.get(modality), config)
                    unknown = [None] * len(rates)
                    unseen[modality] = reports(rates, unknown, unknown, config)
        except FieldError as error:
            REJECTED.labels(FIELD).inc()
            raise VLLMValidationError(str(error), parameter=error.field) from error
        response: Response | None = await stock.endpoint(request, raw_request)
        if response is None or place is None:  # the client has gone; or there is nothing to say
            return response
        if unseen and response.status_code == HTTPStatus.OK:
            context.report(unseen)
        policy = config.policy if config.max_pruning_rate else None
        done = {f"{name}s": [one.as_dict() for one in some] for name, some in context.items.items()}
        if not done.get("videos"):
            done.pop("videos", None)
        return with_era(response, {"policy": policy, "images": [], **done}, place)

    handler.__doc__ = stock.endpoint.__doc__
    return handler


def _pictures(path: str, body: dict[str, Any]) -> list[dict[str, object]]:
    """Return the parts of a chat that are images, in the prompt's order and in OpenAI's form.

    Args:
        path: Of its route.
        body: What the route has validated.

    Raises:
        FieldError: one that vLLM leaves out, or refuses without a word on what is allowed.

    Upstream: vllm/entrypoints/anthropic/serving.py:406 ``_convert_messages`` (0.32.0) takes images
    of messages only, those of the user's tool results before the message's own.
    """
    if not path.startswith(_MESSAGES):
        said = body.get("messages") or body.get("input")
        items = [item for item in said if isinstance(item, dict)] if isinstance(said, list) else []
        contents = [item.get(name) for item in items for name in ("content", "output")]
        parts = [part for content in contents if isinstance(content, list) for part in content]
        found = [part for part in parts if is_image(part)]
        if any(not part.get("image_url") for part in found):
            raise FieldError("image_url", None, "data:image/...;base64,... or https://...")
        return found
    found, lost = list[dict[str, Any]](), _blocks(body.get("system"), "image")
    for message in body["messages"]:
        content, role = message["content"], message["role"]
        results = [result.get("content") for result in _blocks(content, "tool_result")]
        within = [block for result in results for block in _blocks(result, "image")]
        (found if role == "user" else lost).extend(within)
        (lost if role == "system" else found).extend(_blocks(content, "image"))
    if lost:
        raise FieldError("image", lost[0], "in a message of the user")
    return [_part(block) for block in found]


def _videos(body: dict[str, Any]) -> int:
    """Return how many videos a chat holds."""
    said = body.get("messages") or body.get("input")
    items = [item for item in said if isinstance(item, dict)] if isinstance(said, list) else []
    contents = [item.get("content") for item in items]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return sum(isinstance(part, dict) and is_video(part) for part in parts)


def _blocks(content: object, kind: str) -> list[dict[str, Any]]:
    """Return Anthropic's blocks of a type."""
    blocks = content if isinstance(content, list) else []
    return [block for block in blocks if isinstance(block, dict) and block.get("type") == kind]


def _part(block: dict[str, Any]) -> dict[str, object]:
    """Return what vLLM makes of an image block, with its ``detail``."""
    source = block.get("source")
    kind = source.get("type", "base64") if isinstance(source, dict) else None
    given = source.get(_SOURCES.get(kind)) if isinstance(kind, str) else None
    if not isinstance(given, str) or not given:
        raise FieldError("source", source, _SOURCE)
    return {"type": "image_url", "image_url": source, "detail": block.get("detail")}
