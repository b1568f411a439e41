"""vLLM's routes for chats, with a field ``era``: its own handlers, and a word on what was done.

The field goes to the renderer in the request's context, and the report comes back in it
(``era_vllm/vllm_plugin/requests.py``). OpenAI's chats and responses have their parts in messages
and in what tools answer; Anthropic's messages have image blocks, which vLLM turns into parts
without ``era`` and ``detail``. Leaves out every other route: ``fields`` refuses the field there.
"""

from collections.abc import Awaitable, Callable, Iterator, Mapping
from http import HTTPStatus
from inspect import signature
from typing import Annotated, Any, Final, Union, get_args

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, WithJsonSchema, create_model
from vllm.exceptions import VLLMValidationError

from era_vllm.compat.vllm_entrypoints import chat_api, messages_api, responses_api, tokenize_api
from era_vllm.config import EraConfig
from era_vllm.vllm_plugin.names import QUESTION_AWARE
from era_vllm.vllm_plugin.parts import (
    PartFields,
    fields_of_items,
    modality_of,
    placed_parts,
    with_lists,
    without_field,
)
from era_vllm.vllm_plugin.requests import (
    FIELD,
    MODALITIES,
    FieldError,
    ItemReport,
    current,
    item_rates,
    reports,
    requested_question,
    requested_rates,
)
from era_vllm_server.fields import MESSAGES
from era_vllm_server.metrics import REJECTED
from era_vllm_server.middleware.body import Body
from era_vllm_server.probe import modalities
from era_vllm_server.responses import Place, in_chat, in_messages, in_responses, with_era

_ROUTES: Final[Mapping[str, tuple[APIRouter, Place | None]]] = {
    "/v1/chat/completions": (chat_api.router, in_chat),
    "/v1/responses": (responses_api.router, in_responses),
    MESSAGES: (messages_api.router, in_messages),
    f"{MESSAGES}/count_tokens": (messages_api.router, None),
    "/tokenize": (tokenize_api.router, None),
}
"""vLLM's router of each, and where an answer says what was done; None = tokens are only counted."""
_SOURCES: Final = {"base64": "data", "url": "url"}
"""Types of an image block's source, and the field that holds the picture or its address."""
_SOURCE: Final = (
    '{"type": "base64", "media_type": "image/png", "data": ...} or {"type": "url", "url": ...}; '
    "send the picture itself, no files are kept here"
)


def _some_of(properties: Mapping[str, object]) -> dict[str, object]:
    """Return the schema of an object that has one of these fields at least, and no others."""
    alone = {"additionalProperties": False, "minProperties": 1}
    return {"type": "object", "properties": properties, **alone}


_RATE: Final = {"pruning_rate": {"type": "number", "minimum": 0, "exclusiveMaximum": 1}}
_LEVEL: Final = {"level": {"type": "string"}}
_BY_MODALITY: Final = dict.fromkeys(MODALITIES, {**_some_of(_RATE | _LEVEL), "maxProperties": 1})
_AWARE: Final = {QUESTION_AWARE: {"type": ["boolean", "null"]}}
_EraField = Annotated[
    object,
    WithJsonSchema(
        {
            "description": "How much to prune all items of this request, or by modality.",
            "anyOf": [
                *(_some_of({**one, **_AWARE}) for one in (_RATE, _LEVEL, _BY_MODALITY)),
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
        modalities=lambda: modalities(app.state),  # known once its engine is there
    )


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
        takes = modalities(raw_request.app.state)
        try:
            context.rates = requested_rates(body.get(FIELD), config, takes)
            context.question_aware = requested_question(body.get(FIELD), config)
            context.only_counted = place is None
            fields = item_fields(stock.path, body)
            if stock.path.startswith(MESSAGES):  # in whose conversion it gets lost
                context.part_fields = fields
            for modality, of_items in fields.items():
                rates = item_rates(of_items, context.rates.get(modality), config)
                if config.max_pruning_rate == 0:  # and the renderer is vLLM's own
                    unknown = [None] * len(rates)
                    unseen[modality] = reports(rates, unknown, unknown, config)
            if unseen:
                _strip(request)
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


def _strip(request: BaseModel) -> None:
    """Take ``era`` out of a request's parts, as our renderer would.

    Mutates: request.
    """
    for name in ("messages", "input"):
        if isinstance(messages := getattr(request, name, None), list):
            bare = without_field(with_lists(messages), ("content", "output"))
            setattr(request, name, bare)


def item_fields(path: str, body: dict[str, Any]) -> dict[str, list[PartFields]]:
    """Return what is said of each item of a chat, by modality, in the prompt's order.

    Raises:
        FieldError: a picture that vLLM leaves out, or refuses without a word on what is allowed.
    """
    if path.startswith(MESSAGES):
        return {"image": list(_fields_of_blocks(body)), "video": []}
    name = "messages" if body.get("messages") else "input"
    parts = list(placed_parts(body.get(name), name, ("content", "output")))
    for at, part in parts:
        if isinstance(part, dict) and modality_of(part) == "image" and not part.get("image_url"):
            raise FieldError(f"{at}.image_url", None, "data:image/...;base64,... or https://...")
    return fields_of_items(parts)


def _fields_of_blocks(body: dict[str, Any]) -> Iterator[PartFields]:
    """Yield what is said of each picture of Anthropic's form.

    Upstream: vllm/entrypoints/anthropic/serving.py:406 ``_convert_messages`` (0.32.0) takes images
    of messages only, those of the user's tool results before the message's own.
    """
    found, lost = list[tuple[str, dict[str, Any]]](), list(_blocks(body.get("system"), "system"))
    for row, message in enumerate(body["messages"]):
        at, content, role = f"messages[{row}].content", message["content"], message["role"]
        for place, result in _blocks(content, at, "tool_result"):
            within = _blocks(result.get("content"), f"{place}.content")
            (found if role == "user" else lost).extend(within)
        (lost if role == "system" else found).extend(_blocks(content, at))
    for at, block in lost:
        raise FieldError(at, block, "in a message of the user")
    for at, block in found:
        source = block.get("source")
        kind = source.get("type", "base64") if isinstance(source, dict) else None
        given = source.get(_SOURCES.get(kind)) if isinstance(kind, str) else None
        if not isinstance(given, str) or not given:
            raise FieldError(f"{at}.source", source, _SOURCE)
        within = source.get("detail")  # as in ``image_url``
        name = "detail" if within is None else "source.detail"
        yield PartFields(
            at, block.get(FIELD), block.get("detail") if within is None else within, name
        )


def _blocks(content: object, at: str, kind: str = "image") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield Anthropic's blocks of a type, each with its place."""
    for column, block in enumerate(content if isinstance(content, list) else ()):
        if isinstance(block, dict) and block.get("type") == kind:
            yield f"{at}[{column}]", block
