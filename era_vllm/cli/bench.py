"""``era-vllm bench``: what pruning costs and saves, measured; figures as JSON and a picture.

Leaves out the benchmarks and their options (``bench/``).
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

from era_vllm.bench.options import (
    AttentionOptions,
    EngineOptions,
    GapOptions,
    Options,
    ReducerOptions,
    SegmentsOptions,
    ServeOptions,
    add_flags,
    resolved,
)
from era_vllm.bench.setup import set_environment
from era_vllm.cli.options import add_era_options, era_settings
from era_vllm.cli.preflight import check_out
from era_vllm.errors import UnsupportedError
from era_vllm.lab.screen import muted, progress

if TYPE_CHECKING:
    from era_vllm.bench.report import Report

DESCRIPTION: Final = """Measure what pruning costs and what it saves, on this machine.

  era-vllm bench reducer      the pruning step alone, its growth, against the vision tower
  era-vllm bench segments     a large picture in blocks: time, memory, what it changes
  era-vllm bench attention    the widened attention layer against vLLM's own; KV blocks
  era-vllm bench serve        first token, decode and encoder against stock vLLM and a bound
  era-vllm bench gap          the longest pause of a running stream while pictures arrive

One run measures all sides in interleaved rounds and reports medians and 90th percentiles; weights
are dummies of a real model's shape. With a GPU everything runs there, without one on the CPU.
"""
REDUCER: Final = """Time the pruning step alone (choose, merge, bias) on random tokens.

  era-vllm bench reducer                                      all sizes, both policies, growth
  era-vllm bench reducer --sizes 576:64 --n-sweep 256,576 --k-sweep 16,64 --rounds 3    a minute

A size is S x N:K, S segments of N tokens that become K each. 576:64 is a LLaVA-1.5 image. 2,880 ->
160 (a LLaVA-NeXT image) and 16,384 -> 1,638 (a long video) are pruned in segments: tile by tile
(5x576:32) and chunk by chunk (16x1024:102). As one segment (2880:160, 16384:1638) they are there to
compare: work grows with N squared. Beside each the vision tower, CLIP-L/14-336 with random weights
on the same device and in the same dtype, in one batch of as many images as make those tokens. A
policy that reads the encoder's attention is charged for recomputing it. Sizes without enough memory
are skipped with a word.

Growth: N is varied at K = 64, K at N = 2,304; the exponent is a least squares fit on logarithms.
Goal: at most 5 % of the tower for an image, its tiles and a video's chunks. Writes
OUT/bench-reducer.json and .png.
"""

SEGMENTS: Final = """Measure what it costs and what it changes to prune a large picture in blocks.

  era-vllm bench segments --dtype float32                     all of it (half an hour on two cores)
  era-vllm bench segments --dtype float32 --tokens 4096 --photos 2 --pictures 20      a quick look

Pruning costs N squared, so a picture of more than --era-max-segment tokens is cut into near-square
blocks, each pruned alone. Beside each bound the whole picture:

  time, memory   an engine's reducer on noise as wide as the language model (--shape)
  merge error    real photos, as tokens of the sample model's tower: mean 1 - cos of a token to the
                 row that stands for it, relative MSE, anchors shared with whole
  answers        of the sample model, its 144 tokens in 8, 4 and 2 blocks; paired with whole
  queries        attention received by a sample of queries against that by all, on the photos

And the reducer's share of a tower that sees a whole picture of --patches patches (Qwen3-VL's, of
which --tower-layers layers are timed and multiplied), reading the attention included. Goal: at most
5 % in blocks of the default size. Writes OUT/bench-segments.json and .png.
"""

ATTENTION: Final = """Time the attention layer that carries the bias against vLLM's own.

  era-vllm bench attention                              text, and pictures at .5 and .889
  era-vllm bench attention --rates .889 --rounds 3      a quick look

Real engines with dummy weights stay alive in this process and are asked in turn, with the same KV
cache memory: stock layers; stock layers of a model whose heads are as wide as the widened ones
(wide); and the rectified layers (era). All get the same prompts: text only, and pictures of which
the language model is fed K tokens (the stock ones keep the first K projector rows).

Where weights happen to lie in memory changes a decode step by up to 5 %: of two identical engines
the one started first is often the slower. So each kind is started twice, in mirrored order (era,
stock, wide, wide, stock, era), and the two take turns (`--no-mirror`: once, half the memory).

Timed inside, by hooks: all attention layers of one prefill and of one decode step (cache write
included), and the language model's whole step around them. The model of `wide` has wider
projections too, so the strict comparison is

  stock*   stock's step, with its attention layers' time replaced by wide's

and the goal is that a text-only step is at most 3 % slower: stock's step with era's attention
layers in it (`layers`), and era's own step (`step`, as noisy as the rest of the model is).
`--no-eager` hides the layers in a compiled graph: then only TTFT and decode time are compared. Also
shown: the KV blocks that the same memory holds. Writes OUT/bench-attention.json and .png.
"""

SERVE: Final = """Time requests to an engine that prunes, to stock vLLM, and to a bound.

  era-vllm bench serve                                           the whole comparison
  era-vllm bench serve --rates .889 --rounds 2 --no-profile      a quick look
  era-vllm bench serve --shape 7b --era-policy dpp               LLaVA-1.5-7B's shape
  era-vllm bench serve --family llava-next --rates .944          2,928 tokens of five tiles -> 208
  era-vllm bench serve --era-preset scout --rates .889           what the scout's layers take

Four engines with dummy weights stay alive in this process and are asked in turn, one request at a
time, the same KV cache memory each; every picture and prompt is new, so no cache answers:

  stock    vLLM as it is, all tokens of a picture (--family; 576 of LLaVA-1.5); text
  era      this package, each rate of --rates; text
  bound    stock vLLM whose language model is fed the first K projector rows: tower and projector
           run, nothing is selected, heads have their stock size. No reducer can be faster
  wide     stock vLLM, a model whose heads are as wide as era's widened ones; text. Its projections
           are wider too, so it is a mild judge: `era-vllm bench attention` has the strict one

TTFT runs from the call of LLM.generate to the first token. Inside it: tower, projector, scout (with
--era-scout K: K layers on the picture alone), reducer (whatever else happens between pixels and
tokens, reading the tower's attention included), merge (embeddings into the prompt, the biases into
their buffer), language model, rest (preprocessing, scheduling, sampling). torch.compile and CUDA
graphs may hide the language model's part. Memory: four times the model, all at once (0.9b: 2.5 GB
each).

Goals: TTFT 2.0x faster at .889 and 2.2x at .944; text within 3 % of `wide`; reducer at most 5 % of
the tower. Writes OUT/bench-serve.json and .png.
"""

GAP: Final = """Measure what a running stream waits for while new pictures arrive.

  era-vllm bench gap                                   64 pictures at .889
  era-vllm bench gap --shape tiny --pictures 16        a quick look

A stream of text decodes; then all pictures come at once, one a request, each new to every cache.
Timed is the longest time between two tokens of the stream (preparing the prompts left out: in a
server another process does that), until every picture has its first token. Three engines with
dummy weights stay alive in this process and are asked in turn:

  stock              vLLM as it is, all 576 tokens of a picture
  era                this package: a step encodes as many rows as vLLM profiled memory for
  era, not bounded   the same, scheduled by vLLM's own class, which counts a picture's K tokens

Goal: the longest pause is at most stock's. Memory: three times the model, all at once. Writes
OUT/bench-gap.json and .png.
"""


_WITHOUT_ENGINES: Final = ("reducer", "segments")
_KINDS: Final[Mapping[str, tuple[str, str, type[Options], dict[str, object]]]] = {
    "reducer": (REDUCER, "the pruning step alone", ReducerOptions, {"rounds": 5}),
    "segments": (SEGMENTS, "a large picture in blocks", SegmentsOptions, {"rounds": 3}),
    "attention": (
        ATTENTION,
        "the widened attention layer",
        AttentionOptions,
        {"rounds": 8, "rates": "0.5,0.889"},
    ),
    "serve": (
        SERVE,
        "requests to engines side by side",
        ServeOptions,
        {"rounds": 7, "rates": "0.5,0.778,0.889,0.944"},
    ),
    "gap": (
        GAP,
        "what a stream waits for while pictures arrive",
        GapOptions,
        {"rounds": 1, "warm_ups": 0},  # every engine answers two pictures first
    ),
}
"""A module of ``bench/`` each (``run``): description, what it does, options, defaults."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the benchmarks and their options."""
    kinds = parser.add_subparsers(dest="bench", metavar="WHAT", required=True)
    for name, (description, summary, options, usual) in _KINDS.items():
        kind = kinds.add_parser(
            name,
            help=summary,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        add_flags(kind, options)
        kind.set_defaults(**usual)
        if name not in _WITHOUT_ENGINES:
            add_era_options(kind, without=("calibration",))


def run(arguments: argparse.Namespace) -> int:
    """Measure, print the page, write the figures."""
    engines = arguments.bench not in _WITHOUT_ENGINES
    if engines and find_spec("vllm") is None:
        from era_vllm.vllm_plugin.version import INSTALL

        raise UnsupportedError(f"bench: vLLM is not installed; needed 0.32.x: {INSTALL}")
    started = time.monotonic()
    out = Path(arguments.out)
    file = out / f"bench-{arguments.bench}.json"
    check_out(out, (file.name, file.with_suffix(".png").name))
    era = era_settings(arguments) if engines else {}
    options = resolved(_KINDS[arguments.bench][2], arguments, era)
    try:
        if isinstance(options, EngineOptions | GapOptions):
            set_environment(eager=options.eager)
            progress("importing vLLM")
            with muted():
                import vllm  # noqa: F401
        report: Report = import_module(f"era_vllm.bench.{arguments.bench}").run(options, out)
    except KeyboardInterrupt:
        print("\nera-vllm bench: stopped; nothing written", file=sys.stderr)
        return 130
    document = report.as_dict(arguments.bench, asdict(options))
    document["seconds"] = round(time.monotonic() - started)
    file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(f"{document['hardware']}, torch {document['versions']['torch']}")
    print(report.text())
    progress(f"all figures: {file}, drawn: {file.with_suffix('.png')}; {document['seconds']} s")
    return 0
