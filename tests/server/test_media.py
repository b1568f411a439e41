"""The media connector: what it loads, what it refuses, and that refusals say nothing of us."""

import asyncio
import gc
import os
import re
import socket
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from aiohttp import abc, resolver
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector

from era_vllm.vllm_plugin.requests import request_context
from era_vllm_server import addresses, media
from era_vllm_server.front import CONNECTOR
from tests.server.attacker import ALLOWED_DOMAIN, MAX_DATA_URL, MAX_PIXELS, data_url, picture, png
from tests.server.attacks import SERVED, inside, pictures
from tests.server.test_pictures import BOMB, busy, children, wait_until

pytest_plugins = ["tests.server.guarded"]
LEAK = re.compile(r"0x[0-9a-f]{6}|object at|/\w+/\w+|Errno|127\.|localhost|BytesIO|\.py|Traceback")


@pytest.fixture(autouse=True)
def _limits(monkeypatch):
    monkeypatch.setenv("ERA_MAX_IMAGE_PIXELS", str(MAX_PIXELS))
    monkeypatch.setenv("ERA_MAX_DATA_URL_BYTES", str(MAX_DATA_URL))
    monkeypatch.setattr(media, "_download_limit", lambda: 2**20)  # an engine here froze vLLM's


def connector(**options):
    return MEDIA_CONNECTOR_REGISTRY.load(CONNECTOR, **options)


def load(connector, url, way):
    if way == "sync":
        return connector.fetch_image(url)
    return asyncio.run(connector.fetch_image_async(url))


both_ways = pytest.mark.parametrize("way", ["async", "sync"])


@contextmanager
def refusal(said=""):
    with pytest.raises(VLLMValidationError, match=said) as error:
        yield
    assert not LEAK.search(str(error.value)), str(error.value)


@both_ways
@pytest.mark.parametrize("name", pictures())
def test_a_picture_is_served_or_refused(name, way):
    url = pictures()[name]
    if name in SERVED:
        loaded = load(connector(), url, way)
        assert loaded.media.mode == "RGB"
        assert loaded.media.width * loaded.media.height <= MAX_PIXELS
    else:
        with refusal("the picture is refused: "):
            load(connector(), url, way)


def test_what_a_refusal_says():
    for name, said in {
        "2 gigapixels": "50000 x 40000 pixels, allowed are 1048576",
        "bomb below PIL's bound": "12000 x 12000 pixels, allowed are 1048576",
        "201 x 1": "allowed is 1 : 200",
        "TIFF": "its format is TIFF, allowed are PNG,JPEG",
        "SVG as SVG": "its format is SVG, allowed are PNG,JPEG",
        "too long": f"400022 bytes long, allowed are {MAX_DATA_URL}",
        "truncated PNG": "bytes are no whole PNG: truncated, or damaged",
        "no base64": "not of the form data:TYPE;base64,DATA",
        "percent-encoded base64": r"is not base64: it holds '%' \(percent-encoded: undo that\)",
    }.items():
        with refusal(said):
            load(connector(), pictures()[name], "async")


def test_base64_as_people_send_it():
    plain = data_url(picture()).partition(",")[2]
    lines = "\r\n".join(plain[at : at + 76] for at in range(0, len(plain), 76))
    kinds = ("", "image", "undefined", "image/png;charset=utf-8", "application/octet-stream")
    for url in (f"data:;base64,{lines}\r\n", *(f"data:{kind};base64,{plain}" for kind in kinds)):
        assert load(connector(), url, "async").media.size == (64, 48)
    odd = plain.rstrip("=")[:-1]
    for text, said in {
        plain[:9] + "-" + plain[10:]: "holds '-' \\(the alphabet of URLs",
        plain[:9] + "_" + plain[10:]: "holds '_' \\(the alphabet of URLs",
        plain[:9] + "%2B" + plain[10:]: "holds '%' \\(percent-encoded",
        f"b'{plain}'": "Python's b'...'",
        odd + "=" * (len(odd) % 4 == 0): f"it has {len(odd)} characters, needed a multiple of 4",
        plain[:9] + "\ud800" + plain[10:]: "holds ",
    }.items():
        with refusal(f"what follows ;base64, is not base64: .*{said}"):
            load(connector(), f"data:image/png;base64,{text}", "async")


def test_other_media_are_refused_before_they_are_fetched(target, loopback_is_public):
    """No family takes audio; vLLM's own answer, where a model takes none, comes before this one."""
    hits = len(target.hits)
    allowed = connector(allowed_media_domains=["localhost"], allowed_local_media_path="/")
    said = "the audio is refused: this server takes text, pictures and videos only"
    for url in (target.url("localhost"), "file:///etc/passwd", data_url(picture(), "audio/wav")):
        with refusal(said):
            allowed.fetch_audio(url)
        with refusal(said):
            asyncio.run(allowed.fetch_audio_async(url))
    assert len(target.hits) == hits


def test_a_picture_has_the_hash_that_it_has_in_vllm(monkeypatch):
    """The caches go by it: the bytes, and what was made of them."""
    for mode in ("RGB", "RGBA"):
        url = data_url(picture(mode=mode))
        ours, stock = (each.fetch_image(url) for each in (connector(), MediaConnector()))
        assert (ours.original_bytes, ours.io_config) == (stock.original_bytes, stock.io_config)
        assert MultiModalHasher.hash_kwargs("sha256", image=ours) == (
            MultiModalHasher.hash_kwargs("sha256", image=stock)
        )
    green = {"image": {"rgba_background_color": [0, 255, 0]}}
    clear = connector(media_io_kwargs=green).fetch_image(data_url(picture(mode="RGBA")))
    assert clear.media.getpixel((0, 0)) == (0, 255, 0)


def test_a_cancelled_load_ends_its_decoding(monkeypatch):
    """As when the client leaves; and the other pictures of a request that is refused."""
    monkeypatch.setenv("ERA_MAX_IMAGE_PIXELS", str(2**26))
    monkeypatch.setenv("ERA_MAX_DATA_URL_BYTES", str(2**20))
    bomb = data_url(BOMB, "image/jpeg")

    async def leave():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(connector().fetch_image_async(bomb), 2)

    for each in (leave(), together(bomb, bomb, "gopher://x")):
        began = time.monotonic()
        asyncio.run(each)
        wait_until(lambda: not any(busy(child) for child in children(os.getpid())), 5)
        assert time.monotonic() - began < 10  # it would take half a minute


def test_formats_are_a_setting(monkeypatch):
    monkeypatch.setenv("ERA_IMAGE_FORMATS", "tiff, png")
    assert load(connector(), pictures()["TIFF"], "async").media.size == (64, 48)
    with refusal("its format is JPEG"):
        load(connector(), pictures()["CMYK JPEG"], "async")


@both_ways
def test_without_allowed_domains_no_url_is_fetched(target, way):
    hits = len(target.hits)
    with refusal("--allowed-media-domains is not set"):
        load(connector(), "http://example.com/a.png", way)
    for url in inside(target.port).values():
        with refusal():
            load(connector(), url, way)
    assert len(target.hits) == hits


@both_ways
def test_an_allowed_domain_at_an_inner_address_is_not_connected_to(target, way):
    """Nor is any other way to write it."""
    hits = len(target.hits)
    for url in inside(target.port).values():
        with refusal():
            load(connector(allowed_media_domains=[ALLOWED_DOMAIN]), url, way)
    assert len(target.hits) == hits


def test_stock_vllm_does_connect(target, monkeypatch):
    """What the test above holds against; the target counts."""
    monkeypatch.setenv("NO_PROXY", "*")
    hits = len(target.hits)
    stock = MediaConnector(allowed_media_domains=[ALLOWED_DOMAIN])
    for name in ("a name for it", "redirect", "upper case"):
        load(stock, inside(target.port)[name], "sync")
    assert len(target.hits) - hits == 4


class Rebinding(abc.AbstractResolver):
    """A name server that says a public address first, and an inner one from then on."""

    answers = 0

    def __init__(self, **_):
        """Take what aiohttp gives."""

    async def resolve(self, host, port=0, family=socket.AF_INET):
        type(self).answers += 1
        address = "8.8.8.8" if self.answers == 1 else "127.0.0.1"
        found = {"hostname": host, "host": address, "port": port, "family": socket.AF_INET}
        return [{**found, "proto": 0, "flags": 0}]

    async def close(self):
        """Nothing to close."""


def test_a_name_that_changes_its_address_gains_nothing(target, monkeypatch):
    """The address that is connected to is checked, whatever was resolved before."""
    monkeypatch.setattr("aiohttp.connector.DefaultResolver", Rebinding)
    assert resolver.DefaultResolver is not Rebinding
    Rebinding.answers = 1
    hits = len(target.hits)
    with refusal("could not be fetched from a public address"):
        load(connector(allowed_media_domains=["rebind.example"]), "http://rebind.example/", "async")
    assert (Rebinding.answers, len(target.hits)) == (2, hits)


class Inner(Rebinding):
    """A name server of an attacker's, or a split one: names of addresses that are inside."""

    async def resolve(self, host, port=0, family=socket.AF_INET):
        (found,) = await super().resolve(host, port, family)
        return [{**found, "host": host.removesuffix(".example").replace("-", ".")}]


@pytest.mark.parametrize("address", ["169.254.169.254", "10.1.2.3", "192.168.1.1", "100.64.0.1"])
@both_ways
def test_an_allowed_name_of_metadata_or_a_private_network_is_not_connected_to(
    address, way, monkeypatch
):
    """Nor the address itself; both are on the list, and refused where the socket is made."""
    said = []

    def checked(info):
        try:
            return addresses.public_socket(info)
        except addresses.NotPublicError:
            said.append(info[4][0])
            raise

    monkeypatch.setattr(media, "public_socket", checked)
    monkeypatch.setattr("aiohttp.connector.DefaultResolver", Inner)
    for host in (address, address.replace(".", "-") + ".example"):
        with refusal("could not be fetched from a public address"):
            load(connector(allowed_media_domains=[host]), f"http://{host}/latest/", way)
    assert said == [address] * 2


@pytest.fixture
def loopback_is_public(monkeypatch):
    monkeypatch.setattr(addresses, "is_public", lambda address: address == "127.0.0.1")


@both_ways
def test_a_public_address_of_an_allowed_domain_is_fetched(target, loopback_is_public, way):
    """With loopback declared public, since tests have no network."""
    allowed = connector(allowed_media_domains=["LOCALHOST"])
    assert load(allowed, target.url("localhost"), way).media.size == (64, 48)
    assert target.hits[-1] == "/picture.png"
    hits = len(target.hits)
    with refusal("not of a domain"):
        load(allowed, target.url("127.0.0.1"), way)
    assert len(target.hits) == hits
    for path, said in {
        "/redirect": "answers 302",
        "/missing": "answers 404",
        "/large": "more than 1048576 bytes",
        "/packed": "its format is not known",
    }.items():
        with refusal(said):
            load(allowed, target.url("localhost", path), way)
    assert target.hits[hits:] == ["/redirect", "/missing", "/large", "/packed"]  # no second try


def test_a_proxy_is_not_asked(target, loopback_is_public, monkeypatch):
    """It would connect for us, to any address."""
    monkeypatch.setenv("http_proxy", target.url(path=""))
    monkeypatch.setenv("no_proxy", "")
    hits = len(target.hits)
    with refusal("could not be fetched"):
        load(connector(allowed_media_domains=["a.invalid"]), "http://a.invalid/a.png", "async")
    assert len(target.hits) == hits


def test_nobody_listening_is_a_refusal(loopback_is_public):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://localhost:{probe.getsockname()[1]}/"
        with refusal("could not be fetched"):
            load(connector(allowed_media_domains=["localhost"]), url, "async")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "allowed"
    root.mkdir()
    for file in (root / "in side.png", tmp_path / "outside.png"):
        file.write_bytes(png(picture()))
    (root / "link.png").symlink_to(tmp_path / "outside.png")
    (root / "text.png").write_text("secret")
    return root


@both_ways
def test_files_are_refused_unless_a_folder_is_allowed(folder, way):
    inner = f"file://{folder}/in%20side.png"
    with refusal("--allowed-local-media-path is not set"):
        load(connector(), inner, way)
    allowed = connector(allowed_local_media_path=str(folder))
    assert load(allowed, inner, way).media.size == (64, 48)
    for path in ("../outside.png", "link.png", "absent.png", "", "%2e%2e/outside.png", "text.png"):
        with refusal():
            load(allowed, f"file://{folder}/{path}", way)
    for url in (f"file://host{folder}/in%20side.png", "file:///etc/passwd", "file:///dev/zero"):
        with refusal("no such file"):
            load(allowed, url, way)


async def together(*urls):
    """Load as vLLM does for one request: at once, each picture in a task of its own."""
    with request_context():
        loads = (connector().fetch_image_async(url) for url in urls)
        return await asyncio.gather(*loads, return_exceptions=True)


def test_refusals_are_counted_once_a_request():
    before = media.REJECTED.labels("media")._value.get()
    for urls in (["gopher://x"], ["gopher://x", *[pictures()["zeros"]] * 15]):
        first, *others = asyncio.run(together(*urls))
        assert isinstance(first, VLLMValidationError)
        ends = (VLLMValidationError, asyncio.CancelledError)  # begun before, or after
        assert all(isinstance(one, ends) for one in others)
    assert media.REJECTED.labels("media")._value.get() - before == 2


@pytest.fixture
def held(monkeypatch):
    """What the connectors of a test hold."""
    counted = media.Held()
    monkeypatch.setattr(media, "_HELD", counted)
    monkeypatch.setenv("ERA_MAX_REQUEST_PIXELS", "20000")
    return counted


def test_the_pictures_of_a_request_have_so_many_pixels_together(held):
    url = data_url(picture(100, 80))
    assert len([one for one in asyncio.run(together(url, url)) if one.width == 100]) == 2
    found = asyncio.run(together(*[url] * 4))
    (over,) = {str(one) for one in found if isinstance(one, VLLMValidationError)}
    said = "with it the request's pictures have 24000 pixels, allowed are 20000 in all"
    assert said in over  # and the fourth is not waited for
    assert load(connector(), url, "sync").width == 100  # another request


def test_all_requests_hold_so_many_pixels_until_nobody_needs_them(held):
    url = data_url(picture(100, 100))
    kept = [asyncio.run(together(url, url)) for _ in range(8)]
    assert not any(isinstance(one, Exception) for request in kept for one in request)
    (full,) = asyncio.run(together(url))
    assert isinstance(full, GracefulHTTPError) and full.http_status == 503
    assert not LEAK.search(str(full))
    del kept[0]
    gc.collect()
    assert asyncio.run(together(pictures()["truncated PNG"]))  # counted, and not for ever
    kept += [asyncio.run(together(url, url))]
    assert not any(isinstance(one, Exception) for one in kept[-1])
    (full,) = asyncio.run(together(url))
    assert isinstance(full, GracefulHTTPError)


# ---- with the real server ----------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in pictures() if name != "surrogate"])
def test_over_http_a_picture_is_served_or_a_400(pair, name):
    url = pictures()[name]
    reply = pair.chat(pair.ours, url)
    assert reply.status_code == (200 if name in SERVED else 400), reply.text
    if reply.status_code == 400:
        assert not LEAK.search(reply.json()["error"]["message"]), reply.text


def test_over_http_the_other_routes_refuse_alike(pair):
    bad, good = pictures()["2 gigapixels"], data_url(picture())
    for url, status in ((bad, 400), (good, 200)):
        part = {"type": "input_image", "image_url": url, "detail": "auto"}
        question = {"type": "input_text", "text": "how many shapes?"}
        messages = [{"role": "user", "content": [part, question]}]
        body = {"model": "era-sample", "input": messages, "max_output_tokens": 4}
        assert pair.ours.post("/v1/responses", json=body).status_code == status
        source = {"type": "base64", "media_type": "image/png", "data": url.partition(",")[2]}
        content = [{"type": "image", "source": source}, {"type": "text", "text": "what?"}]
        messages = [{"role": "user", "content": content}]
        body = {"model": "era-sample", "messages": messages, "max_tokens": 4}
        reply = pair.ours.post("/v1/messages", json=body)
        assert reply.status_code == status, reply.text


def test_over_http_nothing_inside_is_connected_to(pair, target):
    hits = len(target.hits)
    for url in inside(target.port).values():
        reply = pair.chat(pair.ours, url)
        assert reply.status_code == 400, reply.text
    assert len(target.hits) == hits
    assert pair.alive()
