"""Engines in this process: started and ended, asked about pictures, and timed inside.

``set_environment`` of ``setup.py``, or an environment of the caller's, comes before this module is
imported: vLLM reads it then. Leaves out who is asked what, and when (``serve.py``,
``attention.py``, ``first_token.py``, ``cli/askers.py``, ``cli/doctor/``).
"""

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import nn
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile
from vllm import LLM, RequestOutput, SamplingParams
from vllm.model_executor.layers.attention import Attention

from era_vllm.bench.clock import Cell
from era_vllm.bench.stages import StageClock
from era_vllm.errors import UnsupportedError
from era_vllm.lab.asking import MAX_TOKENS, SHOWN, Answer, Subject, cleaned, messages_of
from era_vllm.lab.screen import muted
from era_vllm.vllm_plugin.signals.scout import Scout

_SUBJECTS_AT_ONCE: Final = 16
_VISUAL: Final = ("image_token_id", "image_token_index", "video_token_id")
"""Fields of a config that hold the ids of its visual tokens, where it has them."""


@contextmanager
def engine(
    arguments: Mapping[str, object], *, context: int, kv_bytes: int, **more: object
) -> Iterator[LLM]:
    """Start an engine for one picture a prompt, without its log on the screen, and end it.

    Args:
        arguments: The model, and what switches pruning on.
        context: Tokens of a request, and of a step where ``more`` does not say otherwise.
        kv_bytes: Of the KV cache.
        more: Further arguments of ``LLM``; eager unless they say otherwise.
    """
    usual = {
        "enforce_eager": True,
        "max_num_batched_tokens": context,
        "limit_mm_per_prompt": {"image": 1},
    }
    with muted():
        llm = LLM(
            **{**usual, **arguments, **more}, max_model_len=context, kv_cache_memory_bytes=kv_bytes
        )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


class EngineAsker:
    """Asks a real engine, some subjects at once, through its chat template as a server does."""

    def __init__(self, llm: LLM, max_tokens: int = MAX_TOKENS) -> None:
        """Wrap an engine.

        Raises:
            UnsupportedError: its config does not tell which tokens are visual.
        """
        self._llm = llm
        self._sampling = SamplingParams(max_tokens=max_tokens, temperature=0, logprobs=SHOWN)
        hf = llm.model_config.hf_config
        self._visual = {getattr(hf, name, None) for name in _VISUAL} - {None}
        if not self._visual:
            raise UnsupportedError(
                f"engine: the config of a {hf.model_type} names no visual token to count; ask a "
                "server (--asker http)"
            )

    def each(
        self, subjects: Sequence[Subject], rate: float | None = None
    ) -> Iterator[list[Answer]]:
        """Yield the answers to each subject in turn."""
        kwargs = None if rate is None else {"era": rate}
        for at in range(0, len(subjects), _SUBJECTS_AT_ONCE):
            some = subjects[at : at + _SUBJECTS_AT_ONCE]
            asked = [messages for one in some for messages in messages_of(one)]
            started = time.perf_counter()
            outputs = self._llm.chat(
                asked, self._sampling, use_tqdm=False, mm_processor_kwargs=kwargs
            )
            each_s = (time.perf_counter() - started) / len(asked)
            answers = (self._answer(output, each_s) for output in outputs)
            yield from ([next(answers) for _ in one.questions] for one in some)

    def _answer(self, output: RequestOutput, seconds: float) -> Answer:
        (said,) = output.outputs
        kept = sum(map(output.prompt_token_ids.count, self._visual))
        first = {token: one.logprob for token, one in said.logprobs[0].items()}
        return Answer(cleaned(said.text), kept, seconds, first)


class TimedEngine:
    """A real engine, hooked so that a request's time can be told apart."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        (self.model,) = self.llm.apply_model(lambda model: model)
        self._stages: StageClock | None = None
        self.prompt_tokens = 0
        """Of the last request."""

    def watch(self) -> None:
        """Hook tower, projector, what is read from the tower, scout, language model, its attention.

        The whole model's forward is the language model: tower and projector run before it.
        """
        self._stages = clock = StageClock()
        clock.watch_method("encoder", self.model, "embed_multimodal")
        tower, *projectors = _tower(self.model)
        clock.watch("tower", tower)
        for projector in projectors:
            clock.watch("projector", projector)
        clock.watch_method("merge", self.model, "embed_input_ids")
        clock.watch("language_model", self.model)
        for layer in self._attention_layers():
            clock.watch("attention", layer)
        if hasattr(self.model, "reducer"):
            layer = self.model.adapter.tapped_layer(
                self.model, self.model.config, self.model.era.attention_layer
            )
            clock.watch_hooks("tap", layer.attention)
            for source in self.model.sources:
                if isinstance(source, Scout):
                    clock.watch_method("scout", source, "after")

    def ask(self, prompt: Mapping[str, object], decode_tokens: int) -> dict[str, float]:
        """Run one request and return its seconds.

        Returns:
            ``ttft`` from the call to the first token, ``decode`` a further token, and, if
            ``watch`` was called, the stages; those that a compiled graph hides are absent.
        """
        sampling = SamplingParams(max_tokens=1 + decode_tokens, temperature=0, ignore_eos=True)
        started = time.perf_counter()
        (output,) = self.llm.generate([prompt], sampling, use_tqdm=False)
        total = time.perf_counter() - started
        self.prompt_tokens = len(output.prompt_token_ids)
        decoding = output.metrics.last_token_ts - output.metrics.first_token_ts
        taken = {"ttft": total - decoding}
        if decode_tokens:
            taken["decode"] = decoding / decode_tokens
        if self._stages is not None:
            taken.update(self._told_apart(self._stages.take(), taken["ttft"], decode_tokens))
        return taken

    def facts(self) -> dict[str, Any]:
        """KV blocks of the cache and what they hold; the size of a head, columns included."""
        cache = self.llm.llm_engine.vllm_config.cache_config
        layer = self._attention_layers()[0]
        injected = getattr(getattr(self.model, "step_state", None), "injected", None)
        return {
            "injection_mib": 0.0 if injected is None else injected.states.nbytes / 2**20,
            "head_size": layer.head_size,
            "attention_layer": type(layer).__name__,
            "attention_backend": layer.attn_backend.get_name(),
            "kv_cache_mib": cache.kv_cache_memory_bytes / 2**20,
            "kv_blocks": cache.num_gpu_blocks,
            "kv_block_tokens": cache.block_size,
            "kv_tokens": cache.num_gpu_blocks * cache.block_size,
        }

    def _attention_layers(self) -> list[nn.Module]:
        modules = self.model.language_model.modules()
        return [module for module in modules if isinstance(module, Attention)]

    def _told_apart(
        self, spans: Mapping[str, list[float]], ttft: float, decode_tokens: int
    ) -> dict[str, float]:
        """Split the first step into stages; what is read from the tower counts as the reducer's."""
        told: dict[str, float] = {}
        if "tower" in spans:
            encoder, tower, projector, tap = (
                sum(spans.get(stage, ())) for stage in ("encoder", "tower", "projector", "tap")
            )
            if hasattr(self.model, "visual"):  # its projectors are a part of it
                tower -= projector
            told = {
                "encoder": encoder,
                "tower": tower - tap,
                "projector": projector,
                "reducer": encoder - tower - projector + tap,
            }
            if scout := sum(spans.get("scout", ())):
                told |= {"scout": scout, "reducer": told["reducer"] - scout}
        calls = {"merge": 1, "language_model": 1, "attention": len(self._attention_layers())}
        for stage, of_a_step in calls.items():
            found = spans.get(stage, ())
            steps = found[: of_a_step * (1 + decode_tokens)]  # async scheduling runs one ahead
            if len(steps) < of_a_step * (1 + decode_tokens):
                continue  # hidden by a graph
            told[stage] = sum(steps[:of_a_step])
            if decode_tokens:
                told[f"decode_{stage}"] = sum(steps[of_a_step:]) / decode_tokens
        parts = ("encoder", "merge", "language_model")
        if "language_model" in told:
            told["rest"] = ttft - sum(told.get(part, 0.0) for part in parts)
        return told


def _tower(model: nn.Module) -> list[nn.Module]:
    """Return the vision tower and, behind it, what makes tokens of the language model's width."""
    if (visual := getattr(model, "visual", None)) is None:
        return [model.vision_tower, model.multi_modal_projector]
    return [visual, visual.merger, *getattr(visual, "deepstack_merger_list", ())]


def profile(cell: Cell, shown: int = 12) -> list[dict[str, object]]:
    """Run a pass under torch.profiler; return the operators that take longest themselves."""
    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with torch_profile(activities=activities) as profiler:
        cell()
    times = {
        row.key: (row.self_device_time_total if cuda else row.self_cpu_time_total) / 1e6
        for row in profiler.key_averages()
    }
    whole = sum(times.values())
    longest = sorted(times, key=lambda name: times[name], reverse=True)[:shown]
    return [
        {"name": name[:60], "self_s": times[name], "share": times[name] / whole} for name in longest
    ]
