"""What ``/v1/era/inspect`` says is what the engine does, also while it is busy."""

import base64
import io
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from PIL import Image

from era_vllm.config import EraConfig
from era_vllm.errors import UnsupportedError
from era_vllm.lab import CHECKPOINT
from era_vllm.lab.oracle import Oracle
from era_vllm.lab.samples import load_samples
from era_vllm.policies import era as era_policy
from era_vllm.steps.entropy import head_entropy, head_profile, unattended
from era_vllm_server.inspect import _of_one_engine
from tests.server.asking import chat, picture, url_of
from tests.server.test_operations import added, scraped

STORED = 1e-4
"""Of a bias of up to 4, in two columns of bf16 (tests/engine/test_bias_in_cache.py)."""


def inspect(server, image, era=None, headers=None, **options):
    body = {"image_url": {"url": url_of(image)}, **options}
    body |= {} if era is None else {"era": era}
    return httpx.post(f"{server.url}/v1/era/inspect", json=body, headers=headers, timeout=120)


@pytest.fixture(scope="module")
def image():
    return load_samples()[0].image


@pytest.fixture(scope="module")
def server(servers):
    return servers[0]


def test_anchors_clusters_bias_and_entropy_are_the_policys(server, image):
    said = inspect(server, image, {"level": "strong"}, picture=False).json()
    assert "picture" not in said and "read_back" not in said
    assert (said["policy"], said["level"], said["source"]) == ("era", "strong", "era")
    assert (said["tokens_before"], said["tokens_after"]) == (144, 16)
    assert (said["units"], said["separators"]) == (1, 0)
    (said,) = said["segments"]
    assert (said["grid"], said["unit"], said["box"]) == ([12, 12], 0, [0, 0, 1, 1])
    anchors, assignment = said["anchors"], said["assignment"]
    assert anchors == sorted(set(anchors)) and len(anchors) == 16 and len(assignment) == 144
    assert [assignment[token] for token in anchors] == list(range(16))
    oracle, config = Oracle(str(CHECKPOINT), torch.bfloat16), EraConfig(policy="era")
    tokens = oracle.tokens([image], config)
    own = oracle.reduce([image], config, 0.889)
    assert len(set(anchors) & set(own.anchors[0].tolist())) >= 12  # bf16: near-ties may differ
    policy = era_policy.Policy()
    profile = head_profile(tokens, policy.saliency, policy.temperature)
    entropy = head_entropy(profile, unattended(tokens, policy.mass_guard))[0]
    assert (torch.tensor(said["entropy"]) - entropy).abs().max() < 0.05
    assert max(said["entropy"]) - min(said["entropy"]) > 0.1
    sizes = torch.bincount(torch.tensor(assignment), minlength=16).float()
    assert (torch.tensor(said["log_bias"]) - sizes.log()).abs().max() < 1e-3
    (again,) = oracle.recycle([image], config, torch.tensor([anchors]))
    moved = (again.log_bias.exp() - sizes).abs().sum() / 2  # bf16: near-ties join another anchor
    assert moved <= 12, "of 144 tokens"
    assert max(said["log_bias"]) > 1


def test_the_bias_is_read_back_from_the_slots_of_the_running_request(server, image):
    said = inspect(server, image, {"level": "medium"}, read_back=True, picture=False).json()
    read = said["read_back"]
    assert (read["layers"], len(read["differences"])) == (4, 4)
    assert max(read["differences"]) < STORED and read["kv_heads"] >= 1
    pairs = zip(read["log_bias"], said["segments"][0]["log_bias"], strict=True)
    assert max(abs(a - b) for a, b in pairs) < STORED
    assert max(read["log_bias"]) > 1
    assert read["largest_text_bias"] == 0 and read["text_slots"] >= 4


def test_off_keeps_every_token(server, image):
    said = inspect(server, image, {"level": "off"}, read_back=True, picture=False).json()
    (kept,) = said["segments"]
    assert kept["anchors"] == kept["assignment"] == list(range(144))
    assert not any(kept["log_bias"]) and max(said["read_back"]["differences"]) == 0


def test_no_cache_answers_and_none_is_spoilt(server, image):
    answer = chat(server, picture(image))["choices"]
    before = scraped(server)
    first = inspect(server, image, picture=False).json()
    assert inspect(server, image, picture=False).json() == first
    after = scraped(server)
    assert chat(server, picture(image))["choices"] == answer
    assert added(before, after, "era:") == {
        "era:reduced_images_total{}": 2,  # not counted as a client's images
        "era:reducer_seconds_count{}": 2,
        "era:responses_total{200}": 2,
    }
    assert "era:reduced_images_total{}" not in added(after, scraped(server), "era:")


def test_the_picture_comes_within_the_json_or_alone(server, image):
    within = inspect(server, image).json()["picture"]
    head, _, data = within.partition(",")
    assert head == "data:image/png;base64"
    alone = inspect(server, image, headers={"Accept": "image/png"})
    assert alone.headers["content-type"] == "image/png"
    assert alone.content == base64.b64decode(data)
    assert Image.open(io.BytesIO(alone.content)).width >= 1500


def taken(pruned=None, read_back=None, unreadable=None):
    """What two ranks of an engine say (``EraWorker.era_take``)."""
    return [{"pruned": pruned, "read_back": read_back, "unreadable": unreadable}] * 2


@pytest.mark.parametrize("engines", [[0, 1, 2], [1, 0, 2], [2, 1, 0]], ids=str)
def test_another_engine_with_the_same_picture_is_not_taken_for_ours(engines):
    """With data parallel; it has pruned it for a neighbour, and does not hold our request."""
    said = [taken(), taken({"of": "theirs"}), taken({"of": "ours"}, {"layers": 4})]
    said = [said[engine] for engine in engines]
    found = _of_one_engine("image", said, read_back=True)
    assert (found.pruned, found.read_back) == ({"of": "ours"}, [{"layers": 4}] * 2)
    assert _of_one_engine("image", [taken()], read_back=False) is None
    assert _of_one_engine("image", [taken({"of": "theirs"})], read_back=True) is None
    alone = _of_one_engine("image", [taken(), taken({"of": "any"})], read_back=False)
    assert (alone.pruned, alone.read_back) == ({"of": "any"}, None)
    with pytest.raises(UnsupportedError, match="read_back: no kernel"):
        _of_one_engine("image", [taken(), taken({}, None, "no kernel")], read_back=True)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"era": {"level": "brutal"}}, "era.level"),
        ({"era": {"pruning_rate": 0.99}}, "era.pruning_rate"),
        ({"image_url": {"url": "data:image/png;base64,AAAA"}}, "image"),
        ({"image_url": {"url": "file:///etc/passwd"}}, ""),
        ({"image_url": {"url": "http://127.0.0.1:1/x.png"}}, ""),
        ({"image_url": {"url": "x", "detail": "odd"}}, "detail"),
        ({"images": []}, "images"),
        ({"image_url": None}, "image_url"),
        ({"video_url": "data:video/mp4;base64,AAAA"}, "needed one of the two"),
        ({"image_url": None, "video_url": "data:video/mp4;base64,AAAA"}, "takes image only"),
    ],
    ids=str,
)
def test_a_bad_request_is_a_400(server, image, change, named):
    body = {"image_url": {"url": url_of(image)}, **change}
    reply = httpx.post(f"{server.url}/v1/era/inspect", json=body, timeout=60)
    assert reply.status_code in (400, 422), reply.text
    assert named in reply.text


def test_one_at_a_time_and_safe_under_load(server, image):
    expected = chat(server, picture(image))["choices"]
    stop, wrong = threading.Event(), []

    def load():
        while not stop.is_set():
            if chat(server, picture(image))["choices"] != expected:
                wrong.append(1)

    clients = [threading.Thread(target=load) for _ in range(4)]
    for client in clients:
        client.start()
    tries = []
    try:
        with ThreadPoolExecutor(4) as pool:
            while len(tries) < 80 and all(len(replies) == 1 for replies in tries):  # none met
                tries += pool.map(lambda _: until_answered(server, image), range(4))
    finally:
        stop.set()
        for client in clients:
            client.join()
    assert not wrong
    refused = [reply for replies in tries for reply in replies[:-1]]
    assert refused and {reply.status_code for reply in refused} == {429}
    assert all(int(reply.headers["retry-after"]) >= 1 for reply in refused)
    said = [replies[-1].json() for replies in tries]
    assert all(max(one["read_back"]["differences"]) < STORED for one in said)
    assert all(one["segments"] == said[0]["segments"] for one in said)


def until_answered(server, image):
    """Ask again as long as another inspection is running; returns all replies."""
    replies = []
    while not replies or replies[-1].status_code == 429:
        replies.append(inspect(server, image, read_back=True, picture=False))
    return replies
