"""``/ready``: whether requests should be sent here. ``/health`` is vLLM's: whether it is alive.

Ready = one request with a pruned image went through renderer, engine and back in this API server
(which its socket waits for), the engine lives, and its workers answer. While it drains, ``drain``
answers 503 itself.
"""

import asyncio
import time
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
    limit_s = state.era_settings.engine_timeout_s
    if state.engine_client.errored:
        reason = "the engine has ended"
    elif not getattr(state, "era_warm", False):
        reason = "not warm yet"
    elif 0 < limit_s < (silent_s := state.era_pulse.silent_s()):
        reason = f"the engine has not answered for {silent_s:.0f} s (allowed: {limit_s:g} s)"
    else:
        return JSONResponse({"ready": True})
    retry = str(state.era_settings.retry_after_s)
    return JSONResponse({"ready": False, "reason": reason}, 503, {"Retry-After": retry})


class Pulse:
    """A question to every worker, one at a time; they answer between two steps, idle ones too."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self._question: asyncio.Task[object] | None = None
        self._since_s = 0.0

    def silent_s(self) -> float:
        """Return for how long no answer has come; ask, where no question waits for one."""
        last, now = self._question, time.monotonic()
        if last is None or last.done():
            if last is None or last.exception() is None:
                self._since_s = now
            self._question = asyncio.create_task(probe.call_workers(self._engine, "check_health"))
        return now - self._since_s


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
