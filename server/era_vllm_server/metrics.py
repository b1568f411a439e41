"""Our figures on vLLM's ``/metrics``: counters of the API servers, and what the workers counted.

Counters here are prometheus_client's own objects: with several API servers it sums them (its
multiprocess mode, which vLLM sets up). What workers counted (``era_vllm/vllm_plugin/metrics.py``)
is asked of them when somebody scrapes, rank 0 of each engine, and added behind vLLM's own text: so
it is counted once whatever the number of ranks and API servers, needs no folder of counter files,
and leaves vLLM's figures in the mode they are in. Where the workers do not answer in time their
families are left out: a figure older than a second would read as a counter that was reset, for
another API server may have told a newer one.
"""

import asyncio
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from time import monotonic
from typing import Final

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from vllm.engine.protocol import EngineClient

from era_vllm.compat.vllm_entrypoints import get_prometheus_registry
from era_vllm.vllm_plugin.metrics import BUCKETS_S, Counted
from era_vllm_server.probe import call_workers

logger = logging.getLogger(__name__)

_BEFORE: Final = "{} tokens that prompts would hold without pruning."
_AFTER: Final = "{} tokens that the language model was given."
_ITEMS: Final = "{} by what decided their pruning rate."
_LABELS: Final = ("policy", "level")
TOKENS_BEFORE: Final = {
    "image": Counter("era:image_tokens_before", _BEFORE.format("Image"), _LABELS),
    "video": Counter("era:video_tokens_before", _BEFORE.format("Video"), _LABELS),
}
TOKENS_AFTER: Final = {
    "image": Counter("era:image_tokens_after", _AFTER.format("Image"), _LABELS),
    "video": Counter("era:video_tokens_after", _AFTER.format("Video"), _LABELS),
}
ITEMS: Final = {
    "image": Counter("era:images", _ITEMS.format("Images"), ["source"]),
    "video": Counter("era:videos", _ITEMS.format("Videos"), ["source"]),
}
_CLAMPED: Final = "{} whose detail was brought into bounds."
CLAMPED: Final = {
    "image": Counter("era:clamped_images", _CLAMPED.format("Images")),
    "video": Counter("era:clamped_videos", _CLAMPED.format("Videos")),
}
REJECTED: Final = Counter("era:rejected_requests", "Requests refused by the front.", ["reason"])
RESPONSES: Final = Counter(
    "era:responses",
    "Responses by the status that clients were told last, in a stream too; 499 = the client left.",
    ["status"],
)
"""vLLM's own ``http_requests_total`` is inside of the front and does not see what that says."""
for _status in ("500", "504"):  # a rate sees no first failure that no 0 went before
    RESPONSES.labels(_status)

WAIT_S: Final = 2.0
"""A scrape waits so long for the workers, who answer between two steps: below what Prometheus waits
for a scrape (``deploy/prometheus/prometheus.yml``), which would take a slow step for an end."""
FRESH_S: Final = 1.0
"""How long an answer is given again. Whoever scrapes no more often than that never sees a counter
go back, whichever API servers answer: each figure is younger than the scrape before."""

router = APIRouter()


@router.get("/metrics", response_class=Response)
async def metrics(raw_request: Request) -> Response:
    """Prometheus metrics: vLLM's own, ours, and the workers'."""
    text = generate_latest(get_prometheus_registry())
    workers: WorkerMetrics | None = getattr(raw_request.app.state, "era_worker_metrics", None)
    if workers is not None and (figures := await workers.ask()) is not None:
        text += generate_latest(figures)  # type: ignore[arg-type]  # has collect()
    return Response(text, media_type=CONTENT_TYPE_LATEST)


class WorkerMetrics:
    """Asks for the workers' figures; one question at a time and one a second, whoever scrapes."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self._asking: asyncio.Task[Figures | None] | None = None
        self._asked_at = -math.inf

    async def ask(self) -> "Figures | None":
        """Ask the workers, unless a question is still open or young; wait for at most ``WAIT_S``.

        Returns:
            What they said within the last ``FRESH_S``; None where they do not.
        """
        due = monotonic() - self._asked_at >= FRESH_S
        if self._asking is None or (self._asking.done() and due):
            if self._engine.errored:
                return None
            self._asked_at = monotonic()
            self._asking = asyncio.create_task(self._answer())
        asked = self._asking
        await asyncio.wait({asked}, timeout=WAIT_S)
        if asked.done():
            return asked.result()
        logger.warning("workers' metrics are left out: no answer within %g s", WAIT_S)
        return None

    async def _answer(self) -> "Figures | None":
        try:
            said = await call_workers(self._engine, "era_metrics")
            return Figures([ranks[0] for ranks in said])
        except Exception as error:  # what vLLM makes of any failure behind its RPC, or of an end
            logger.warning("workers' metrics are left out: %s", type(error).__name__)
            return None


@dataclass(frozen=True, slots=True)
class Figures:
    """What the workers counted; a prometheus_client collector."""

    engines: list[Counted]
    """Of rank 0 of each."""

    def collect(self) -> Iterator[Metric]:
        """Yield the figures, summed over engines."""
        passes = map(sum, zip(*(one["passes"] for one in self.engines), strict=True))
        bounds = [*map(str, BUCKETS_S), "+Inf"]
        yield HistogramMetricFamily(
            "era:reducer_seconds",
            "Seconds of a pass of the reducer: select, merge and bias of the items encoded at "
            "once; the encoder is not in it.",
            buckets=list(zip(bounds, accumulate(passes), strict=True)),
            sum_value=sum(one["seconds"] for one in self.engines),
        )
        yield CounterMetricFamily(
            "era:reduced_images",
            "Items that were encoded and reduced; those that a cache answers are not.",
            value=sum(one["images"] for one in self.engines),
        )
        degenerate = CounterMetricFamily(
            "era:degenerate_inputs", "Values that the reducer repaired.", labels=["kind"]
        )
        for kind in self.engines[0]["degenerate"]:
            degenerate.add_metric([kind], sum(one["degenerate"][kind] for one in self.engines))
        yield degenerate
