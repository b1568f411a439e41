"""``era-vllm doctor``: one page that says what is in place, what is not, and what to do about it.

Ends with a live check: a real engine answers a question about a picture and is compared with
plain transformers. Exit code 0 = all is well. Leaves out how each thing is found
(``findings.py``) and the live check (``live.py``).
"""

import argparse
import json
import os
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Final

from era_vllm.calibration import calibrated
from era_vllm.cli.options import DEFAULT_MODEL, DEFAULT_NAME, add_era_options, era_settings
from era_vllm.config import EraConfig
from era_vllm.lab.screen import IN_PROCESS, muted, progress
from era_vllm.policies import make_policy

if TYPE_CHECKING:
    from era_vllm.cli.doctor.findings import Finding, Layout

DESCRIPTION = """Check this installation with a model, and a real answer against plain transformers.

  era-vllm doctor                                the sample model, about half a minute
  era-vllm doctor llava-hf/llava-1.5-7b-hf --no-check
  era-vllm doctor --era-policy dpp --json
"""
_ENGINE: Final = {
    **IN_PROCESS,
    "TORCH_COMPILE_DISABLE": "1",  # an eager engine compiles a few helpers all the same: 18 s
    # float32 is float32: on a GPU Triton and cuBLAS would round its products to TF32.
    "TRITON_F32_DEFAULT": "ieee",
    "NVIDIA_TF32_OVERRIDE": "0",
}
_WIDTH: Final = 100
_NAME: Final = 14


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    add, text = parser.add_argument, "checkpoint folder or name (default: the sample model)"
    add("model", nargs="?", default=DEFAULT_MODEL, metavar="MODEL", help=text)
    add("--json", action="store_true", help="print JSON instead of the page")
    text = "start no engine: for a model that does not fit twice into memory as float32"
    add("--no-check", action="store_true", help=text)
    text = "run the code that a checkpoint brings for its config, as vLLM's flag does (InternVL)"
    add("--trust-remote-code", action="store_true", help=text)
    add_era_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the page; return 0 if all is well, else 1."""
    settings = calibrated(arguments.model, era_settings(arguments))
    make_policy(EraConfig.parse(settings))  # a bad flag is no finding: it is refused
    trusted = {"trust_remote_code": True} if arguments.trust_remote_code else {}
    found = list(_examine(arguments.model, settings, trusted, check=not arguments.no_check))
    healthy = not any(finding.advice for finding in found)
    if arguments.json:
        report = {"ok": healthy, "findings": [asdict(finding) for finding in found]}
        print(json.dumps(report, indent=2))
    else:
        print(page(found))
    return 0 if healthy else 1


def page(found: "Sequence[Finding]") -> str:
    """Return the findings as text, by section, with what to do at the end."""
    lines: list[str] = []
    for section, of_section in groupby(found, attrgetter("section")):  # found section by section
        lines += ["", section]
        for finding in of_section:
            mark = "!!" if finding.advice else "ok"
            start = f"  {mark}  {finding.name:{_NAME}}  "
            indent = " " * len(start)
            lines.append(
                textwrap.fill(finding.value, _WIDTH, initial_indent=start, subsequent_indent=indent)
            )
    troubles = [finding for finding in found if finding.advice]
    lines += ["", "What to do" if troubles else "All is well."]
    for finding in troubles:
        text = f"{finding.name}: {finding.advice}"
        lines.append(textwrap.fill(text, _WIDTH, initial_indent="  ", subsequent_indent="    "))
    return "\n".join(lines).lstrip("\n")


def _examine(
    model: str, settings: dict[str, object], more: dict[str, object], *, check: bool
) -> "Iterator[Finding]":
    """Yield what is found.

    Args:    more: of the engine's arguments, beside the model and what the settings make.
    """
    for name, value in _ENGINE.items():
        os.environ.setdefault(name, value)
    progress("importing torch, transformers and vLLM")
    with muted():
        from era_vllm.cli.doctor import findings

        versions = list(findings.versions())
    yield from versions
    if any(finding.advice for finding in versions):
        return  # what follows would only repeat it
    yield findings.machine()
    yield from findings.plugin()
    progress("reading the model's config")
    try:
        with muted():
            arguments, of_model, layout = _planned(model, settings, more)
    except Exception as error:  # vLLM wraps refusals, ours too, in errors of many kinds
        yield findings.Finding("Model", "model", findings.reason(error), findings.advice(error))
        return
    yield from of_model
    if layout is None:
        return
    if not check:
        yield findings.Finding(findings.LIVE, "left out", "--no-check")
        return
    try:
        with muted():
            from era_vllm.cli.doctor.live import live_check

        yield from live_check(model, arguments, EraConfig.parse(settings), layout)
    except Exception as error:  # whatever an engine dies of, the page must say it
        advice = "see the engine's own log: era-vllm serve with the same arguments"
        yield findings.Finding(findings.LIVE, "engine", findings.reason(error), advice)


def _planned(
    model: str, settings: dict[str, object], more: dict[str, object]
) -> "tuple[dict[str, object], list[Finding], Layout | None]":
    from era_vllm.cli.doctor import findings
    from era_vllm.cli.loading import architectures, model_config
    from era_vllm.vllm_plugin.launch import plan

    family = ", ".join(architectures(model_config(model)))
    launch = plan(model, settings)
    os.environ.update(launch.environment)
    name = f"{DEFAULT_NAME} (ships with era_vllm)" if model == DEFAULT_MODEL else model
    named = findings.Finding("Model", "model", name)
    if not launch.engine:
        text = f"{family}, served by stock vLLM: the highest rate served is 0"
        return {}, [named, findings.Finding("Model", "architecture", text)], None
    arguments = {"model": model, **more, **launch.engine}
    config = findings.engine_config(arguments)
    ours = ", ".join(config.model_config.architectures)
    own = [named, findings.Finding("Model", "architecture", f"{family} -> {ours}")]
    more, layout = findings.model(config, EraConfig.parse(settings))
    return arguments, [*own, *more], layout
