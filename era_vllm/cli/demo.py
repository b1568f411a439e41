"""``era-vllm demo``: two servers, a dozen pictures, both answers; then the speed of a larger model.

Leaves out the questions (``lab/demo_answers.py``), the timing (``lab/demo_speed.py``) and the
engine that is timed (``speed_engine.py``). What is seen is written to ``out/`` as well.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Final

from era_vllm.errors import ConfigError, UnsupportedError

DESCRIPTION = """Ask two servers about a dozen pictures: all image tokens against a ninth of them.

Then time the first token of a larger model with dummy weights at four pruning rates. Writes
out/kept.png (the tokens that are kept of one picture) and out/demo.json.
"""
RATES: Final = (0.0, 0.889)
OUT: Final = Path("out")
MODULE: Final = (sys.executable, "-P", "-m")  # -P: nothing is imported from the user's folder
_SERVER_FLAGS: Final = (
    *("--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "4"),
    *("--kv-cache-memory-bytes", str(64 << 20)),
)
_STOPPING: Final = (signal.SIGTERM, signal.SIGHUP)
_SERVER_ENVIRONMENT: Final = {"TORCH_COMPILE_DISABLE": "1"}  # nothing to gain for a tiny model


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "demo",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--fast", action="store_true", help="leave the speed part out")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Show both parts; stop every process that was started, however it ends."""
    from era_vllm.cli.findings import INSTALL
    from era_vllm.cli.provenance import provenance

    if find_spec("vllm") is None:
        raise UnsupportedError(f"demo: vLLM is not installed; needed 0.32.x: {INSTALL}")
    for number in _STOPPING:
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, _stop)
    started = time.monotonic()
    _make_folder()
    report: dict[str, object] = provenance()
    try:
        report["answers"] = _answers()
        _say(f"kept tokens of one picture: {OUT / 'kept.png'}")
        _say(f"first part: {time.monotonic() - started:.0f} s\n")
        if not arguments.fast:
            report["speed"] = _speed(report)
    except KeyboardInterrupt:
        print("\nera-vllm demo: stopped, and the servers with it", file=sys.stderr)
        return 130
    (OUT / "demo.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    _say(f"all figures: {OUT / 'demo.json'}; total {time.monotonic() - started:.0f} s")
    return 0


def _make_folder() -> None:
    """Make ``out/`` and try to write there.

    Raises:
        ConfigError: it is a file, or nothing can be written in this folder.
    """
    try:
        OUT.mkdir(exist_ok=True)
        tempfile.TemporaryFile(dir=OUT).close()
    except OSError as error:
        raise ConfigError(
            f"the folder {str(OUT.absolute())!r} cannot be written to ({error.strerror}); start "
            "era-vllm demo in a folder where you may write, without a file of that name"
        ) from error


def _answers() -> dict[str, object]:
    from dataclasses import asdict

    from era_vllm.lab.demo_answers import ask_all, table
    from era_vllm.lab.samples import load_samples
    from era_vllm.lab.servers import Server, wait_for

    _say(f"two servers with the sample model, pruning rates {RATES[0]:g} and {RATES[1]:g}")
    samples = load_samples()
    command = [*MODULE, "era_vllm.cli.main", "serve", *_SERVER_FLAGS]
    with ExitStack() as stack:
        servers = [
            stack.enter_context(
                Server(
                    f"the server at rate {rate:g}",
                    [*command, "--era-pruning-rate", str(rate)],
                    _SERVER_ENVIRONMENT,
                    OUT / f"server_{rate:g}.log",
                )
            )
            for rate in RATES
        ]
        _draw_kept(OUT / "kept.png")  # while they start
        wait_for(servers)
        answered = ask_all([server.url for server in servers], samples)
    print("\n" + table(answered, RATES) + "\n")
    return {"rates": RATES, "questions": [asdict(item) for item in answered]}


def _draw_kept(path: Path) -> None:
    from era_vllm.cli.inspect import kept_picture, save
    from era_vllm.cli.loading import open_oracle
    from era_vllm.cli.options import DEFAULT_MODEL
    from era_vllm.config import EraConfig
    from era_vllm.lab.samples import load_samples

    config = EraConfig(pruning_rate=RATES[1])
    picture, _ = kept_picture(open_oracle(DEFAULT_MODEL), load_samples()[0].image, config)
    save(picture, path)


def _speed(report: dict[str, object]) -> dict[str, object]:
    from era_vllm.lab.demo_speed import Timing, table

    _say(
        "speed: the sample model is too small to show it (its first token takes milliseconds), so\n"
        "a larger one with DUMMY WEIGHTS: its answers mean nothing, its time is real"
    )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "speed.json"
        command = [*MODULE, "era_vllm.cli.speed_engine", str(out)]
        with subprocess.Popen(command) as process:
            try:
                code = process.wait()
            except BaseException:
                process.terminate()
                raise
        if code != 0:
            raise UnsupportedError(
                f"the speed part ended with exit code {code}; its error is above. It needs about "
                "6 GB of memory; era-vllm demo --fast leaves it out"
            )
        figures: dict[str, object] = json.loads(out.read_text(encoding="utf-8"))
    rows = figures["timings"]
    assert isinstance(rows, list)
    timings = [
        Timing(row["rate"], row["prompt_tokens"], tuple(row["seconds"]), tuple(row["ratios"]))
        for row in rows
    ]
    print(f"\n{figures['model']}, {figures['dtype']}, {report['hardware']}")
    print(f"{figures['measured']}; medians of {figures['rounds']} interleaved rounds\n")
    print(table(timings) + "\n")
    return figures


def _say(text: str) -> None:
    print(text, flush=True)


def _stop(number: int, frame: FrameType | None) -> None:
    for ours in _STOPPING:  # a terminal that closes may send two; stopping is not to be stopped
        signal.signal(ours, signal.SIG_IGN)
    raise KeyboardInterrupt
