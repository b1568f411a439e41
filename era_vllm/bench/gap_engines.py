"""Engines in this process in which one stream runs while pictures arrive, step by step.

``set_environment`` of ``setup.py`` comes before this module is imported. Leaves out what is
compared (``gap.py``).
"""

import time
from collections.abc import Sequence
from itertools import count
from typing import Final

import torch
from torch import nn
from vllm import SamplingParams
from vllm.config import VllmConfig

from era_vllm.bench.engines import TimedEngine
from era_vllm.bench.stages import StageClock
from era_vllm.compat import models_config_map
from era_vllm.vllm_plugin.families import FAMILIES
from era_vllm.vllm_plugin.names import PREFIX
from era_vllm.vllm_plugin.register import register_family
from era_vllm.vllm_plugin.resolve import resolve

UNBOUNDED: Final = "EraBenchUnbounded"
"""Architecture of an engine of ours that is scheduled as vLLM would, by placeholders."""
_ORIGINAL: Final = "LlavaForConditionalGeneration"
_QUIET: Final = 8
"""Tokens of a stream before pictures come."""


class GapEngine:
    """A live engine, hooked so that a stream's pauses can be told apart."""

    def __init__(self, engine: TimedEngine) -> None:
        self._engine = engine.llm.llm_engine
        self._names = map(str, count())
        self._pictures, self._stages = 0, StageClock()
        tower: nn.Module = engine.model.vision_tower
        tower.register_forward_pre_hook(self._count)
        self._stages.watch("tower", tower)

    def gap(self, prompts: Sequence[object]) -> tuple[dict[str, float], int]:
        """Decode a stream, let the pictures come at once, and wait until each has its first token.

        Time in which prompts are prepared is left out: in a server that is another process.

        Args:
            prompts: One picture each, new to every cache.

        Returns:
            Seconds: ``longest``, between two tokens of the stream; of it ``tower`` and ``rest``;
            ``quiet``, between two before the pictures came, median; ``all``, until the last one's
            first token. And the most pictures encoded between two tokens of the stream.
        """
        engine = self._engine
        stream = next(self._names)
        text = {"prompt": "USER: tell me a long story ASSISTANT:"}
        engine.add_request(stream, text, _answer(None))
        self._step(stream)
        before = sorted(self._step(stream)[0] for _ in range(_QUIET))
        self._pictures = 0
        waiting = {next(self._names): prompt for prompt in prompts}
        for name, prompt in waiting.items():
            engine.add_request(name, prompt, _answer(1))
        longest, all_s, most = (0.0, 0.0), 0.0, 0
        left = set(waiting)
        while left:
            seconds, tower, pictures, done = self._step(stream)
            left -= done
            longest, all_s = max(longest, (seconds, tower)), all_s + seconds
            most = max(most, pictures)
        engine.abort_request([stream])
        while engine.has_unfinished_requests():
            engine.step()
        seconds, tower = longest
        taken = {"longest": seconds, "tower": tower, "quiet": before[_QUIET // 2], "all": all_s}
        return {**taken, "rest": seconds - tower}, most

    def _step(self, stream: str) -> tuple[float, float, int, set[str]]:
        """Run steps until the stream has a token.

        Returns: seconds, of them in the tower, pictures encoded, requests that ended
        """
        self._pictures = 0
        done: set[str] = set()
        started = time.perf_counter()
        while True:
            outputs = self._engine.step()
            done |= {output.request_id for output in outputs if output.finished}
            if any(output.request_id == stream for output in outputs):
                tower = sum(self._stages.take().get("tower", ()))  # a GPU is waited for here
                return time.perf_counter() - started, tower, self._pictures, done

    def _count(self, _: nn.Module, pixels: tuple[torch.Tensor, ...]) -> None:
        self._pictures += len(pixels[0])


def register_unbounded() -> None:
    """Make the architecture known to vLLM; idempotent."""
    register_family(UNBOUNDED.removeprefix(PREFIX), FAMILIES[_ORIGINAL])
    models_config_map.add(UNBOUNDED, _ORIGINAL, _with_stock_scheduler)


def _with_stock_scheduler(vllm_config: VllmConfig) -> None:
    resolve(vllm_config)
    vllm_config.scheduler_config.scheduler_cls = None


def _answer(tokens: int | None) -> SamplingParams:
    """Return parameters for so many tokens; None = until the context is full."""
    return SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
