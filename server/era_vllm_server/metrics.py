"""Our figures on vLLM's ``/metrics``: counters of the API servers, and what the workers counted.

Counters here are prometheus_client's own objects: with several API servers it sums them (its
multiprocess mode, which vLLM sets up). What workers counted (``era_vllm/vllm_plugin/metrics.py``)
is asked of them when somebody scrapes, rank 0 of each engine, and added behind vLLM's own text: so
it is counted once whatever the number of ranks and API servers, needs no folder of counter files,
and leaves vLLM's figures in the mode they are in.
"""

import asyncio
import logging
from collections.abc import Iterator
from itertools import accumulate
from typing import Final

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from vllm.engine.protocol import EngineClient
from vllm.v1.metrics.prometheus import get_prometheus_registry

from era_vllm.vllm_plugin.metrics import BUCKETS_S, Counted
from era_vllm_server.workers import ask_workers

logger = logging.getLogger(__name__)

TOKENS_BEFORE: Final = Counter(
    "era:image_tokens_before",
    "Image tokens that prompts would hold without pruning.",
    ["policy", "level"],
)
TOKENS_AFTER: Final = Counter(
    "era:image_tokens_after", "Image tokens that the language model was given.", ["policy", "level"]
)
IMAGES: Final = Counter("era:images", "Images by what decided their pruning rate.", ["source"])
CLAMPED: Final = Counter("era:clamped_images", "Images whose detail was brought into bounds.")
REJECTED: Final = Counter("era:rejected_requests", "Requests refused by the front.", ["reason"])

_WAIT_S: Final = 5.0
"""A scrape waits so long for the workers, who answer between two steps; then the last figures hold.
Prometheus gives up after 10."""

router = APIRouter()


@router.get("/metrics", response_class=Response)
async def metrics(raw_request: Request) -> Response:
    """Prometheus metrics: vLLM's own, ours, and the workers'."""
    text = generate_latest(get_prometheus_registry())
    workers: WorkerMetrics | None = getattr(raw_request.app.state, "era_worker_metrics", None)
    if workers is not None:
        await workers.refresh()
        text += generate_latest(workers)  # type: ignore[arg-type]  # has collect()
    return Response(text, media_type=CONTENT_TYPE_LATEST)


class WorkerMetrics:
    """The workers' figures as last heard; one question at a time, whoever scrapes."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self._last: list[Counted] = []
        self._asking: asyncio.Task[None] | None = None

    async def refresh(self) -> None:
        """Ask the workers, unless a question is still open; wait for at most ``_WAIT_S``."""
        if self._asking is None or self._asking.done():
            if self._engine.errored:
                return
            self._asking = asyncio.create_task(self._ask())
        await asyncio.wait({self._asking}, timeout=_WAIT_S)

    def collect(self) -> Iterator[Metric]:
        """Yield the figures, summed over engines; a prometheus_client collector."""
        if not self._last:
            return
        passes = map(sum, zip(*(one["passes"] for one in self._last), strict=True))
        bounds = [*map(str, BUCKETS_S), "+Inf"]
        yield HistogramMetricFamily(
            "era:reducer_seconds",
            "Seconds of a pass of the reducer: select, merge and bias of the images encoded at "
            "once; the encoder is not in it.",
            buckets=list(zip(bounds, accumulate(passes), strict=True)),
            sum_value=sum(one["seconds"] for one in self._last),
        )
        yield CounterMetricFamily(
            "era:reduced_images",
            "Images that were encoded and reduced; those that a cache answers are not.",
            value=sum(one["images"] for one in self._last),
        )
        degenerate = CounterMetricFamily(
            "era:degenerate_inputs", "Values that the reducer repaired.", labels=["kind"]
        )
        for kind in self._last[0]["degenerate"]:
            degenerate.add_metric([kind], sum(one["degenerate"][kind] for one in self._last))
        yield degenerate

    async def _ask(self) -> None:
        try:
            self._last = [ranks[0] for ranks in await ask_workers(self._engine, "era_metrics")]
        except Exception as error:  # what vLLM makes of any failure behind its RPC, or of an end
            logger.warning("workers' metrics stay as they were: %s", type(error).__name__)
