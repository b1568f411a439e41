"""Two servers for what an attacker sends: ours with keys and small limits, and stock vLLM.

A pytest plugin: ``pytest_plugins = ["tests.server.guarded"]`` gives the fixtures.
"""

import gzip
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from era_vllm.lab import CHECKPOINT
from era_vllm.lab.servers import wait_for
from tests.forked import FORKED, start_server
from tests.server.attacker import (
    DEADLINE_S,
    ENGINE,
    KEYS,
    MAX_BODY,
    MAX_DATA_URL,
    MAX_PIXELS,
    METRICS_KEY,
    QUEUE,
    QUEUE_TOKENS,
    STOCK,
    VARIABLES,
    Pair,
    Target,
    client,
    picture,
    png,
    start_ours,
)


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Both servers, started at once."""
    folder = tmp_path_factory.mktemp("guarded")
    keys, metrics = folder / "keys", folder / "metrics.key"
    keys.write_text("# two clients\n" + "\n\n".join(KEYS) + "\n")
    metrics.write_text(METRICS_KEY)
    limits = {
        "--era-api-keys-file": keys,
        "--era-metrics-key-file": metrics,
        "--era-request-timeout-s": DEADLINE_S,
        "--era-max-body-bytes": MAX_BODY,
        "--era-max-data-url-bytes": MAX_DATA_URL,
        "--era-max-image-pixels": MAX_PIXELS,
        "--max-num-queued-reqs": QUEUE,
        "--max-num-queued-tokens": QUEUE_TOKENS,
    }
    flags = [str(word) for pair in limits.items() for word in pair]
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("VLLM_")]:
            patch.delenv(name)  # other tests' own
        ours = start_ours(stack, folder, *flags)
        command = [*FORKED, "-c", STOCK, str(CHECKPOINT), *ENGINE, "--api-key", KEYS[0]]
        variables = {**VARIABLES, "VLLM_PLUGINS": "none"}
        stock = stack.enter_context(start_server("stock", command, variables, folder / "stock.log"))
        wait_for([ours, stock])
        clients = [stack.enter_context(client(server, KEYS[0])) for server in (ours, stock)]
        yield Pair(*clients, ours)


@pytest.fixture(scope="session")
def target() -> Iterator[Target]:
    """A web server inside, with a picture, a redirect to it, and too many bytes."""
    data = png(picture())

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802
            found.hits.append(self.path)
            if self.path == "/redirect":
                self.send_response(302)
                self.send_header("Location", found.url())
                self.end_headers()
                return
            body = {"/large": data * 10_000, "/packed": gzip.compress(bytes(9_999_999))}
            self.send_response(404 if self.path == "/missing" else 200)
            self.send_header("Content-Type", "image/png")
            if self.path == "/packed":
                self.send_header("Content-Encoding", "gzip")
            self.end_headers()
            self.wfile.write(body.get(self.path, data))

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found = Target(server.server_address[1])
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield found
        server.shutdown()
