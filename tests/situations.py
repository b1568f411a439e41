"""The situation table: what the tests measured, what is refused, what was not run.

A test says which situation it shows, ``@pytest.mark.situation("preemption")``, and the fixture
``measured`` takes its numbers. Each run adds its results to ``out/situations.json``; the table is
written by

    .venv/bin/python -m tests.situations        # out/situations.json -> docs/situations.md

Leaves out the measuring (``engine/conftest.py``).
"""

import json
import subprocess
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import pytest
import torch

from era_vllm.bench.provenance import cpu_name

ROOT: Final = Path(__file__).parents[1]
RESULTS: Final = ROOT / "out" / "situations.json"
TABLE: Final = ROOT / "docs" / "situations.md"
GPU: Final = "GPU: "
LLAVA: Final = "LlavaForConditionalGeneration"
SITUATIONS: Final = (
    "one image",
    "several images",
    "images side by side",
    "an image that ends the prompt",
    "several images at different rates",
    "mixed batch of five",
    "prefix hit",
    "another rate is no false hit",
    "chunks at every awkward place",
    "preemption",
    "abort in mid-prefill",
    "more images than a tower pass",
    "a family of one file: two runs, newlines, unequal segments",
    "other newlines",
    "videos",
    "pictures beside videos",
    "idle dummy batches",
    "decoding past the rope table",
    "tensor parallel 2",
    "encoders that share out images, TP 2",
    "vLLM's own pruning of videos beside ours, prefix hit",
    "torch.compile",
    "n-gram speculation",
    "KV connector, another process",
    "two engines in one process",
    "bf16",
    "fp8 KV cache",
    GPU + "eager, float32",
    GPU + "compact positions",
    GPU + "chunked prefill, prefix hits",
    GPU + "CUDA graphs and async scheduling, bf16",
    GPU + "padding rows of CUDA graphs",
    GPU + "Model Runner V1, bf16",
    GPU + "preemption",
    GPU + "fp8 KV cache",
)
NO_TEST: Final = {
    "GPU: FlashInfer": "takes heads of 64, 128, 256 and 512, and a widened one is none of them: "
    "vLLM chooses another backend, or refuses `--attention-backend FLASHINFER`",
    "data parallel": "needs several engines; one rank's idle batches are in the table above",
    "expert parallel": "no served family has experts",
    "KV offload, LMCache, NIXL": "stock vLLM cannot run them on a CPU; `docs/gpu.md`",
    "CPU tensor parallel with uneven heads": "stock vLLM refuses it",
    "LoRA of the language model": "seen by hand: requests with one of two adapters in a batch are "
    "exact (4.8e-5); on a CPU vLLM, stock too, answers those without an adapter beside them "
    "wrongly (4.65); no test; adapters of the tower are refused",
    "sleep mode": "a CPU worker of vLLM ignores it; a GPU has not run it",
    "reloaded weights": "seen by hand to be exact in float32, after a reset of the prefix and "
    "encoder caches; no test, but for the fp8 scales (`engine/test_scales.py`)",
    "fp8 KV cache on a CPU without AVX-512": "vLLM has no kernel for it there",
    "fp8 KV cache on a CPU with AMX": "not run; vLLM's kernel was read, and built with its tile "
    "instructions in software: `docs/bias-in-the-kv-cache.md`",
    "n > 1, beam search, structured output": "seen by hand; the server's tests ask for n > 1",
    "speculation by suffix or ngram_gpu": "allowed, since they draft without a model like ngram",
    "no images at all, --limit-mm-per-prompt image=0": "seen by hand to "
    "answer text like stock; no test",
}
"""What nothing in the repository runs, and why."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Largest differences of a log-probability that one test found in one engine."""

    positions: str
    store: str
    difference: float
    without_bias: float | None
    """None for text alone, where there is no bias."""
    allowed: float
    kernel: str = ""
    """vLLM's name of the attention kernel: a CPU's instruction set, a GPU's backend."""
    family: str = LLAVA
    """Architecture."""


@dataclass(frozen=True, slots=True)
class Result:
    """One test in its last run."""

    situation: str
    outcome: str
    """passed, failed or skipped"""
    why: str
    """Reason of a skip."""
    measured: tuple[Measured, ...]
    counted: tuple[str, ...] = ()
    """What the situation was seen by, such as "5 preemptions"."""
    commit: str = ""
    """Of the repository when it ran; with a + where files were changed."""
    machine: str = ""
    """Processor that it ran on."""


class Collector:
    """Pytest plugin: keeps the results of marked tests and adds them to the file at the end.

    Where several processes run the tests, theirs only put the marks, and the first one keeps what
    all report.
    """

    def __init__(self, *, keeps: bool = True) -> None:
        self.results: dict[str, Result] = {}
        self.keeps = keeps
        self.commit, self.machine = commit_here(), machine_here()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Put the mark where the report carries it; refuse one that the table does not know."""
        for mark in item.iter_markers("situation"):
            (name,) = mark.args
            if name not in SITUATIONS:
                pytest.fail(f"situation {name!r} is not in tests/situations.py", pytrace=False)
            item.user_properties.append(("situation", name))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep what the call, or a setup that skipped or failed, came to."""
        properties = defaultdict[str, list](list)
        for name, value in report.user_properties:
            properties[name].append(value)
        if not properties["situation"] or (report.when != "call" and report.passed):
            return
        why = report.longrepr[2] if report.skipped else ""
        self.results[report.nodeid] = Result(
            properties["situation"][0],
            report.outcome,
            why.removeprefix("Skipped: "),
            tuple(Measured(**row) for row in properties["measured"]),
            tuple(properties["counted"]),
            self.commit,
            self.machine,
        )

    def pytest_sessionfinish(self) -> None:
        """Replace the results of the tests that ran."""
        if self.results and self.keeps:
            RESULTS.parent.mkdir(exist_ok=True)
            whole = {**load(), **self.results}
            rows = {test: asdict(result) for test, result in sorted(whole.items())}
            RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


def commit_here() -> str:
    """Return the commit that is checked out, + where tracked files differ; "" outside git."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:  # no git at all
        return ""


def machine_here() -> str:
    """Return the GPU's name, or the CPU's with the instruction set that torch uses there."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{cpu_name()} ({torch.backends.cpu.get_cpu_capability()})"


def collect(config: pytest.Config) -> None:
    """Switch the collector on, once."""
    if not config.pluginmanager.has_plugin("situations"):
        keeps = not hasattr(config, "workerinput")  # xdist's name for a process of its own
        config.pluginmanager.register(Collector(keeps=keeps), "situations")


def load(path: Path = RESULTS) -> dict[str, Result]:
    """Read the results so far, by test id; none if there is no file."""
    if not path.exists():
        return {}
    rows = json.loads(path.read_text())
    return {
        test: Result(
            **{
                **row,
                "measured": tuple(Measured(**one) for one in row["measured"]),
                "counted": tuple(row["counted"]),
            }
        )
        for test, row in rows.items()
    }


def render(results: Mapping[str, Result], refused: Mapping[str, str]) -> str:
    """Return the page.

    Args:
        results: Of ``load``.
        refused: Engine feature -> why it is refused, and what works.
    """
    shown = list(_shown(results))
    done = {row.situation for row in results.values() if row.outcome == "passed" and row.measured}
    without = [name for name in SITUATIONS if name not in done]
    return "\n".join(
        [
            "# Situations",
            "",
            "Written by `.venv/bin/python -m tests.situations` from the results of `make test` and",
            "`make test-all`; do not edit. The engine's log-probabilities against the oracle's",
            "(`era_vllm/lab/oracle.py`): whole vocabulary, last prompt token + 8 decode steps,",
            "float32 on a CPU where nothing else is said. *Difference*: the largest over the",
            "test's requests. *Without bias*: the smallest difference from an oracle without the",
            "bias, over the requests with images; each test asserts 3 times what is allowed.",
            "Where a row has several measurements, it shows the one closest to what is allowed.",
            "For bf16 and fp8 that is 1.5 times the error of stock vLLM's text, measured beside it",
            "on the same kernel; means over requests and steps. *Run on*: processor, vLLM's",
            "attention kernel, commit (+ = with changes).",
            "",
            "## Exact",
            "",
            *_table(
                (
                    "situation",
                    "family",
                    "positions",
                    "bias store",
                    "test",
                    "difference",
                    "without bias",
                    "allowed",
                    "run on",
                ),
                shown,
            ),
            "",
            "## Refused at start",
            "",
            *_table(("feature", "why, and what works"), refused.items()),
            "",
            "## Not run here",
            "",
            *_table(
                ("feature", "why"),
                [*((name, _why_not(name, results)) for name in without), *NO_TEST.items()],
            ),
            "",
        ]
    )


def _shown(results: Mapping[str, Result]) -> Iterator[tuple[str, ...]]:
    """Yield a row for each passed test, positions and store, in the order of ``SITUATIONS``."""
    groups: dict[tuple[str, ...], list[Measured]] = defaultdict(list)
    counted: dict[tuple[str, ...], str] = {}
    places: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for test, result in results.items():
        if result.outcome == "passed":
            for one in result.measured:
                name = test.removeprefix("tests/").partition("[")[0]
                family = one.family.removesuffix("ForConditionalGeneration")
                key = result.situation, family, one.positions, one.store, name
                groups[key].append(one)
                counted[key] = ", ".join(result.counted)
                place = result.machine, one.kernel, result.commit
                places[key].add(", ".join(part or "not recorded" for part in place))
    for key in sorted(groups, key=lambda key: (SITUATIONS.index(key[0]), *key[1:])):
        rows = groups[key]
        controls = [row.without_bias for row in rows if row.without_bias is not None]
        closest = max(rows, key=lambda row: row.difference / row.allowed)
        situation, family, positions, store, test = key
        yield (
            f"{situation} ({counted[key]})" if counted[key] else situation,
            family,
            positions,
            store,
            f"`{test}`",
            f"{closest.difference:.1e}",
            f"{min(controls):.2g}" if controls else "-",
            f"{closest.allowed:.2g}",
            "; ".join(sorted(places[key])),
        )


def _why_not(situation: str, results: Mapping[str, Result]) -> str:
    found = [row for row in results.values() if row.situation == situation]
    if failed := [row for row in found if row.outcome == "failed"]:
        return f"**fails**: {len(failed)} of {len(found)} tests"
    return next(
        (row.why for row in found if row.outcome == "skipped"), "no result of a marked test yet"
    )


def _table(head: Sequence[str], rows: "Iterator[Sequence[str]] | Sequence[Sequence[str]]"):  # noqa: ANN202
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def refusals() -> dict[str, str]:
    """Return engine feature -> why it is refused, out of the code that refuses."""
    from era_vllm.vllm_plugin.refusals import REFUSALS

    return {row.feature: f"{row.why}; {row.instead}" for row in REFUSALS}


if __name__ == "__main__":
    TABLE.write_text(render(load(), refusals()))
    print(f"{TABLE.relative_to(ROOT)}: {len(load())} tests")
