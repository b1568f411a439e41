"""``/ready``: whether requests should be sent here. ``/health`` is vLLM's: whether it is alive.

Ready = one request with a pruned image went through renderer, engine and back in this API server
(which its socket waits for), and the engine lives. While it drains, ``guard`` answers 503 itself.
"""

import uuid

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from PIL import Image
from vllm.engine.protocol import EngineClient

from era_vllm.config import EraConfig
from era_vllm.errors import UnsupportedError
from era_vllm_server import probe

_SIDE = 64  # pixels of the warm-up picture

router = APIRouter()


@router.get("/ready")
async def ready(raw_request: Request) -> JSONResponse:
    """Whether this server takes requests: 200, or 503 with the reason."""
    state = raw_request.app.state
    if state.engine_client.errored:
        reason = "the engine has ended"
    elif not getattr(state, "era_warm", False):
        reason = "not warm yet"
    else:
        return JSONResponse({"ready": True})
    retry = str(state.era_settings.retry_after_s)
    return JSONResponse({"ready": False, "reason": reason}, 503, {"Retry-After": retry})


async def warm_up(engine: EngineClient, config: EraConfig) -> None:
    """Send one request through the whole path: a pruned image, where the engine takes images.

    Raises:
        UnsupportedError: it came back without an answer.
    """
    image = Image.new("RGB", (_SIDE, _SIDE)) if probe.takes_images(engine) else None
    rate = (config.pruning_rate or config.max_pruning_rate) if config.max_pruning_rate else None
    prompt = await probe.render(engine, image, rate)
    tokens = 0
    async for out in probe.generate(engine, prompt, f"era-warm-{uuid.uuid4().hex}", max_tokens=2):
        tokens = len(out.outputs[0].token_ids)
    if tokens == 0:
        raise UnsupportedError("warm-up: the engine answered a first request with no token")
