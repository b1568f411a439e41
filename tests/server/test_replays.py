"""Published attacks on vLLM, replayed against stock vLLM and against ours: one table.

``docs/security.md`` shows the table; a row whose answers change fails here. Some of the attacks
are mended in the vLLM that we run on: then the row says so, and another shows what is left.
"""

import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.server.attacker import MAX_BODY, Pair, Target, data_url, picture, png, request
from tests.server.attacks import inside, pictures

pytest_plugins = ["tests.server.guarded"]
DOCS = Path(__file__).parents[2] / "docs" / "security.md"


@dataclass(frozen=True)
class Replay:
    """One attack: what it sends, and what each of the two answers."""

    issue: str
    attack: str
    send: Callable[[httpx.Client, Target], str]
    stock: str
    ours: str
    mended: bool = False
    """vLLM itself has mended it: both answers are harmless."""

    def row(self) -> str:
        """Return its row of the table."""
        return f"| {self.issue} | {self.attack} | {self.stock} | {self.ours} |"


def answer(reply: httpx.Response) -> str:
    """Return what matters of an answer."""
    if reply.status_code == 200:
        return "200"
    message = str(reply.json()["error"])
    leaks = [word for word in ("BytesIO", "allowed-local-media-path", "resolve") if word in message]
    return f"{reply.status_code}" + (f", says `{leaks[0]}`" if leaks else "")


def fetch(*names: str) -> Callable[[httpx.Client, Target], str]:
    """Ask about pictures of a server inside, each address written in one way."""

    def send(client: httpx.Client, target: Target) -> str:
        before, answers = len(target.hits), set[str]()
        for name in names:
            body = request(inside(target.port)[name])
            answers.add(answer(client.post("/v1/chat/completions", json=body)))
        return f"{' or '.join(sorted(answers))}; {len(target.hits) - before} requests inside"

    return send


def show(url: str) -> Callable[[httpx.Client, Target], str]:
    """Ask about a picture."""

    def send(client: httpx.Client, _: Target) -> str:
        return answer(client.post("/v1/chat/completions", json=request(url)))

    return send


def without_key(path: str, host: str = "x") -> Callable[[httpx.Client, Target], str]:
    """Ask without a key, with a Host header of our own making."""

    def send(client: httpx.Client, _: Target) -> str:
        content = b'{"model": "era-sample", "prompt": "a", "max_tokens": 1}'
        head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
        with socket.create_connection(("127.0.0.1", client.base_url.port or 0), 60) as wire:
            wire.sendall(head.encode() + content)
            return wire.recv(65536).split(b" ")[1].decode()

    return send


def large(client: httpx.Client, _: Target) -> str:
    """Send a body that is not even JSON."""
    return answer(client.post("/v1/chat/completions", content=b"x" * (8 * MAX_BODY)))


SSRF, PARSER = "GHSA-3f6c-7fw2-ppm4", "CVE-2026-24779"
AUTH, LEAK, SIZE = "CVE-2026-48746", "CVE-2026-22778", "CVE-2026-22773"
WAYS = ("backslash", "backslash behind", "user", "fragment", "query", "tab")
REPLAYS = [
    Replay(
        SSRF,
        "picture at an allowed name whose address is loopback",
        fetch("a name for it"),
        "200; 1 requests inside",
        "400; 0 requests inside",
    ),
    Replay(
        SSRF,
        "redirect from there to an address that is not allowed",
        fetch("redirect"),
        "200; 2 requests inside",
        "400; 0 requests inside",
    ),
    Replay(
        PARSER,
        "six addresses that two parsers read differently",
        fetch(*WAYS),
        "400 or 500; 0 requests inside",
        "400; 0 requests inside",
    ),
    Replay(
        AUTH,
        "`Host: x/health?` on /v1/completions, no key",
        without_key("/v1/completions", "x/health?"),
        "401",
        "401",
        mended=True,
    ),
    Replay(AUTH, "/invocations generates, no key", without_key("/invocations"), "200", "401"),
    Replay(AUTH, "/tokenize, no key", without_key("/tokenize"), "200", "401"),
    Replay(LEAK, "a picture of zeros", show(pictures()["zeros"]), "400, says `BytesIO`", "400"),
    Replay(LEAK, "one that says 2 gigapixels", show(pictures()["2 gigapixels"]), "500", "400"),
    Replay(
        LEAK,
        "`file:///etc/passwd`",
        show("file:///etc/passwd"),
        "500, says `allowed-local-media-path`",
        "400, says `allowed-local-media-path`",
    ),
    Replay(SIZE, "a picture of 1 x 1", show(data_url(picture(1, 1))), "200", "200", mended=True),
    Replay(
        SIZE,
        "3000 x 1, which is scaled to 504000 x 168",
        show(data_url(png(picture(3000, 1)))),
        "200",
        "400",
    ),
    Replay("", "a body of 8 MB that is no JSON (our limit here: 1 MB)", large, "400", "413"),
]


@pytest.mark.parametrize("replay", REPLAYS, ids=lambda replay: replay.attack)
def test_replay(pair: Pair, target: Target, replay: Replay) -> None:
    found = replay.send(pair.stock, target), replay.send(pair.ours, target)
    print(f"| {replay.issue} | {replay.attack} | {found[0]} | {found[1]} |")
    assert found == (replay.stock, replay.ours)
    assert replay.mended == (replay.stock == replay.ours)


def test_both_live_on(pair: Pair) -> None:
    assert pair.alive()
    assert pair.chat(pair.stock, data_url(picture())).status_code == 200


def test_the_table_of_the_docs() -> None:
    text = DOCS.read_text(encoding="utf-8")
    assert [replay.row() for replay in REPLAYS if replay.row() not in text] == []
