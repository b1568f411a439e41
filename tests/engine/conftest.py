"""Engines in the test process and their comparison with the oracle.

The first engine takes about 25 s, each further one 4 s: so they are made once per configuration
and stay alive to the end. Subjects that need processes of their own start them themselves.
"""

import importlib
import json
import os

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["TORCH_COMPILE_DISABLE"] = "1"  # vLLM compiles its log-probability helper for 18 s
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import warnings  # noqa: E402
from collections.abc import Callable, Iterator, Sequence  # noqa: E402
from dataclasses import dataclass, field  # noqa: E402
from functools import partial  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from PIL.Image import Image  # noqa: E402

import era_vllm  # noqa: E402
from era_vllm.config import EraConfig  # noqa: E402
from era_vllm.lab import CHECKPOINT  # noqa: E402
from era_vllm.lab.oracle import Oracle, Segment  # noqa: E402
from era_vllm.lab.samples import load_samples  # noqa: E402
from era_vllm.pipeline import prune  # noqa: E402
from era_vllm.pixels import pixel_hash  # noqa: E402
from era_vllm.types import PrunedTokens, VisualTokens  # noqa: E402

with warnings.catch_warnings():  # torch and vLLM use what they deprecate
    warnings.simplefilter("ignore")
    importlib.import_module("vllm.model_executor.layers.attention")

STEPS = 9  # the last prompt token + 8 decode steps
TOLERANCE = 1e-4  # of log-probabilities, whole vocabulary, float32
MODEL = str(CHECKPOINT)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Third-party warnings inside vLLM are not ours to mend."""
    for item in items:
        if "tests/engine" in str(item.path):
            item.add_marker("vllm")
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@dataclass(frozen=True)
class Setup:
    """One engine, as JSON: pruning settings ("null" = stock vLLM) and arguments of ``LLM``."""

    settings: str
    llm: str


@pytest.fixture(scope="session")
def setup() -> Callable[..., Setup]:
    """``setup(policy="dpp", llm={...})``: describe an engine by fields of ``EraConfig``."""

    def describe(*, stock: bool = False, llm: dict[str, object] | None = None, **settings: object):
        return Setup(json.dumps(None if stock else settings), json.dumps(llm or {}))

    return describe


@dataclass(frozen=True)
class Request:
    """A question about some pictures; ``rate`` None = the engine's default."""

    text: str
    images: tuple[Image, ...] = ()
    rate: float | tuple[float, ...] | None = None

    def prompt(self) -> dict[str, object]:
        """Return what ``LLM.generate`` takes."""
        pictures = "<image> " * len(self.images)
        prompt: dict[str, object] = {"prompt": f"USER: {pictures}{self.text} ASSISTANT:"}
        if self.images:
            prompt["multi_modal_data"] = {"image": list(self.images)}
        if self.rate is not None:
            rate = list(self.rate) if isinstance(self.rate, tuple) else self.rate
            prompt["mm_processor_kwargs"] = {"era": rate}
        return prompt


@pytest.fixture(scope="session")
def ask() -> Callable[..., Request]:
    """``ask(text, *images, rate=None)``: describe a request."""
    return lambda text, *images, rate=None: Request(text, images, rate)


@dataclass(frozen=True)
class Answer:
    """What the engine said, over the whole vocabulary."""

    prompt_ids: list[int]
    token_ids: list[int]
    log_probs: torch.Tensor
    cached_tokens: int
    text: str


@dataclass
class Engine:
    """A live engine and everything that it pruned."""

    llm: object
    config: EraConfig | None
    pruned: dict[tuple[int, int], tuple[VisualTokens, PrunedTokens, int]] = field(
        default_factory=dict
    )
    encoded: int = 0

    @property
    def core(self):  # noqa: ANN201
        """The engine core, in this process."""
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def runner(self):  # noqa: ANN201
        """The model runner."""
        return self.core.model_executor.driver_worker.worker.model_runner

    @property
    def model(self):  # noqa: ANN201
        """The vLLM model."""
        return self.runner.model

    @property
    def block_size(self) -> int:
        """Slots of a KV block."""
        return self.core.vllm_config.cache_config.block_size

    def record(self, tokens: VisualTokens, result: PrunedTokens) -> None:
        """Keep what was pruned, by picture and number of anchors."""
        self.encoded += tokens.segments
        for row in range(tokens.segments):
            key = (int(tokens.seeds[row]), result.anchors.shape[1])
            self.pruned[key] = (tokens, result, row)

    def ask(self, requests: Sequence[Request], steps: int = STEPS) -> list[Answer]:
        """Answer greedily for exactly ``steps`` tokens, all requests in one batch."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=steps, temperature=0, logprobs=-1, ignore_eos=True)
        prompts = [request.prompt() for request in requests]
        answers = []
        for out in self.llm.generate(prompts, params, use_tqdm=False):
            table = [
                [step[i].logprob for i in range(len(step))] for step in out.outputs[0].logprobs
            ]
            answers.append(
                Answer(
                    list(out.prompt_token_ids),
                    list(out.outputs[0].token_ids),
                    torch.tensor(table),
                    out.num_cached_tokens or 0,
                    out.outputs[0].text,
                )
            )
        return answers

    def anchors_of(self, image: Image, rate: float, oracle: Oracle) -> torch.Tensor:
        """Return the engine's anchors [1, a]; they must be the core's choice on its features."""
        tokens, result, row = self.pruned[self._key(image, rate, oracle)]
        one = VisualTokens(
            tokens.embeds[row : row + 1].clone(),
            tokens.grid,
            None if tokens.attention is None else tokens.attention[row : row + 1].clone(),
            None if tokens.scores is None else tokens.scores[row : row + 1].clone(),
            tokens.seeds[row : row + 1].clone(),
        )
        config, count = self.config, result.anchors.shape[1]
        again = prune(one, count, self.model.policy, merge=config.merge, bias=config.bias)
        assert torch.equal(again.anchors[0], result.anchors[row])
        assert torch.equal(again.embeds[0], result.embeds[row])
        assert torch.equal(again.log_bias[0], result.log_bias[row])
        return again.anchors

    def _key(self, image: Image, rate: float, oracle: Oracle) -> tuple[int, int]:
        pixels = oracle.pixels(image)[0].to(self.core.vllm_config.model_config.dtype)
        rows, columns = self.model.grid
        return pixel_hash(pixels), self.config.num_anchors(rows * columns, rate)


@dataclass(frozen=True)
class Difference:
    """Largest |difference| of log-probabilities, and the same for an oracle without the bias."""

    exact: float
    without_bias: float


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    """The Hugging Face model in float32."""
    return Oracle(MODEL)


@pytest.fixture(scope="session")
def images() -> list[Image]:
    """The sample pictures."""
    return [sample.image for sample in load_samples()]


@pytest.fixture(scope="session")
def engine() -> Iterator[Callable[[Setup], Engine]]:
    """``engine(setup(...))``: a live engine with that setup, started on first use."""
    from vllm import LLM

    alive: dict[Setup, Engine] = {}

    def start(wanted: Setup) -> Engine:
        if wanted in alive:
            return alive[wanted]
        arguments: dict[str, object] = {
            "dtype": "float32",
            "max_model_len": 1024,
            "enforce_eager": True,
            "max_num_batched_tokens": 1024,
            "max_num_seqs": 8,
            "max_logprobs": 128,
            "kv_cache_memory_bytes": 64 << 20,
            "seed": 0,
            **json.loads(wanted.llm),
        }
        settings = json.loads(wanted.settings)
        if settings is None:
            alive[wanted] = Engine(LLM(MODEL, **arguments), None)
        else:
            pruning = era_vllm.engine_args(MODEL, **settings)
            alive[wanted] = Engine(LLM(**{**pruning, **arguments}), EraConfig.parse(settings))
            if hasattr(alive[wanted].model, "policy"):
                alive[wanted].model.on_prune = alive[wanted].record
        return alive[wanted]

    yield start
    for one in alive.values():
        one.core.shutdown()


@pytest.fixture(scope="session")
def difference(oracle: Oracle) -> Callable[[Engine, Request, Answer], Difference]:
    """Compare an engine's answer with the oracle, fed the engine's anchors."""

    def compare(engine: Engine, request: Request, answer: Answer) -> Difference:
        rates = request.rate
        if not isinstance(rates, tuple):
            rate = engine.config.pruning_rate if rates is None else rates
            rates = (rate,) * len(request.images)
        segments: list[Segment] = []
        for image, rate in zip(request.images, rates, strict=True):
            anchors = engine.anchors_of(image, rate, oracle)
            segments += oracle.recycle([image], engine.config, anchors)
        ids = [*answer.prompt_ids, *answer.token_ids][:-1]
        expected = partial(
            oracle.log_probs,
            ids,
            segments,
            len(answer.token_ids),
            positions=engine.config.positions,
        )
        errors = [
            (expected(bias=bias) - answer.log_probs).abs().max().item() for bias in (True, False)
        ]
        print(f"difference {errors[0]:.1e}, without bias {errors[1]:.1e}: {request.text!r}")
        return Difference(*errors)

    return compare
