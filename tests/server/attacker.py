"""What tests of the protected server share: keys, limits, requests and pictures."""

import base64
import io
import re
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from PIL import Image

from era_vllm.lab import CHECKPOINT
from era_vllm.lab.servers import Server
from tests.forked import FORKED, VARIABLES, start_server

KEYS = ("key-of-one-client", "key-of-another")
METRICS_KEY = "key-of-prometheus"
DEADLINE_S = 8
MAX_BODY = 2**20
MAX_DATA_URL = 2**18
MAX_PIXELS = 2**20
QUEUE = 160
QUEUE_TOKENS = 20_000
ALLOWED_DOMAIN = "localhost"  # allowed by name, and yet a loopback address
ENGINE = [
    *("--enforce-eager", "--max-model-len", "1024", "--kv-cache-memory-bytes", "64M"),
    *("--served-model-name", "era-sample", "--allowed-media-domains", ALLOWED_DOMAIN),
]
ERA_VLLM = str(Path(sys.executable).with_name("era-vllm"))
STOCK = "import sys; from era_vllm_server.app import run; run(sys.argv[1:])"


@dataclass(frozen=True)
class Pair:
    """A client of each of the two."""

    ours: httpx.Client
    stock: httpx.Client
    server: Server

    def chat(self, client: httpx.Client, *urls: str, **options: object) -> httpx.Response:
        """Ask about pictures."""
        return client.post("/v1/chat/completions", json=request(*urls, **options))

    def alive(self) -> bool:
        """Tell whether ours still answers about a picture."""
        reply = self.chat(self.ours, data_url(picture()))
        return reply.status_code == 200 and bool(reply.json()["choices"][0]["message"]["content"])

    def work(self) -> tuple[float, float]:
        """Return how many requests our engine has, waiting ones included, and tokens it made."""
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
        found = sum(metric(self.ours, name) for name in names)
        return found, metric(self.ours, "vllm:generation_tokens_total")


@dataclass
class Target:
    """A web server on loopback that nobody should reach; counts who does."""

    port: int
    hits: list[str] = field(default_factory=list)

    def url(self, host: str = "127.0.0.1", path: str = "/picture.png") -> str:
        """Return an address of it."""
        return f"http://{host}:{self.port}{path}"


def start_ours(stack: ExitStack, folder: Path, *flags: str, name: str = "ours") -> Server:
    """Start ``era-vllm serve``; returns it before it answers."""
    command = [*FORKED, ERA_VLLM, "serve", str(CHECKPOINT), *ENGINE, *flags]
    return stack.enter_context(start_server(name, command, VARIABLES, folder / f"{name}.log"))


def client(server: Server, key: str | None = None) -> httpx.Client:
    """Return a client, with a key in every request."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    once = httpx.Limits(max_keepalive_connections=0)  # behind a 500 uvicorn closes unannounced
    return httpx.Client(
        base_url=server.url, headers=headers, timeout=120, trust_env=False, limits=once
    )


def request(*urls: str, **options: object) -> dict[str, object]:
    """Return the body of a chat request."""
    parts: list[object] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content = [*parts, {"type": "text", "text": "how many shapes?"}]
    messages = [{"role": "user", "content": content}]
    return {"model": "era-sample", "messages": messages, "max_tokens": 4, **options}


def heavy(n: int = 128, **options: object) -> dict[str, object]:
    """Return a request that takes the engine much longer than ``DEADLINE_S``."""
    return request(n=n, **{"max_tokens": 950, "ignore_eos": True, "temperature": 1.0, **options})


def metric(client: httpx.Client, name: str, **labels: str) -> float:
    """Return the sum of a metric's samples that have these labels."""
    text = client.get("/metrics", headers={"Authorization": f"Bearer {METRICS_KEY}"}).text
    lines = re.findall(rf"^{name}(?:{{(.*)}})? (\S+)$", text, re.MULTILINE)
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    return sum(float(value) for found, value in lines if all(each in found for each in wanted))


def picture(width: int = 64, height: int = 48, mode: str = "RGB") -> Image.Image:
    """Return a picture of one colour."""
    return Image.new(mode, (width, height), "red" if mode == "RGB" else None)


def png(image: Image.Image) -> bytes:
    """Return it encoded."""
    with io.BytesIO() as buffer:
        image.save(buffer, "png")
        return buffer.getvalue()


def data_url(image: Image.Image | bytes, kind: str = "image/png") -> str:
    """Return it as a client sends it."""
    data = image if isinstance(image, bytes) else png(image)
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
