"""SIGTERM under load: every accepted request is answered, new ones are told to go elsewhere."""

import os
import re
import signal
import socket
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
TOKENS = 150
DRAIN_S = 150
HEADERS = {"Authorization": f"Bearer {KEYS[0]}"}


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """One with one API server, one with two, started at once; their key is vLLM's own flag."""
    folder = tmp_path_factory.mktemp("drain")
    flags = ["--era-drain-timeout-s", str(DRAIN_S), "--api-key", KEYS[0], "--api-server-count"]
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("VLLM_")]:
            patch.delenv(name)  # other tests' own
        started = {
            count: start_ours(stack, folder, *flags, str(count), name=str(count))
            for count in (1, 2)
        }
        wait_for(list(started.values()))
        yield started


@pytest.mark.parametrize("count", [1, 2])
def test_vllms_own_key_is_asked_for_on_every_path(servers: dict[int, Server], count: int) -> None:
    url = servers[count].url
    for path in ("/v1/models", "/version", "/metrics", "/load", "/v1/era"):
        assert httpx.get(url + path, trust_env=False).status_code == 401
        assert httpx.get(url + path, trust_env=False, headers=HEADERS).status_code == 200
        key = {"x-api-key": KEYS[0]}
        assert httpx.get(url + path, trust_env=False, headers=key).status_code == 200


def ask(url: str, stream: bool) -> str:
    """Send one request on a connection of its own; returns how it ended."""
    body = request(data_url(picture()), max_tokens=TOKENS, ignore_eos=True, stream=stream)
    with httpx.Client(timeout=DRAIN_S, trust_env=False, verify=False, headers=HEADERS) as client:
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
    with ThreadPoolExecutor(ACCEPTED) as pool:
        assert ask(server.url, stream=True) == "whole"
        early = [pool.submit(ask, server.url, number % 2 == 0) for number in range(ACCEPTED)]
        _until_running(server)
        started = time.monotonic()
        os.kill(server.pid, signal.SIGTERM)
        time.sleep(0.3)
        probes = {
            path: httpx.get(server.url + path, trust_env=False).status_code
            for path in ("/health", "/ready")
        }
        late = Counter(ask(server.url, stream=False) for _ in range(NEWCOMERS))
        told = httpx.get(f"{server.url}/metrics", trust_env=False, headers=HEADERS).text
        results = Counter(each.result() for each in early)
        code = server.wait(DRAIN_S)
        took = time.monotonic() - started
    print(f"{count} API servers: {dict(results)}, then {dict(late)}, {took:.1f} s")
    assert set(results) <= {"whole", "503"}  # one that came behind the SIGTERM
    assert results["whole"] >= ACCEPTED // 2
    under_way = re.findall(r"draining: (\d+) requests under way", server.log.read_text())
    assert len(under_way) == count
    assert sum(map(int, under_way)) >= ACCEPTED // 3
    assert (probes, code) == ({"/health": 200, "/ready": 503}, 0)
    assert late == {"503": NEWCOMERS}
    counted = re.findall(r'^era:rejected_requests_total{reason="draining"} (\S+)$', told, re.M)
    assert sum(map(float, counted)) >= NEWCOMERS
    assert took < DRAIN_S
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", server.port))


def _until_running(server: Server) -> None:
    """Wait until the engine works."""
    end = time.monotonic() + 60
    with httpx.Client(trust_env=False) as client:
        while time.monotonic() < end:
            text = client.get(f"{server.url}/metrics", headers=HEADERS).text
            running = re.findall(r"^vllm:num_requests_running{.*} (\S+)$", text, re.MULTILINE)
            if sum(map(float, running)) >= ACCEPTED // 3:
                return
            time.sleep(0.05)
    raise AssertionError("the requests did not reach the engine")
