"""``era-vllm demo``: pictures and videos, answers with and without pruning; then the speed.

Leaves out the asking (``lab/asking.py``) and the timing (``bench/first_token.py``). What is seen is
written to ``out/`` as well.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Final

from era_vllm.cli.preflight import check_folder
from era_vllm.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from era_vllm.lab.asking import Answer
    from era_vllm.lab.samples import Sample
    from era_vllm.lab.servers import Server

DESCRIPTION = """Ask two servers about a dozen pictures: all image tokens against a ninth of them.

Then ask one server of a small Qwen3-VL about single pictures, several, and videos, each request
with its own pruning rate. Then time the first token of a larger model with dummy weights at four
rates. Writes out/kept.png (the tokens that are kept of one picture) and out/demo.json.
"""
RATES: Final = (0.0, 0.889)
TASK_RATES: Final = (0.0, 0.778)
"""Of the small Qwen3-VL, whose pictures have a third as many tokens."""
_KINDS: Final = {"picture": "a picture", "several": "several", "film": "a video"}
OUT: Final = Path("out")
MODULE: Final = (sys.executable, "-P", "-m")  # -P: nothing is imported from the user's folder
_SERVER_FLAGS: Final = (
    *("--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "4"),
    *("--kv-cache-memory-bytes", str(64 << 20)),
)
_MEMORY_GB: Final = {"0.9b": 6, "qwen3-vl-2b": 12}
"""By shape: those of ``bench/first_token.py``."""
_COLUMNS: Final = (40, 13, 13, 10)
_STOPPING: Final = (signal.SIGTERM, signal.SIGHUP)
_say: Final = partial(print, flush=True)
_SERVER_ENVIRONMENT: Final = {"TORCH_COMPILE_DISABLE": "1"}  # nothing to gain for a tiny model


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    add = parser.add_argument
    add("--fast", action="store_true", help="leave the speed part out")
    text = "of the speed part's model (default 0.9b, a LLaVA-1.5; qwen3-vl-2b takes 12 GB)"
    add("--shape", choices=tuple(_MEMORY_GB), default="0.9b", help=text)


def run(arguments: argparse.Namespace) -> int:
    """Show all parts; stop every process that was started, however it ends."""
    from era_vllm.bench.provenance import provenance
    from era_vllm.vllm_plugin.version import INSTALL

    if find_spec("vllm") is None:
        raise UnsupportedError(f"demo: vLLM is not installed; needed 0.32.x: {INSTALL}")
    for number in _STOPPING:
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, _stop)
    started = time.monotonic()
    check_folder(
        OUT,
        f"the folder {str(OUT.absolute())!r} cannot be written to",
        "start era-vllm demo in a folder where you may write, without a file of that name",
    )
    report: dict[str, object] = provenance()
    try:
        report["answers"] = _answers()
        _say(f"kept tokens of one picture: {OUT / 'kept.png'}")
        _say(f"first part: {time.monotonic() - started:.0f} s\n")
        since = time.monotonic()
        report["tasks"] = _tasks()
        _say(f"second part: {time.monotonic() - since:.0f} s\n")
        if not arguments.fast:
            report["speed"] = _speed(arguments.shape)
    except KeyboardInterrupt:
        print("\nera-vllm demo: stopped, and the servers with it", file=sys.stderr)
        return 130
    (OUT / "demo.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    _say(f"all figures: {OUT / 'demo.json'}; total {time.monotonic() - started:.0f} s")
    return 0


def _answers() -> dict[str, object]:
    from era_vllm.lab.asking import ServerAsker, ask
    from era_vllm.lab.samples import load_samples
    from era_vllm.lab.servers import wait_for

    _say(f"two servers with the sample model, pruning rates {RATES[0]:g} and {RATES[1]:g}")
    samples = load_samples()
    with ExitStack() as stack:
        servers: list[Server] = []
        for rate in RATES:
            server = _server(f"at rate {rate:g}", f"{rate:g}", "--era-pruning-rate", rate)
            servers.append(stack.enter_context(server))
        _draw_kept(OUT / "kept.png")  # while they start
        wait_for(servers)
        answers: list[list[list[Answer]]] = []
        for server in servers:
            with ServerAsker(server.url) as asker:
                answers.append(ask(asker, samples))
    print("\n" + _table(samples, answers) + "\n")
    return {"rates": RATES, "questions": _questions(samples, answers)}


def _server(name: str, log: str, *words: object) -> "Server":
    from era_vllm.lab.servers import Server

    command = [*MODULE, "era_vllm.cli.main", "serve", *map(str, words), *_SERVER_FLAGS]
    return Server(f"the server {name}", command, _SERVER_ENVIRONMENT, OUT / f"server_{log}.log")


def _tasks() -> dict[str, object]:
    """Ask one server of the small Qwen3-VL everything at both rates."""
    from era_vllm.bench.provenance import fast_dtype
    from era_vllm.lab import CHECKPOINT_QWEN3_VL
    from era_vllm.lab.asking import ServerAsker, ask
    from era_vllm.lab.samples import load_task_samples
    from era_vllm.lab.servers import wait_for

    _say("one server of a small Qwen3-VL; each request says its own rate")
    samples = load_task_samples()
    dtype = fast_dtype()  # vLLM starts with the largest video that there may be
    with _server("of Qwen3-VL", "qwen3_vl", CHECKPOINT_QWEN3_VL, "--dtype", dtype) as server:
        wait_for([server])
        with ServerAsker(server.url) as asker:
            answers = [ask(asker, samples, rate) for rate in TASK_RATES]
    first = [f"{_KINDS[sample.kind]}: {sample.questions[0].text}" for sample in samples]
    print("\n" + _table(samples, answers, TASK_RATES, first) + "\n")
    return {"rates": TASK_RATES, "questions": _questions(samples, answers)}


def _questions(
    samples: "Sequence[Sample]", answers: "Sequence[list[list[Answer]]]"
) -> list[dict[str, object]]:
    """Return each question with its answers, one a rate, as JSON values."""
    return [
        {
            "files": sample.files,
            "family": question.family,
            "question": question.text,
            "right": question.answer,
            "answers": [answer.text for answer in of_question],
            "image_tokens": [answer.image_tokens for answer in of_question],
        }
        for sample, *of_sample in zip(samples, *answers, strict=True)
        for question, *of_question in zip(sample.questions, *of_sample, strict=True)
    ]


def _table(
    samples: "Sequence[Sample]",
    answers: "Sequence[list[list[Answer]]]",
    rates: "Sequence[float]" = RATES,
    texts: "Sequence[str]" = (),
) -> str:
    """Return the first question of each subject as a table, and counts over all questions.

    Args:    texts: what stands for the first questions; none: themselves.
    """
    texts = texts or [sample.questions[0].text for sample in samples]
    heads = ["question", *(f"rate {rate:g}" for rate in rates), "right", "image tokens"]
    widths = [max(_COLUMNS[0], 2 + max(map(len, texts))), *_COLUMNS[1:], 0]
    rows = [heads, [*("-" * (width - 2) for width in widths[:-1]), "-" * 12]]
    for sample, text, *of_sample in zip(samples, texts, *answers, strict=True):
        question, first = sample.questions[0], [of_rate[0] for of_rate in of_sample]
        marked = [f"{each.text:9} {'ok' if each.is_right(question) else 'x'}" for each in first]
        tokens = " -> ".join(str(each.image_tokens) for each in first)
        rows.append([text, *marked, question.answer, tokens])
    lines = ["".join(map(str.ljust, row, widths)).rstrip() for row in rows] + [""]
    wanted = [question for sample in samples for question in sample.questions]
    said = [[answer for each in of_rate for answer in each] for of_rate in answers]
    for rate, of_rate in zip(rates, said, strict=True):
        right = sum(answer.is_right(each) for answer, each in zip(of_rate, wanted, strict=True))
        lines.append(f"rate {rate:<5g} {right} of all {len(wanted)} questions right")
    same = sum(len({answer.text for answer in each}) == 1 for each in zip(*said, strict=True))
    lines.append(f"           {same} of {len(wanted)} answers are the same at both rates")
    return "\n".join(lines)


def _draw_kept(path: Path) -> None:
    from era_vllm.cli.inspect import kept_picture, save
    from era_vllm.cli.loading import open_oracle
    from era_vllm.cli.options import DEFAULT_MODEL
    from era_vllm.config import EraConfig
    from era_vllm.lab.samples import load_samples

    config = EraConfig(pruning_rate=RATES[1])
    picture, _ = kept_picture(open_oracle(DEFAULT_MODEL), load_samples()[0].image, config)
    save(picture, path)


def _speed(shape: str) -> dict[str, object]:
    _say(
        "speed: these models are too small to show it (their first token takes milliseconds), so\n"
        "a larger one with DUMMY WEIGHTS: its answers mean nothing, its time is real"
    )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "speed.json"
        command = [*MODULE, "era_vllm.bench.first_token", str(out), shape]
        with subprocess.Popen(command) as process:
            try:
                code = process.wait()
            except BaseException:
                process.terminate()
                raise
        if code != 0:
            raise UnsupportedError(
                f"the speed part ended with exit code {code}; its error is above. It needs about "
                f"{_MEMORY_GB[shape]} GB of memory; era-vllm demo --fast leaves it out"
            )
        return json.loads(out.read_text(encoding="utf-8"))


def _stop(number: int, frame: FrameType | None) -> None:
    for ours in _STOPPING:  # a terminal that closes may send two; stopping is not to be stopped
        signal.signal(ours, signal.SIG_IGN)
    raise KeyboardInterrupt
