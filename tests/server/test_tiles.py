"""A server of each family: a chat by HTTP, what was done by modality, inspect's picture.

Random weights; whether answers are exact is shown without a server (tests/engine/test_tiled.py).
"""

import base64
import io
import json

import httpx
import pytest
from PIL import Image

from tests import answers
from tests.engine.families import CASES
from tests.engine.families.case import ODD, TALL
from tests.server.asking import CHAT, picture, post
from tests.server.clips import h264
from tests.server.conftest import LIMITS, SERVE, started
from tests.server.test_operations import added, scraped

pytestmark = pytest.mark.slow
QUESTION = "what shape is red?"
TEMPLATE = "{% for m in messages %}USER: {{ m['content'] }} {% endfor %}ASSISTANT:"
BOTH = {"image": {"level": "strong"}, "video": {"pruning_rate": 0.95}}
CLIP = {"url": "data:video/mp4;base64," + base64.b64encode(h264(16, (96, 64))).decode()}
VIDEO = {"type": "video_url", "video_url": CLIP}


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def case(request):
    """A family."""
    return request.param


@pytest.fixture(scope="module")
def server(case, tmp_path_factory):
    """A server of it."""
    folder = tmp_path_factory.mktemp(case.name)
    case.save(folder / "model")
    template = folder / "chat.jinja"
    template.write_text(TEMPLATE)
    words = [*LIMITS, "--max-model-len", "3072", "--dtype", "float32"]
    words += ["--chat-template", str(template), "--served-model-name", "era-sample"]
    if case.name == "InternVLChatModel":  # which transformers does not have
        words.append("--trust-remote-code")
    command = [*SERVE, "serve", str(folder / "model"), *words]
    with started(folder, {"family": (command, {})}) as (server,):
        yield server


def ask(server, *parts, **options):
    """Ask a chat about some parts."""
    content = [*parts, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": content}]
    body = {"model": "era-sample", "messages": messages, "max_tokens": 4, "temperature": 0}
    return post(server, CHAT, body | options)


def test_pictures_are_reported_one_by_one(server):
    before = scraped(server)
    said = ask(server, picture(ODD), picture(TALL, "low"), logprobs=False)
    assert said.status_code == 200, said.text
    first, second = said.json()["era"]["images"]
    assert "videos" not in said.json()["era"]
    assert (first["level"], second["level"]) == ("medium", "strong")
    assert 0 < first["tokens_after"] < 0.4 * first["tokens_before"]
    found = added(before, scraped(server), "era:image_tokens")
    assert found["era:image_tokens_before_total{medium,era}"] == first["tokens_before"]
    assert found["era:image_tokens_after_total{strong,era}"] == second["tokens_after"]


def test_one_picture_two_pictures_a_video(case, server):
    """Kept in out/families, of which ``tests.answers`` makes docs/families/answers.md."""
    asked = {"a picture": [picture(ODD)], "two pictures": [picture(ODD), picture(TALL, "low")]}
    if "video" in case.marks:
        asked["a video"] = [{**VIDEO, "era": {"level": "strong"}}]
    kept = {}
    for name, parts in asked.items():
        said = ask(server, *parts)
        assert said.status_code == 200, said.text
        body = said.json()
        items = [*body["era"]["images"], *body["era"].get("videos", ())]
        assert len(items) == len(parts)
        tokens = sum(one["tokens_after"] for one in items)
        assert 0 < tokens < sum(one["tokens_before"] for one in items)
        assert body["usage"]["prompt_tokens"] > tokens
        content = [*map(shown, parts), {"type": "text", "text": QUESTION}]
        answer = {"usage": body["usage"], "era": body["era"]}
        kept[name] = {"request": [{"role": "user", "content": content}], "response": answer}
    answers.FOLDER.mkdir(parents=True, exist_ok=True)
    (answers.FOLDER / f"{case.name}.json").write_text(json.dumps(kept))


def shown(part):
    """Return a part without its bytes."""
    key = part["type"]
    return {**part, key: {**part[key], "url": f"{part[key]['url'].partition(',')[0]},..."}}


def test_a_field_by_modality(case, server):
    parts = (picture(TALL), VIDEO)
    takes = httpx.get(f"{server.url}/v1/era").json()["modalities"]
    assert takes == [*case.marks]
    said = ask(server, *parts, era=BOTH)
    if "video" not in case.marks:
        assert said.status_code == 400 and "text and pictures only" in said.text
        said = ask(server, picture(TALL), era=BOTH)
        assert said.status_code == 400 and "era.video" in said.text
        return
    assert said.status_code == 200, said.text
    (image,), (video,) = (said.json()["era"][name] for name in ("images", "videos"))
    assert (image["level"], image["source"]) == ("strong", "era")
    assert (video["pruning_rate"], video["level"], video["source"]) == (0.95, None, "era")
    assert video["tokens_after"] < 0.15 * video["tokens_before"]
    flat = ask(server, *parts, era={"level": "off"}).json()["era"]
    for one in (*flat["images"], *flat["videos"]):
        assert one["level"] == "off" and one["tokens_after"] == one["tokens_before"]
    default = ask(server, *parts).json()["era"]
    assert {one["source"] for one in (*default["images"], *default["videos"])} == {"default"}


def test_a_part_says_the_rate_of_its_own_video(case, server):
    """Before its detail, and that before the request's field, by modality or not."""
    if "video" not in case.marks:
        said = ask(server, {**VIDEO, "era": {"level": "off"}})
        assert said.status_code == 400 and "text and pictures only" in said.text
        return

    def video(detail=None, **more):
        return {**VIDEO, "video_url": CLIP | ({"detail": detail} if detail else {}), **more}

    before = scraped(server)
    own = video("high", era={"pruning_rate": 0.9}), picture(TALL, era={"level": "light"})
    for era in (BOTH, {"level": "off"}, None):
        said = ask(server, *own, video("low"), era=era)
        assert said.status_code == 200, said.text
        ((image,), (first, second)) = (said.json()["era"][name] for name in ("images", "videos"))
        assert (image["level"], image["source"]) == ("light", "part")
        assert (first["pruning_rate"], first["level"], first["source"]) == (0.9, None, "part")
        assert (second["level"], second["source"]) == ("strong", "detail")
        assert first["tokens_before"] == second["tokens_before"] > second["tokens_after"]
    found = added(before, scraped(server), "era:videos", "era:images")
    assert found == {
        "era:videos_total{part}": 3,
        "era:videos_total{detail}": 3,
        "era:images_total{part}": 3,
    }
    high, rest = ask(server, video("high"), video("auto"), era=BOTH).json()["era"]["videos"]
    assert (high["level"], high["source"]) == ("off", "detail")
    assert high["tokens_after"] == high["tokens_before"]
    assert (rest["pruning_rate"], rest["source"]) == (0.95, "era")
    for part, place in (
        (video(era={"pruning_rate": 0.99}), "era.pruning_rate: got 0.99, allowed: a number in"),
        (video(era={"video": {"level": "off"}}), "era: got "),
        (video("ultra"), "video_url.detail: got 'ultra', allowed: high, original, low, auto"),
        ({**VIDEO, "video_url": {**CLIP, "era": {"level": "off"}}}, "video_url.era: no such field"),
        (video(level="off"), "level: no such field, needed 'era'"),
    ):
        said = ask(server, picture(TALL), part)
        assert said.status_code == 400, said.text
        message = said.json()["error"]["message"]
        assert message.startswith(f"messages[0].content[1].{place}"), message


def test_inspect_takes_a_part_as_it_is(case, server):
    if "video" not in case.marks:
        return
    for more, decided in (
        ({"video_url": CLIP | {"detail": "low"}}, ("strong", "detail")),
        ({"video_url": CLIP | {"detail": "low"}, "era": {"level": "light"}}, ("light", "era")),
        ({"era": {"video": {"level": "light"}}, "detail": "high"}, ("light", "era")),
        ({"detail": "low"}, ("strong", "detail")),
        ({}, ("medium", "default")),
    ):
        body = {**VIDEO, "picture": False} | more
        reply = httpx.post(f"{server.url}/v1/era/inspect", json=body, timeout=120)
        assert reply.status_code == 200, reply.text
        assert (reply.json()["level"], reply.json()["source"]) == decided
    for wrong, told in (
        ({"detail": "ultra"}, "detail: got 'ultra', allowed: high"),
        ({"video_url": CLIP | {"detail": 3}}, "video_url.detail: got 3"),
        ({"type": "image_url"}, "type: got image_url, needed video_url"),
    ):
        reply = httpx.post(f"{server.url}/v1/era/inspect", json={**VIDEO} | wrong, timeout=60)
        assert reply.status_code == 400 and told in reply.text, reply.text


def test_inspect_draws_tiles_and_frames(case, server):
    for kind, part in {"image": picture(ODD), "video": VIDEO}.items():
        body = {name: part[name] for name in (f"{kind}_url",)} | {"read_back": True}
        reply = httpx.post(f"{server.url}/v1/era/inspect", json=body, timeout=120)
        if kind not in case.marks:
            assert reply.status_code == 400 and "this model takes image only" in reply.text
            continue
        assert reply.status_code == 200, reply.text
        said = reply.json()
        segments = said["segments"]
        whole = kind == "image" and getattr(case, "mrope", False)
        assert said["units"] >= len(segments) and (len(segments) == 1) == whole
        assert len({one["unit"] for one in segments}) == len(segments)
        kept = sum(len(one["anchors"]) for one in segments) + said["separators"]
        assert said["tokens_after"] == kept == len(said["read_back"]["log_bias"])
        assert max(said["read_back"]["differences"]) < 1e-5
        assert said["read_back"]["largest_text_bias"] == 0
        assert all(0 <= edge <= 1 for one in segments for edge in one["box"])
        drawn = Image.open(io.BytesIO(base64.b64decode(said["picture"].partition(",")[2])))
        answers.FOLDER.mkdir(parents=True, exist_ok=True)
        drawn.save(answers.FOLDER / f"{case.name}-{kind}.png")
        assert drawn.width >= 900
