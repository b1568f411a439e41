"""Engines in the test process and their comparison with the oracle.

``exact`` is what most tests end with; ``difference`` returns the numbers behind it, and
``measured`` puts them into the situation table.

The first engine takes about 25 s, each further one two to four: so they are made once per
configuration, and the last dozen stay alive. Subjects that need processes of their own start them
themselves.
"""

import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["TORCH_COMPILE_DISABLE"] = "1"  # vLLM compiles its log-probability helper for 18 s
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import warnings  # noqa: E402
from collections.abc import Callable, Iterable, Iterator, Sequence  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from dataclasses import asdict, dataclass, field  # noqa: E402
from functools import cache, partial  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from PIL.Image import Image  # noqa: E402

import era_vllm  # noqa: E402
from era_vllm.attention.bias_store import STORES  # noqa: E402
from era_vllm.compat import cpu_attention  # noqa: E402
from era_vllm.config import EraConfig  # noqa: E402
from era_vllm.errors import UnsupportedError
from era_vllm.lab import CHECKPOINT  # noqa: E402
from era_vllm.lab.oracle import Oracle, Segment  # noqa: E402
from era_vllm.lab.samples import load_samples  # noqa: E402
from era_vllm.pipeline import prune  # noqa: E402
from era_vllm.pixels import pixel_hash  # noqa: E402
from era_vllm.plan import plan  # noqa: E402
from era_vllm.types import PrunedTokens, Signal, VisualTokens  # noqa: E402
from tests import situations  # noqa: E402
from tests.forked import FORKED, run  # noqa: E402

with warnings.catch_warnings():  # torch and vLLM use what they deprecate
    warnings.simplefilter("ignore")
    importlib.import_module("vllm.model_executor.layers.attention")

QUESTIONS = (  # for means over requests
    "what shape is red?",
    "how many shapes?",
    "what word is shown?",
    "what number is shown?",
    "is there a red circle?",
    "what color is the star?",
)
STOCK_FACTOR = 1.5  # of stock vLLM's error on the same kernel, where numbers are not float32
EAGER = {"TORCH_COMPILE_DISABLE": "1"}  # else a helper for log-probabilities compiles for 18 s
SPAWNED = {**EAGER, "PYTHONHASHSEED": "1"}
"""Of a process that shares nothing with the forks, not even how it hashes."""
STEPS = 9  # the last prompt token + 8 decode steps
TOLERANCE = 1e-4  # of log-probabilities, whole vocabulary, float32
CONTROL_FACTOR = 3  # tolerances that an answer must be away from an oracle without the bias
MODEL = str(CHECKPOINT)
FOLDER = Path(__file__).parent


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
    model: str = MODEL


@pytest.fixture(scope="session")
def setup() -> Callable[..., Setup]:
    """``setup(policy="dpp", llm={...})``: describe an engine by fields of ``EraConfig``.

    By default with ``era``, which reads attention, so that this is shown in every situation.
    """

    def describe(
        *,
        stock: bool = False,
        llm: dict[str, object] | None = None,
        model: str = MODEL,
        **settings: object,
    ):
        if "preset" not in settings:
            settings = {"policy": "era", **settings}
        return Setup(json.dumps(None if stock else settings), json.dumps(llm or {}), model)

    return describe


@dataclass(frozen=True)
class Request:
    """A question about some pictures; ``rate`` None = the engine's default.

    ``form`` says where the pictures stand: {pictures} and {text} are put in.
    """

    text: str
    images: tuple[Image, ...] = ()
    rate: float | tuple[float, ...] | None = None
    form: str = "USER: {pictures}{text} ASSISTANT:"

    def prompt(self) -> dict[str, object]:
        """Return what ``LLM.generate`` takes."""
        pictures = "<image> " * len(self.images)
        filled = self.form.format(pictures=pictures, text=self.text)
        prompt: dict[str, object] = {"prompt": filled}
        if self.images:
            prompt["multi_modal_data"] = {"image": list(self.images)}
        if self.rate is not None:
            rate = list(self.rate) if isinstance(self.rate, tuple) else self.rate
            prompt["mm_processor_kwargs"] = {"era": rate}
        return prompt


@pytest.fixture(scope="session")
def ask() -> Callable[..., Request]:
    """``ask(text, *images, rate=None, form=...)``: describe a request."""
    return lambda text, *images, rate=None, **form: Request(text, images, rate, **form)


@dataclass(frozen=True)
class Answer:
    """What the engine said, over the whole vocabulary."""

    prompt_ids: list[int]
    token_ids: list[int]
    log_probs: torch.Tensor
    cached_tokens: int
    text: str


MOST_ENGINES = 12
"""Alive in a process: each has some 85 MB, and another is there in two seconds."""


@contextmanager
def without_collecting() -> Iterator[None]:
    """vLLM collects garbage as an engine starts and ends, through all others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "collect", lambda *_: 0)
        patch.setattr(gc, "unfreeze", lambda: None)
        yield


@dataclass
class Engine:
    """A live engine and everything that it pruned."""

    llm: object
    config: EraConfig | None
    pruned: dict[tuple[int, int], tuple[VisualTokens, PrunedTokens, int]] = field(
        default_factory=dict
    )
    items: dict[tuple[int, tuple[int, ...]], "PrunedItem"] = field(default_factory=dict)
    """By the hash of the pixels and K of each segment."""
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
    def kernel(self) -> str:
        """vLLM's name of the language model's attention kernel."""
        from vllm.model_executor.layers.attention import Attention

        return next(m.isa for m in self.model.modules() if isinstance(m, Attention))

    @property
    def block_size(self) -> int:
        """Slots of a KV block."""
        return self.core.vllm_config.cache_config.block_size

    def retire(self) -> None:
        """Free its memory, and leave what others share: vLLM's ``shutdown`` ends that for all."""
        with without_collecting():
            self.runner._cleanup_profiling_kv_cache()
        self.runner.model = None
        self.pruned.clear()
        self.items.clear()

    def record(self, items: Sequence["PrunedItem"]) -> None:
        """Keep what was pruned, by picture and number of anchors."""
        self.encoded += len(items)
        for one in items:
            self.items[one.item.pixel_hash, one.item.plan.num_anchors] = one
            segment = one.segments[0]  # LLaVA-1.5's only one
            key = (one.item.pixel_hash, *one.item.plan.num_anchors)
            self.pruned[key] = (segment.tokens, segment.result, segment.row)

    def chosen(
        self, key: tuple[int, tuple[int, ...]]
    ) -> list[tuple[tuple[int, int], torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Return grid, anchors [a], assignment [n] and attention [c, n] of an item's segments."""
        return [
            (
                one.tokens.grid,
                one.result.anchors[one.row],
                one.result.assignment[one.row],
                one.tokens.signals[Signal.ENCODER_ATTENTION][one.row],
            )
            for one in self.items[key].segments
        ]

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
            {signal: value[row : row + 1].clone() for signal, value in tokens.signals.items()},
        )
        config, count = self.config, result.anchors.shape[1]
        again = prune(one, count, self.model.policy, merge=config.merge, bias=config.bias)
        assert torch.equal(again.anchors[0], result.anchors[row])
        assert torch.equal(again.embeds[0], result.embeds[row])
        assert torch.equal(again.log_bias[0], result.log_bias[row])
        return again.anchors

    def _key(self, image: Image, rate: float, oracle: Oracle) -> tuple[int, int]:
        pixels = oracle.pixels(image)[0].to(self.core.vllm_config.model_config.dtype)
        layout = self.model.adapter.layout(self.model.config, "image", ())
        return pixel_hash(pixels), *plan(layout, rate, self.config).num_anchors


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
    """``engine(setup(...))``: a live engine with that setup, started on first use.

    What vLLM does again in each, though once a process is enough, takes longer than all else.
    """
    from vllm import LLM
    from vllm.platforms.cpu import CpuPlatform

    alive: dict[Setup, Engine] = {}  # the one that was asked for last is the last
    look_through_modules = staticmethod(cache(CpuPlatform.register_triton_kernel_overrides))

    def llm(**arguments: object) -> LLM:
        with pytest.MonkeyPatch.context() as patch, without_collecting():
            patch.setattr(CpuPlatform, "register_triton_kernel_overrides", look_through_modules)
            made = LLM(**arguments)
        made.llm_engine.engine_core._finalizer.detach()  # a second for each, as a process ends
        return made

    def start(wanted: Setup) -> Engine:
        if wanted in alive:
            alive[wanted] = alive.pop(wanted)
            return alive[wanted]
        while len(alive) >= MOST_ENGINES:
            alive.pop(next(iter(alive))).retire()
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
            alive[wanted] = Engine(llm(**{"model": wanted.model, **arguments}), None)
        else:
            pruning = era_vllm.engine_args(wanted.model, **settings)
            alive[wanted] = Engine(llm(**{**pruning, **arguments}), EraConfig.parse(settings))
            if hasattr(alive[wanted].model, "policy"):
                alive[wanted].model.reducer.listeners.append(alive[wanted].record)
        gc.collect()
        gc.freeze()  # or each later collection walks through every engine
        return alive[wanted]

    yield start
    with without_collecting():
        for one in alive.values():
            one.core.shutdown()
    gc.unfreeze()


Measured = Callable[..., None]


@pytest.fixture
def measured(record_property: Callable[[str, object], None]) -> Measured:
    """``measured(config, kernel, difference, without bias, allowed)``: for the situation table."""

    def record(
        config: EraConfig,
        kernel: str,
        difference: float,
        without_bias: float | None,
        allowed: float,
        family: str = situations.LLAVA,
    ) -> None:
        row = situations.Measured(
            config.positions, config.bias_store, difference, without_bias, allowed, kernel, family
        )
        record_property("measured", asdict(row))

    return record


@pytest.fixture
def difference(
    oracle: Oracle, measured: Measured
) -> Callable[[Engine, Request, Answer], Difference]:
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
        found = compare_with(oracle, ids, segments, answer.log_probs, engine.config)
        print(
            f"difference {found.exact:.1e}, without bias {found.without_bias:.1e}: {request.text!r}"
        )
        control = found.without_bias if request.images else None
        measured(engine.config, engine.kernel, found.exact, control, TOLERANCE)
        return found

    return compare


def mean_errors(
    oracle: Oracle,
    answered: Iterable[tuple[list[int], list[Segment], torch.Tensor]],
    config: EraConfig,
) -> tuple[float, float]:
    """Return an engine's mean error against float32, and the same for an oracle without the bias.

    Means over requests and steps of the largest difference of a log-probability.

    Args:
        oracle: float32.
        answered: For each request all token ids but the last, what stood in the place of its
            images, and the engine's log-probabilities [steps, vocabulary].
        config: The engine's settings.
    """
    rows = []
    for ids, segments, log_probs in answered:
        ask = {"last": len(log_probs), "positions": config.positions, "gamma": config.gamma}
        expected = (oracle.log_probs(ids, segments, bias=bias, **ask) for bias in (True, False))
        rows.append([(log_probs - one).abs().amax(-1).mean() for one in expected])
    error, without = torch.tensor(rows).mean(0).tolist()
    return error, without


@pytest.fixture
def errors(oracle: Oracle) -> Callable[[Engine, Sequence[Request]], tuple[float, float]]:
    """``errors(engine, requests)``: ``mean_errors`` of its answers to them.

    The oracle is fed the engine's own reduced embeddings: the tower's rounding is no difference.
    """

    def measure(engine: Engine, requests: Sequence[Request]) -> tuple[float, float]:
        rows = []
        for request, answer in zip(requests, engine.ask(requests), strict=True):
            segments = []
            for image in request.images:
                key = engine._key(image, engine.config.pruning_rate, oracle)
                tokens, result, row = engine.pruned[key]
                kept = result.embeds[row].float(), result.log_bias[row], result.anchors[row]
                segments.append(Segment(*kept, tokens.embeds.shape[1]))
            ids = [*answer.prompt_ids, *answer.token_ids][:-1]
            rows.append((ids, segments, answer.log_probs))
        return mean_errors(oracle, rows, engine.config or EraConfig())

    return measure


@pytest.fixture
def as_close_as_stock(
    engine: Callable[[Setup], Engine],
    setup: Callable[..., Setup],
    ask: Callable[..., Request],
    images: list[Image],
    errors: Callable[[Engine, Sequence[Request]], tuple[float, float]],
    measured: Measured,
) -> Callable[..., Engine]:
    """``as_close_as_stock(llm, **settings)``: such an engine errs little more than stock vLLM.

    Pruned and for text alone, against what stock vLLM with the same arguments of ``LLM`` errs for
    text on the same kernel; and an oracle without the bias is far off. Returns the engine.
    """

    def check(llm: dict[str, object], **settings: object) -> Engine:
        from vllm.v1.attention.backends import cpu_attn

        live, texts = engine(setup(llm=llm, **settings)), [ask(text) for text in QUESTIONS]
        pictures = [ask(text, image) for text, image in zip(QUESTIONS, images, strict=False)]
        (pruned, without), (text, _) = errors(live, pictures), errors(live, texts)
        with pytest.MonkeyPatch.context() as patch:  # a head that is not widened may have another
            patch.setattr(cpu_attn, "_get_attn_isa", lambda *_: live.kernel)
            stock = engine(setup(stock=True, llm=llm))
        assert stock.kernel == live.kernel
        error, _ = errors(stock, texts)
        allowed, ours = STOCK_FACTOR * error, max(pruned, text)
        print(
            f"{live.kernel}, {settings}: pruned {pruned:.3f}, text {text:.3f}, stock's text "
            f"{error:.3f}, no bias {without:.2f}"
        )
        measured(live.config, live.kernel, ours, without, allowed)
        assert ours <= allowed
        assert without > CONTROL_FACTOR * allowed
        return live

    return check


@pytest.fixture(scope="session")
def needs_fp8() -> Callable[[str], None]:
    """``needs_fp8(store)``: skip, with the reason, where this CPU has no kernel for the pair."""

    def check(store: str) -> None:
        try:
            kernel = cpu_attention.fp8_kernel(torch.bfloat16)
        except UnsupportedError as error:  # that it is refused: tests/unit/.../test_refusals.py
            pytest.skip(str(error))
        if kernel in cpu_attention.FLUSHING and not STORES[store].limits.flushed:
            pytest.skip(f"refused at start: {store} on vLLM's {kernel} kernel")

    return check


def compare_with(
    oracle: Oracle,
    ids: list[int],
    segments: list[Segment],
    log_probs: torch.Tensor,
    config: EraConfig,
) -> Difference:
    """Compare log-probabilities [steps, vocabulary] with the oracle, with and without the bias."""
    how = {"positions": config.positions, "gamma": config.gamma}
    expected = partial(oracle.log_probs, ids, segments, len(log_probs), **how)
    return Difference(
        *((expected(bias=bias) - log_probs).abs().max().item() for bias in (True, False))
    )


@pytest.fixture
def exact(
    difference: Callable[[Engine, Request, Answer], Difference],
) -> Callable[[Engine, Sequence[Request], Sequence[Answer]], None]:
    """Assert that pruned answers are the oracle's, and would not be without the bias."""

    def check(engine: Engine, requests: Sequence[Request], answers: Sequence[Answer]) -> None:
        for request, answer in zip(requests, answers, strict=True):
            found = difference(engine, request, answer)
            assert found.exact < TOLERANCE
            if request.images:
                assert found.without_bias > CONTROL_FACTOR * TOLERANCE

    return check


def python(*arguments: str, **variables: str) -> None:
    """Run a script of this folder, or ``-c`` and code; fail with what it printed.

    With ``EAGER`` alone it is a fork; any other variable makes it a process of its own.
    """
    command = (sys.executable, *arguments)
    if arguments[0] != "-c":
        command = (*FORKED, str(FOLDER / arguments[0]), *arguments[1:])
        if variables == EAGER:
            with tempfile.TemporaryDirectory() as folder:
                run(command, Path(folder) / "log")
            return
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("VLLM_", "TORCH_"))}
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(command, cwd=FOLDER, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.fixture
def apart(tmp_path: Path) -> Callable[..., dict[str, object]]:
    """``apart(arguments, settings=..., VARIABLE=...)``: run an engine in a process of its own.

    Returns what ``run_apart.py`` saved.
    """

    def run(
        arguments: dict[str, object],
        *,
        settings: dict[str, object] | None,
        questions: Sequence[Sequence[object]],
        checkpoint: str = MODEL,
        steps: int = STEPS,
        rounds: int = 1,
        **variables: str,
    ) -> dict[str, object]:
        ours = {"settings": settings, "questions": questions, "steps": steps, "rounds": rounds}
        raw, out = json.dumps({**arguments, **ours}), str(tmp_path / "out.pt")
        python("run_apart.py", checkpoint, raw, out, **variables)
        return torch.load(out)

    return run
