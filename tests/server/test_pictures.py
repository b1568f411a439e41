"""What a viewer shows of a picture is what the model is given, and no picture keeps us for long.

The table of formats, as docs/security.md tells to print it: ``pytest -s -k table`` of this file.
"""

import asyncio
import base64
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from vllm.exceptions import GracefulHTTPError
from vllm.multimodal.image import ALLOWED_IMAGE_FORMATS
from vllm.multimodal.media.image import ImageMediaIO

from era_vllm import pictures
from era_vllm.pictures import RefusedError, Wanted
from era_vllm_server import decoders
from tests.server.asking import CHAT, MESSAGES, MODEL, RESPONSES, chat_body, post
from tests.server.attacker import data_url, picture, png
from tests.server.formats import DEFAULTS, by_setting, encoded, formats

CLOSE = 2
"""Mean difference, of 255, of what a lossy format may do."""
Image.init()


def wanted(formats=DEFAULTS, max_pixels=2**25, mode="RGB"):
    return Wanted(formats, ALLOWED_IMAGE_FORMATS, max_pixels, mode, (255, 255, 255))


def apart(one, other):
    one, other = (np.asarray(each.convert("RGB")).astype(int) for each in (one, other))
    return np.abs(one - other).mean()


@pytest.mark.parametrize(
    ("allowed", "name"),
    [(DEFAULTS, name) for name in formats()] + [("TIFF", name) for name in by_setting()],
)
def test_what_a_viewer_shows_is_what_is_decoded(allowed, name):
    data, shown = (formats() if allowed == DEFAULTS else by_setting())[name]
    if isinstance(shown, str):
        with pytest.raises(RefusedError) as error:
            pictures.decode(data, wanted(allowed))
        assert shown in str(error.value)
        return
    found, _ = pictures.decode(data, wanted(allowed))
    assert (found.mode, found.size) == ("RGB", shown.size)
    assert apart(found, shown) < CLOSE


NOT_STOCKS = {
    "PNG, grey of 16 bits",  # white there
    "PNG, wrong checksum of a text",  # these are a 400 there
    "PNG, text of 20 MB",
    "JPEG, without its last 2 bytes",
    "JPEG, progressive, without its last 2 bytes",
}


@pytest.mark.parametrize("mode", ["RGB", None])
def test_all_others_are_stocks_to_the_pixel(mode):
    io = ImageMediaIO(image_mode=mode)
    for name, (data, shown) in formats().items():
        if isinstance(shown, str) or name in NOT_STOCKS:
            continue
        found, changed = pictures.decode(data, wanted(mode=mode))
        stock = io.load_bytes(data)
        if mode or stock.media.mode != "P":  # whose colours are not in its pixels
            assert found.mode == stock.media.mode, name
            assert found.tobytes() == stock.media.tobytes(), name
            assert changed == (stock.io_config is not None), name


def scans(side, count):
    """A JPEG whose last scan comes so often again; each takes 0.1 s at a side of 5792."""
    jpeg = encoded(Image.new("RGB", (side, side), (90, 20, 200)), "jpeg", progressive=True)
    last = jpeg[jpeg.rindex(b"\xff\xc4", 0, jpeg.rindex(b"\xff\xda")) : -2]
    return jpeg[:-2] + last * count + b"\xff\xd9"


BOMB = scans(5792, 450)


def test_parts_are_counted_before_they_are_decoded():
    whole, jpeg = png(picture()), encoded(picture(), "jpeg")
    empty = struct.pack(">I4sI", 0, b"teSt", zlib.crc32(b"teSt"))
    for data, said in (
        (scans(5792, 1500), "its JPEG has 1510 scans, allowed are 500"),
        (whole[:33] + empty * 300_000 + whole[33:], "has more chunks than the 16384"),
        (jpeg[:2] + b"\xff" * 1_000_000 + jpeg[2:], "has 1000000 fill bytes, allowed are 131072"),
    ):
        with pytest.raises(RefusedError, match=said):
            pictures.decode(data, wanted())
    filled = jpeg[:2] + b"\xff" * 1000 + jpeg[2:]
    for data in (scans(64, 400), whole[:33] + empty * 9000 + whole[33:], filled):
        assert pictures.decode(data, wanted())[0].width == 64


def ask(pool, data, limit_s=60.0, **options):
    return pool.decode(data, wanted(**options), abs, lambda *_: None, limit_s)


def children(pid):
    """Processes for pictures of one, that are not dead."""
    found = set()
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = dict(
                line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line
            )
            command = (status.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if int(lines["PPid"]) == pid and b"era_vllm.pictures" in command:
            found.add(int(lines["Pid"]))
    return found


def wait_until(true, seconds=30):
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


@contextmanager
def none_left():
    """Give what says which processes a test has; it is to have none at its end."""
    before = children(os.getpid())
    yield lambda: children(os.getpid()) - before
    assert children(os.getpid()) == before


async def closed(pool):
    """End what idles."""
    while not pool._free.empty():
        if (process := pool._free.get_nowait()) is not None:
            process.end()


def test_a_picture_that_takes_too_long_is_ended_and_the_next_one_served():
    async def run():
        pool = decoders.Decoders(1)
        await ask(pool, png(picture()))
        (first,) = now()
        with pytest.raises(RefusedError, match="it takes too long to decode, allowed are 0.5 s"):
            await ask(pool, BOMB, 0.5)
        assert not now() and not Path(f"/proc/{first}").exists()
        found, changed = await ask(pool, png(picture(mode="L")))
        assert (found.size, found.mode, changed) == ((64, 48), "RGB", True)
        await closed(pool)

    with none_left() as now:
        asyncio.run(run())


def test_a_picture_whose_request_ends_is_ended():
    async def run():
        pool = decoders.Decoders(2)
        task = asyncio.create_task(ask(pool, BOMB))
        while not now():
            await asyncio.sleep(0.05)
        await asyncio.sleep(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not now()
        assert pool._free.qsize() == 2

    with none_left() as now:
        asyncio.run(run())


def test_who_waits_too_long_for_others_is_to_come_again():
    async def run():
        pool = decoders.Decoders(1)
        bomb = asyncio.create_task(ask(pool, BOMB))
        await asyncio.sleep(0)
        with pytest.raises(GracefulHTTPError, match="waited 0.2 s for others") as error:
            await ask(pool, png(picture()), 0.2)
        assert error.value.http_status == 503
        bomb.cancel()
        await asyncio.wait((bomb,))

    with none_left():
        asyncio.run(run())


def test_a_process_that_dies_or_does_not_start_is_said(monkeypatch):
    async def run():
        pool = decoders.Decoders(1)
        await ask(pool, png(picture()))
        task = asyncio.create_task(ask(pool, BOMB))
        await asyncio.sleep(1)
        os.kill(*now(), signal.SIGSEGV)
        with pytest.raises(RefusedError, match="decoding it ended the process"):
            await task
        monkeypatch.setattr(decoders, "_COMMAND", (sys.executable, "-c", "import missing"))
        with pytest.raises(GracefulHTTPError, match="no process could be started"):
            await ask(pool, png(picture()))

    with none_left() as now:
        asyncio.run(run())


def test_an_idle_process_that_was_ended_is_no_pictures_fault():
    with none_left() as processes:
        pool = decoders.Decoders(1)

        async def run():
            await ask(pool, png(picture()))
            (process,) = processes()
            os.kill(process, signal.SIGKILL)
            wait_until(lambda: not processes())
            picture_, _ = await ask(pool, png(picture()))
            assert picture_.width == 64 and processes() != {process}
            await closed(pool)

        asyncio.run(run())


def test_a_process_that_does_not_start_keeps_no_file(monkeypatch):
    pool, before = decoders.Decoders(1), len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(decoders.subprocess, "Popen", lambda *_, **__: os.open("/none/such", 0))
    for _ in range(5):
        with pytest.raises(GracefulHTTPError):
            asyncio.run(ask(pool, png(picture())))
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_memory_is_bounded_also_before_the_pixels_are_known():
    """A WEBP's decoder takes memory for them when the file is opened."""
    data = encoded(Image.new("RGB", (9000, 9000)), "webp", quality=0, method=0)

    async def run():
        pool = decoders.Decoders(1)
        with pytest.raises(RefusedError):
            await ask(pool, data, max_pixels=2**20)
        (child,) = now()
        peak = Path(f"/proc/{child}/status").read_text().split("VmPeak:")[1].split()[0]
        assert int(peak) < 500_000  # and 750,000 without
        assert (await ask(pool, png(picture())))[0].size == (64, 48)
        await closed(pool)

    with none_left() as now:
        asyncio.run(run())


def test_they_end_with_their_parent():
    """Also the one that is at it, and by SIGKILL, of which the parent can say nothing."""
    script = """if True:
        import os, socket, subprocess, sys
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        memory = os.memfd_create("picture")
        shared = theirs.fileno(), memory
        process = subprocess.Popen((*sys.argv[2:], *map(str, shared)), pass_fds=shared)
        ours.recv(9)
        data, message = open(sys.argv[1], "rb").read().split(b"|", 1)[::-1]
        os.pwrite(memory, data, 0)
        ours.send(message)
        ours.recv(99)
        ours.send(b"1")
        print(process.pid, flush=True)
        ours.recv(9)
    """
    asked = json.dumps((len(BOMB), wanted())).encode() + b"|" + BOMB
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"bomb-{os.getpid()}"
    path.write_bytes(asked)
    command = [sys.executable, "-c", script, str(path), *decoders._COMMAND]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        time.sleep(1)
        assert children(parent.pid) == {child}
        parent.kill()
    path.unlink()
    wait_until(lambda: not alive(child), 5)


def alive(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


# ---- with the real server ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(servers):
    return servers[0]


def url_of(data):
    """As people send it: nothing in it says what it is."""
    return "data:application/octet-stream;base64," + base64.b64encode(data).decode()


def inspected(server, url):
    """What the model is given, by inspect's left panel, or the words of its refusal."""
    body = {"image_url": url, "era": {"level": "strong"}}
    reply = post(server, "/v1/era/inspect", body)
    if reply.status_code != 200:
        return reply.status_code, reply.json()["error"]["message"]
    sheet = base64.b64decode(reply.json()["picture"].partition(",")[2])
    return 200, Image.open(io.BytesIO(sheet)).crop((24, 84, 24 + 720, 84 + 720))


def answered(server, url):
    part = {"type": "image_url", "image_url": {"url": url}}
    reply = post(server, CHAT, chat_body(part))
    if reply.status_code != 200:
        return reply.status_code, reply.json()["error"]["message"]
    return 200, reply.json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_table_of_formats(server, every):
    """Each file by inspect and by chat, beside a plain PNG of what a viewer shows."""
    references, wrong = {}, []
    print(f"\n| {'file':44} | inspect | difference | chat |")
    for name, (data, shown) in list(formats().items())[::every]:
        url = url_of(data)
        (seen, given), (said, text) = inspected(server, url), answered(server, url)
        difference = ""
        if isinstance(shown, str):
            right = seen == said == 400 and shown in given and shown in text
        else:
            plain = url_of(encoded(shown.convert("RGB"), "png"))
            if plain not in references:
                references[plain] = inspected(server, plain)[1], answered(server, plain)[1]
            like, words = references[plain]
            right = seen == said == 200
            if right:
                difference = apart(given, like)
                right = difference < CLOSE and text == words
                difference = f"{difference:.2f}"
        print(f"| {name:44} | {seen:7} | {difference:>10} | {said} | {'' if right else 'WRONG'}")
        wrong += [] if right else [name]
    assert not wrong


KINDS = {
    "chat": lambda part: (CHAT, {"messages": [{"role": "user", "content": [part]}]}),
    "responses": lambda part: (RESPONSES, {"input": [{"role": "user", "content": [part]}]}),
    "messages": lambda part: (
        MESSAGES,
        {"messages": [{"role": "user", "content": [part]}], "max_tokens": 4},
    ),
    "tokenize": lambda part: ("/tokenize", {"messages": [{"role": "user", "content": [part]}]}),
}


@pytest.mark.parametrize("route", KINDS)
@pytest.mark.parametrize(
    "source", ["http://127.0.0.1:1/a", "data:video/mp4;base64,AAAA", "file:///a"]
)
def test_a_video_or_audio_is_one_clear_400(server, route, source):
    for part in (
        {"type": "video_url", "video_url": {"url": source}},
        {"type": "audio_url", "audio_url": {"url": source}},
    ):
        path, body = KINDS[route](part)
        reply = post(server, path, {"model": MODEL, **body})
        message = reply.json()["error"]["message"]
        start = f"{part['type']}: got it in a message, but this model takes text and pictures only"
        assert (reply.status_code, message.startswith(start)) == (400, True), message


@pytest.mark.parametrize("route", ["chat", "responses", "messages"])
def test_a_refused_picture_is_the_answer_wherever_it_stands(server, route):
    """The others are let go of; vLLM raises what the first of them in order ended by."""
    junk = "data:image/png;base64,AAAA"
    urls = [data_url(picture(40 + at)) for at in range(4)]
    for at in (0, 2, 4):
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        parts.insert(at, {"type": "image_url", "image_url": {"url": junk}})
        content = [*parts, {"type": "text", "text": "?"}]
        if route == "responses":
            content = [{"type": "input_image", "image_url": p["image_url"]["url"]} for p in parts]
        if route == "messages":
            content = [{"type": "image", "source": source_of(p)} for p in parts]
        path, body = KINDS[route](None)
        (message,) = body.get("messages") or body["input"]
        message["content"] = content
        reply = post(server, path, {"model": MODEL, **body})
        assert reply.status_code == 400, reply.text
        assert reply.json()["error"]["message"].startswith("the picture is refused"), reply.text


def source_of(part):
    """A picture as Anthropic's clients send it."""
    data = part["image_url"]["url"].partition(",")[2]
    return {"type": "base64", "media_type": "image/png", "data": data}


def test_who_leaves_ends_the_decoding(server):
    api = [pid for pid in tree(server.pid) if children(pid)] or [server.pid]
    body = chat_body({"type": "image_url", "image_url": {"url": url_of(BOMB)}})
    with pytest.raises(httpx.TimeoutException):
        httpx.post(server.url + CHAT, json=body, timeout=3)
    wait_until(
        lambda: not any(busy(child) for pid in tree(server.pid) for child in children(pid)), 5
    )
    assert answered(server, data_url(picture()))[0] == 200
    assert api


def tree(pid):
    """A process and those below it."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(status.parent.name))
    found, todo = [], [pid]
    while todo:
        found.append(todo.pop())
        todo += parents.get(found[-1], [])
    return found


def busy(pid):
    """Whether a process has run within half a second."""

    def ticks():
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11]
        except OSError:
            return None

    before = ticks()
    time.sleep(0.5)
    return ticks() != before


@pytest.mark.slow
def test_bombs_of_one_client_do_not_end_everybody_elses_pictures(server):
    bomb = {"type": "image_url", "image_url": {"url": url_of(BOMB)}}
    with ThreadPoolExecutor(8) as many:
        sent = [many.submit(post, server, CHAT, chat_body(bomb)) for _ in range(8)]
        time.sleep(1)
        others = Counter()
        while not all(each.done() for each in sent):
            others[answered(server, data_url(picture()))[0]] += 1
        bombs = Counter(each.result().status_code for each in sent)
    assert bombs == {400: 8} and set(others) <= {200, 503}
    assert answered(server, data_url(picture()))[0] == 200


def test_a_small_body_does_not_fill_the_memory(server):
    """16 pictures of one bit a pixel, 88 KB in all, that were 2.4 GB before anybody was asked."""
    part = {"type": "image_url", "image_url": {"url": data_url(png(Image.new("1", (5792, 5792))))}}
    process = Path(f"/proc/{server.pid}")
    (process / "clear_refs").write_text("5")  # the peak begins anew
    before = peak_mb(process)
    reply = post(server, CHAT, chat_body(*[part] * 16))
    assert reply.status_code == 400, reply.text
    assert "allowed are 134217728 in all" in reply.json()["error"]["message"]
    grown = peak_mb(process) - before
    print(f"16 pictures of 2^25 pixels: {grown:.0f} MB more at the peak")
    assert grown < 1000
    assert post(server, CHAT, chat_body(part)).status_code == 200


def peak_mb(process):
    found = re.search(r"VmHWM:\s+(\d+) kB", (process / "status").read_text())
    return int(found[1]) / 1000
