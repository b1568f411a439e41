"""``/v1/era/inspect``: what a picture or video loses, as this engine really prunes it.

The item goes through the engine as a request of its own: the same connector, processor, encoder
and policy as a client's, under an identity that no cache knows. The workers catch what their
reducer made of it (``inspector.py``); with ``read_back`` they also read the biases out of the KV
slots while the request holds them. One item at a time in an API server, within a time limit; who
comes meanwhile is told to come again.
"""

import asyncio
import base64
import io
import uuid
from collections import Counter
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any, Final, Literal

import torch
from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from vllm import envs
from vllm.config import ModelConfig
from vllm.engine.protocol import EngineClient
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import MultiModalKwargsItem
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY
from vllm.transformers_utils.processor import get_video_processor_cls_name

from era_vllm.compat.vllm_entrypoints import (
    create_error_response,
    validate_json_request,
    with_cancellation,
)
from era_vllm.config import EraConfig
from era_vllm.errors import UnsupportedError
from era_vllm.viz import Kept, draw, seen
from era_vllm.vllm_plugin.fields import NUM_ANCHORS, PIXEL_HASH, QUESTION, field, shape_of
from era_vllm.vllm_plugin.parts import fields_of_items
from era_vllm.vllm_plugin.processor import PrunedInfoMixin, pixels_of
from era_vllm.vllm_plugin.requests import (
    FieldError,
    ItemRate,
    item_rates,
    reports,
    requested_question,
    requested_rates,
)
from era_vllm_server import probe

_LIMIT_S: Final = 30.0
_TOKENS_WHILE_READING: Final = 256
"""The request that is read decodes at most so far before it ends by itself."""
_OTHER_WORKERS: Final = (
    "the workers run a --worker-extension-cls that is not ours; leave it out, or have it inherit "
    "from era_vllm.vllm_plugin.worker.EraWorker"
)
_SHARED: Final = (
    "--mm-processor-cache-type shm keeps pictures where only the workers look; start with lru, "
    "vLLM's default"
)

router = APIRouter()


class ItemUrl(BaseModel):
    """A picture or video as in a chat."""

    model_config = ConfigDict(extra="forbid")
    url: str
    detail: Any = None


def _as_object(given: object) -> object:
    """Take the address alone for the object, as chat routes do."""
    return {"url": given} if isinstance(given, str) else given


class InspectRequest(BaseModel):
    """Body of the route: a part of a chat, as it is, and what is to be told of it."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["image_url", "video_url"] | None = None
    image_url: Annotated[ItemUrl | None, BeforeValidator(_as_object)] = None
    video_url: Annotated[ItemUrl | None, BeforeValidator(_as_object)] = None
    era: Annotated[Any, Field(description="as in a chat, or in a part of one")] = None
    detail: Any = None
    question: Annotated[
        str | None, Field(description="what is asked of it, where the server prunes for that")
    ] = None
    read_back: bool = False
    picture: bool = True

    @model_validator(mode="after")
    def _one_item(self) -> "InspectRequest":
        if (self.image_url is None) == (self.video_url is None):
            raise ValueError("image_url, video_url: needed one of the two")
        if self.type not in (None, self.key):
            raise ValueError(f"type: got {self.type}, needed {self.key}")
        return self

    @property
    def modality(self) -> str:
        """Of the item."""
        return "video" if self.image_url is None else "image"

    @property
    def key(self) -> str:
        """Field that holds the item."""
        return f"{self.modality}_url"

    @property
    def url(self) -> str:
        """Address in that."""
        found = self.image_url or self.video_url
        assert found is not None, "_one_item"
        return found.url


@dataclass(frozen=True, slots=True)
class Pruned:
    """What came back for one item."""

    item: MultiModalKwargsItem
    """What the encoder was given."""
    pruned: Mapping[str, Any]
    """``inspector.Found`` of rank 0; all ranks prune alike."""
    read_back: list[Mapping[str, Any]] | None
    """``worker.ReadBack`` of each rank."""


@router.post("/v1/era/inspect", dependencies=[Depends(validate_json_request)])
@with_cancellation
async def inspect(request: InspectRequest, raw_request: Request) -> Response:
    """Return what is kept of an item: JSON, or the picture alone where PNG is asked for."""
    state = raw_request.app.state
    config: EraConfig = state.era_config
    retry = {"Retry-After": str(state.era_settings.retry_after_s)}
    if config.max_pruning_rate == 0:
        return _refusal(HTTPStatus.BAD_REQUEST, "this server prunes nothing (maximum rate 0)")
    if not probe.workers_answer(state.engine_client):
        return _refusal(HTTPStatus.NOT_IMPLEMENTED, _OTHER_WORKERS)
    takes = probe.modalities(state)
    if request.modality not in takes:
        wrong = f"{request.modality}_url: this model takes {' and '.join(takes)} only"
        return _refusal(HTTPStatus.BAD_REQUEST, wrong)
    rate = _rate(request, config, takes)
    if state.era_inspecting.locked():
        return _refusal(HTTPStatus.TOO_MANY_REQUESTS, "an inspection is running; try again", retry)
    async with state.era_inspecting:
        item = await _fetch(state.vllm_config.model_config, request)
        try:
            async with asyncio.timeout(_LIMIT_S):
                found = await _ask(state.engine_client, item, rate.pruning_rate, request)
        except UnsupportedError as error:
            return _refusal(HTTPStatus.NOT_IMPLEMENTED, str(error))
        except TimeoutError:
            found = None
        if found is None:
            busy = "the engine is too busy to be inspected; try again"
            return _refusal(HTTPStatus.SERVICE_UNAVAILABLE, busy, retry)
        png_alone = "image/png" in raw_request.headers.get("accept", "")
        png = None
        if png_alone or request.picture:
            title = f"policy {config.policy}, pruning rate {rate.pruning_rate:g}"
            info = state.engine_client.renderer.get_mm_processor().info
            png = await asyncio.to_thread(_draw, found, info, title, request.modality)
    if png_alone:
        return Response(png, media_type="image/png")
    return JSONResponse(_payload(found, rate, config, png))


def _rate(request: InspectRequest, config: EraConfig, takes: tuple[str, ...]) -> ItemRate:
    try:
        asked = requested_rates(request.era, config, takes).get(request.modality)
        part = request.model_dump(exclude={"era"}, exclude_none=True)  # whose era is the request's
        (rate,) = item_rates(fields_of_items([("", part)])[request.modality], asked, config)
        aware = requested_question(request.era, config)
        if request.question is not None and not aware:
            allowed = "none, or a server that was started with --era-question-aware"
            if config.question_aware:
                allowed = "none beside era.question_aware: false"
            raise FieldError("question", request.question, allowed)
        return rate if asked is None else ItemRate(asked, "era")
    except FieldError as error:
        raise VLLMValidationError(str(error), parameter=error.field) from error


async def _fetch(config: ModelConfig, request: InspectRequest) -> object:
    """Get an item as the chat routes do."""
    connector = MEDIA_CONNECTOR_REGISTRY.load(
        envs.VLLM_MEDIA_CONNECTOR,
        media_io_kwargs=config.get_multimodal_config().media_io_kwargs,
        allowed_local_media_path=config.allowed_local_media_path,
        allowed_media_domains=config.allowed_media_domains,
    )
    if request.modality == "image":
        return await connector.fetch_image_async(request.url)
    name = get_video_processor_cls_name(config)
    return await connector.fetch_video_async(request.url, video_processor=name)


async def _ask(
    engine: EngineClient, item: object, rate: float, request: InspectRequest
) -> Pruned | None:
    """Send an item through the engine; None = it lost its slots before they could be read.

    Raises:
        VLLMValidationError: the item cannot be taken.
        UnsupportedError: the pixels are elsewhere, or this backend's KV cache cannot be read.
    """
    modality, read_back = request.modality, request.read_back
    prompt = await probe.render(engine, item, rate, modality, request.question or "")
    (given,) = prompt["mm_kwargs"][modality]
    names = [field(name, modality) for name in (PIXEL_HASH, NUM_ANCHORS)]
    if names[0] not in given:  # a place in shared memory instead of the pixels
        raise UnsupportedError(_SHARED)
    key = [given[name].data.tolist() for name in names]
    asked = given.get(field(QUESTION, modality))
    question = [] if asked is None else asked.data.tolist()
    await probe.call_workers(engine, "era_watch", *key, _LIMIT_S, question)
    request_id = f"era-inspect-{uuid.uuid4().hex}"
    tokens = _TOKENS_WHILE_READING if read_back else 1
    room, length = engine.model_config.max_model_len, len(prompt["prompt_token_ids"])
    if length >= room:
        raise VLLMValidationError(
            f"{modality}_url: at this rate its prompt has {length} tokens, and this server allows "
            f"{room - 1}; ask for a higher rate",
            parameter=f"{modality}_url",
        )
    tokens = min(tokens, room - length)
    async with aclosing(probe.generate(engine, prompt, request_id, tokens)) as outputs:
        await anext(outputs)  # a first token: the whole prompt is in the KV cache
        ask = (*key, request_id if read_back else None, question)
        taken = await probe.call_workers(engine, "era_take", *ask)
    return _of_one_engine(given, taken, read_back=read_back)


def _of_one_engine(
    given: MultiModalKwargsItem, taken: list[list[Mapping[str, Any]]], *, read_back: bool
) -> Pruned | None:
    """Return what the engine says that had the request; None = none, or not any more.

    With data parallel another engine may have pruned the same picture for somebody else meanwhile;
    the slots are found only where the request is.

    Args:
        taken: ``worker.Taken``: [engine][rank].
        read_back: Whether the slots were to be read.

    Raises:
        UnsupportedError: this backend's KV cache cannot be read.
    """
    for engine in taken:
        ranks = [rank for rank in engine if rank["pruned"] is not None]
        if not ranks:
            continue
        if why := ranks[0]["unreadable"]:
            raise UnsupportedError(f"read_back: {why}")
        read = [rank["read_back"] for rank in ranks]
        if not read_back or None not in read:
            return Pruned(given, ranks[0]["pruned"], read if read_back else None)
    return None


def _payload(
    found: Pruned, rate: ItemRate, config: EraConfig, png: bytes | None
) -> dict[str, object]:
    pruned = found.pruned
    (report,) = reports([rate], [int(pruned["length"])], [len(pruned["log_bias"])], config)
    told = {"policy": config.policy, **report.as_dict()}
    told |= {name: pruned[name] for name in ("units", "separators", "segments")}
    if (ranks := found.read_back) is not None:
        told["read_back"] = {
            "layers": ranks[0]["layers"],
            "kv_heads": sum(rank["kv_heads"] for rank in ranks),
            "log_bias": ranks[0]["log_bias"],
            "differences": [
                max(row) for row in zip(*(r["differences"] for r in ranks), strict=True)
            ],
            "text_slots": ranks[0]["text_slots"],
            "largest_text_bias": max(rank["largest_text_bias"] for rank in ranks),
        }
    if png is not None:
        told["picture"] = "data:image/png;base64," + base64.b64encode(png).decode()
    return told


def _draw(found: Pruned, info: PrunedInfoMixin, title: str, modality: str) -> bytes:
    """Return a PNG of every tile or frame."""
    mean, std = map(tuple, info.adapter.norm(info.get_hf_processor()))
    shape, what = shape_of(found.item, modality), "tile" if modality == "image" else "frame"
    units = info.adapter.units(info.get_hf_config(), pixels_of(found.item), shape)
    kept = []
    segments = found.pruned["segments"]
    parts = Counter(one["unit"] for one in segments)
    drawn = Counter[int]()
    for one in segments:
        first, last = one["unit"], one["unit"] + one["units"]
        picture = seen(torch.cat([*units[first:last]], 1), mean, std)  # one above another
        (top, left, bottom, right), (width, height) = one["box"], picture.size
        box = [round(at) for at in (left * width, top * height, right * width, bottom * height)]
        which = f"{what} {last}" if one["units"] == 1 else f"{what}s {first + 1} to {last}"
        name = f"{which} of {found.pruned['units']}"
        drawn[first] += 1
        if parts[first] > 1:
            name += f", part {drawn[first]} of {parts[first]}"
        segment = (one[key] for key in ("anchors", "assignment", "log_bias"))
        kept.append(Kept(picture.crop(tuple(box)), tuple(one["grid"]), *segment, name))
    separators = found.pruned["separators"]
    note = f"{separators} newlines kept" if separators else ""
    buffer = io.BytesIO()
    draw(kept, title, note).save(buffer, "png")
    return buffer.getvalue()


def _refusal(
    status: HTTPStatus, message: str, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    error = create_error_response(message, status.phrase, status)
    return JSONResponse(error.model_dump(), status, headers)
