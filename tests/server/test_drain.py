"""SIGTERM under load: every accepted request is answered, new ones are told to go elsewhere."""

import os
import signal
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import pytest

from era_vllm.lab.servers import Server, wait_for
from tests.server.attacker import KEYS, data_url, picture, request, start_ours

pytestmark = pytest.mark.filterwarnings("ignore")
ACCEPTED = 24
NEWCOMERS = 4
TOKENS = 100
DRAIN_S = 60
HEADERS = {"Authorization": f"Bearer {KEYS[0]}"}


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """One with one API server, one with two, started at once."""
    folder = tmp_path_factory.mktemp("drain")
    flags = ["--era-drain-timeout-s", str(DRAIN_S)]
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("VLLM_")]:
            patch.delenv(name)  # other tests' own
        started = {
            count: start_ours(
                stack, folder, *flags, "--api-server-count", str(count), server_name=f"{count}"
            )[0]
            for count in (1, 2)
        }
        wait_for(list(started.values()))
        yield started


def ask(url: str, stream: bool) -> str:
    """Send one request on a connection of its own; returns how it ended."""
    body = request(data_url(picture()), max_tokens=TOKENS, ignore_eos=True, stream=stream)
    with httpx.Client(timeout=120, trust_env=False, headers=HEADERS) as client:
        try:
            reply = client.post(f"{url}/v1/chat/completions", json=body)
        except httpx.ConnectError:
            return "not connected"
        except httpx.TransportError as error:
            return f"no answer: {type(error).__name__}"
    if reply.status_code == 503:
        told = "retry-after" in reply.headers and reply.headers["connection"] == "close"
        return "503" if told else "503 that does not say when to come again"
    if stream and reply.status_code == 200:
        whole = reply.text.endswith("data: [DONE]\n\n") and '"error"' not in reply.text
        return "whole" if whole and reply.text.count("data: ") > TOKENS // 2 else "cut"
    if reply.status_code == 200:
        return "whole" if reply.json()["usage"]["completion_tokens"] == TOKENS else "cut"
    return f"{reply.status_code}: {reply.text[:200]}"


@pytest.mark.parametrize("count", [1, 2])
def test_no_accepted_request_is_lost(servers: dict[int, Server], count: int) -> None:
    server = servers[count]
    late: Counter[str] = Counter()
    stopped = threading.Event()

    def later() -> None:
        how = "503"
        while how == "503" and not stopped.is_set():
            how = ask(server.url, stream=False)
            late[how] += 1

    with ThreadPoolExecutor(ACCEPTED + NEWCOMERS) as pool:
        assert ask(server.url, stream=True) == "whole"
        early = [pool.submit(ask, server.url, number % 2 == 0) for number in range(ACCEPTED)]
        _until_running(server, ACCEPTED)
        started = time.monotonic()
        os.kill(server._process.pid, signal.SIGTERM)
        time.sleep(0.3)
        probes = {path: httpx.get(server.url + path).status_code for path in ("/health", "/ready")}
        newcomers = [pool.submit(later) for _ in range(NEWCOMERS)]
        results = Counter(each.result() for each in early)
        code = server._process.wait(DRAIN_S)
        took = time.monotonic() - started
        stopped.set()
        for each in newcomers:
            each.result()
    print(f"{count} API servers: {dict(results)} of {ACCEPTED}, then {dict(late)}, {took:.1f} s")
    assert results == {"whole": ACCEPTED}
    assert (probes, code) == ({"/health": 200, "/ready": 503}, 0)
    assert late.pop("503") >= NEWCOMERS
    # at the very end the socket closes: a connection that nobody has accepted yet is reset
    assert set(late) <= {"not connected", "no answer: ReadError", "no answer: RemoteProtocolError"}
    assert late.total() <= NEWCOMERS
    assert took < DRAIN_S
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", server.port))


def _until_running(server: Server, wanted: int) -> None:
    """Wait until the engine has so many requests."""
    end = time.monotonic() + 60
    with httpx.Client(trust_env=False) as client:
        key = {"Authorization": "Bearer key-of-prometheus"}
        while time.monotonic() < end:
            text = client.get(f"{server.url}/metrics", headers=key).text
            lines = [line for line in text.splitlines() if line.startswith("vllm:num_requests_")]
            if sum(float(line.split()[-1]) for line in lines) >= wanted:
                return
            time.sleep(0.05)
    raise AssertionError("the requests did not reach the engine")
