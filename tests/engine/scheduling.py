"""A scheduler of vLLM's without its model: requests of any shape, and a worker that keeps books.

``Worker.step`` fails where the model would: an item that is needed in a step, neither encoded in
it nor left from an earlier one.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    PlaceholderRange,
)
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from era_vllm.vllm_plugin.fields import WORK

BLOCK = 16
_HASH = get_hash_fn_by_name("sha256")


@dataclass(frozen=True, slots=True)
class Item:
    """A picture: its name in the caches, rows before pruning, placeholders."""

    name: str
    rows: int
    kept: int
    told: bool = True
    """Whether its data say how many rows it has."""


def make(config: VllmConfig, blocks: int = 4096) -> Scheduler:
    """Return the scheduler that the engine of a config would make.

    Mutates: the config's number of blocks, as the engine does.
    """
    config.cache_config.num_gpu_blocks = blocks
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
    return config.scheduler_config.get_scheduler_cls()(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
        hash_block_size=BLOCK,
    )


def request(name: str, parts: Sequence[int | Item], answer: int = 2, **more: object) -> Request:
    """Return a request of stretches of text (their lengths) and pictures."""
    init_none_hash(_HASH)
    ids: list[int] = []
    features: list[MultiModalFeatureSpec] = []
    for part in parts:
        if isinstance(part, int):
            ids += [10 + (len(ids) + len(name)) % 7] * part
            continue
        rows = MultiModalFieldElem(
            torch.tensor(part.rows), MultiModalBatchedField(keep_on_cpu=True)
        )
        data = MultiModalKwargsItem({WORK: rows} if part.told else {})
        place = PlaceholderRange(len(ids), part.kept)
        features.append(MultiModalFeatureSpec(data, "image", part.name, place, part.name))
        ids += [4] * part.kept
    return Request(
        request_id=name,
        prompt_token_ids=ids,
        sampling_params=SamplingParams(max_tokens=answer, ignore_eos=True),
        pooling_params=None,
        mm_features=features,
        block_hasher=get_request_block_hasher(BLOCK, _HASH),
        **more,
    )


@dataclass
class Worker:
    """What runs a scheduler's steps; keeps what each step encoded."""

    scheduler: Scheduler
    items: dict[str, Item]
    ahead: int = 0
    """Steps that are scheduled before the first one's tokens are known (async scheduling)."""
    encoded: list[list[Item]] = field(default_factory=list)
    tokens: list[dict[str, int]] = field(default_factory=list)
    held: set[str] = field(default_factory=set)
    preempted: int = 0
    _running: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = field(default_factory=deque)

    @property
    def rows(self) -> list[int]:
        """Rows encoded in each step."""
        return [sum(item.rows for item in step) for step in self.encoded]

    def step(self) -> None:
        """Schedule a step and run it, or the one that was scheduled ``ahead`` steps before."""
        output = self.scheduler.schedule()
        self._check(output)
        self._running.append((output, self._answer(output)))
        if len(self._running) > self.ahead:
            self.scheduler.update_from_output(*self._running.popleft())

    def run(self, limit: int = 2000) -> None:
        """Run until all is answered; fail if that takes more steps than ``limit``."""
        for _ in range(limit):
            if not self.scheduler.has_unfinished_requests():
                return
            self.step()
        raise AssertionError(f"not answered after {limit} steps: {list(self.scheduler.requests)}")

    def _check(self, output: SchedulerOutput) -> None:
        self.preempted += len(output.preempted_req_ids or ())
        self.held -= set(output.free_encoder_mm_hashes)
        encoded: list[Item] = []
        for name, inputs in output.scheduled_encoder_inputs.items():
            features = self.scheduler.requests[name].mm_features
            encoded += [self.items[features[index].identifier] for index in inputs]
        self.encoded.append(encoded)
        self.tokens.append(dict(output.num_scheduled_tokens))
        self.held |= {item.name for item in encoded}
        for name, count in output.num_scheduled_tokens.items():
            one = self.scheduler.requests[name]
            end = one.num_computed_tokens  # vLLM has moved it on already
            for feature in one.mm_features:
                place = feature.mm_position
                if place.offset < end and place.offset + place.length > end - count:
                    assert feature.identifier in self.held, (name, feature.identifier)

    def _answer(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """Return a token for each request whose prompt ends in the step, or has."""
        names = list(output.num_scheduled_tokens)
        chunks = [self.scheduler.requests[name].is_prefill_chunk for name in names]
        index = {name: at for at, name in enumerate(names)}
        return ModelRunnerOutput(names, index, [[] if chunk else [7] for chunk in chunks])


def worker(scheduler: Scheduler, items: Sequence[Item], **more: object) -> Worker:
    """Return a worker for requests of those items."""
    return partial(Worker, **more)(scheduler, {item.name: item for item in items})
