"""What an operator asks a server: is it ready, what does it do, what has it done. Exact numbers."""

import asyncio
import json
import time
from argparse import Namespace
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import yaml
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from era_vllm.calibration import model_identity
from era_vllm.cli.options import DEFAULT_MODEL
from era_vllm.config import EraConfig
from era_vllm.types import Degenerate
from era_vllm.vllm_plugin.build import build
from era_vllm.vllm_plugin.families import FAMILIES
from era_vllm_server import info, metrics, ready
from era_vllm_server.settings import ServerSettings
from tests.engine.random_llava import save_random_llava
from tests.server.asking import (
    CHAT,
    MODEL,
    QUESTION,
    N,
    chat_body,
    fresh,
    picture,
    post,
    settled,
    url_of,
)
from tests.server.conftest import LIMITS, SERVE, started

FIRST = 20_000
"""Marks of the pictures that no other file asks about."""


def ask(server, *parts, **options):
    """Have exactly four tokens said about some pictures."""
    body = chat_body(*parts, max_tokens=4, ignore_eos=True, **options)
    reply = post(server, CHAT, body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def scraped(server):
    """Every sample on /metrics: (name, labels) -> value."""
    settled(server, "vllm:request_success_total")  # vLLM counts a little after it has answered
    time.sleep(metrics.FRESH_S)  # what workers said before is given again for so long
    reply = httpx.get(f"{server.url}/metrics", timeout=30)
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/plain; version=")
    samples = {}
    for family in text_string_to_metric_families(reply.text):
        for sample in family.samples:
            key = sample.name, tuple(sorted(sample.labels.items()))
            assert key not in samples
            samples[key] = sample.value
    return samples


def added(before, after, *prefixes):
    """What was added to counters, in short: name{values of labels}."""
    found = Counter()
    for (name, labels), value in after.items():
        if name.startswith(prefixes) and not name.endswith(("_created", "_bucket", "_sum")):
            text = ",".join(value for _, value in labels)
            found[f"{name}{{{text}}}"] = value - before.get((name, labels), 0)
    return {name: value for name, value in found.items() if value}


MIX = (
    ((None,), {"level": "strong"}),
    (("low", "high"), None),
    ((None, "auto", "low"), None),
    (("auto",), {"pruning_rate": 0.25}),
    ((), None),
)
"""Details of each image, and the field ``era``."""
EXPECTED = {
    "era:image_tokens_before_total{strong,era}": 3 * 144,
    "era:image_tokens_after_total{strong,era}": 3 * 16,
    "era:image_tokens_before_total{off,era}": 144,
    "era:image_tokens_after_total{off,era}": 144,
    "era:image_tokens_before_total{medium,era}": 2 * 144,
    "era:image_tokens_after_total{medium,era}": 2 * 32,
    "era:image_tokens_before_total{custom,era}": 144,
    "era:image_tokens_after_total{custom,era}": 108,
    "era:images_total{era}": 2,
    "era:images_total{detail}": 3,
    "era:images_total{default}": 2,
    "era:reduced_images_total{}": 7,
    "era:responses_total{200}": len(MIX),
}


def send_mix(server, first):
    """Send the mix, each picture another, one request at a time."""
    marks = count(first)
    for details, era in MIX:
        parts = [picture(fresh(0, next(marks)), detail) for detail in details]
        ask(server, *parts, **({} if era is None else {"era": era}))


def test_counters_are_exact_and_a_cached_image_is_not_reduced_again(servers):
    before = scraped(servers[0])
    send_mix(servers[0], FIRST)
    after = scraped(servers[0])
    found = added(before, after, "era:")
    passes = found.pop("era:reducer_seconds_count{}")
    assert found == EXPECTED
    assert 4 <= passes <= 7  # a request's images pass together where the encoder's budget allows
    spent = ("era:reducer_seconds_sum", ())
    assert 0 < after[spent] - before[spent] < 60
    repaired = [labels for name, labels in after if name == "era:degenerate_inputs_total"]
    assert [dict(labels)["kind"] for labels in repaired] == [k.name.lower() for k in Degenerate]
    send_mix(servers[0], FIRST)
    again = added(after, scraped(servers[0]), "era:")
    assert again == {name: n for name, n in EXPECTED.items() if "reduced" not in name}


def test_workers_that_do_not_answer_in_time_leave_a_gap(monkeypatch):
    """Never an older figure: another API server may have told a newer one meanwhile."""
    slow = asyncio.Event()
    images = iter((10, 5000, 6000))

    async def call_workers(engine, method):
        await slow.wait()
        if (now := next(images)) == 6000:
            raise RuntimeError("the engine has ended")
        passes = [0] * (len(metrics.BUCKETS_S) + 1)
        return [[{"images": now, "passes": passes, "seconds": 0.5, "degenerate": {}}]]

    async def told(request):
        text = (await metrics.metrics(request)).body.decode()
        families = {one.name: one for one in text_string_to_metric_families(text)}
        assert "era:images" in families
        assert ("era:reducer_seconds" in families) == ("era:reduced_images" in families)
        family = families.get("era:reduced_images")
        return None if family is None else family.samples[0].value

    async def run():
        state = SimpleNamespace(
            era_worker_metrics=metrics.WorkerMetrics(SimpleNamespace(errored=False))
        )
        request = SimpleNamespace(app=SimpleNamespace(state=state))
        slow.set()
        seen = [await told(request)]
        slow.clear()
        seen.append(await told(request))
        slow.set()
        seen.append(await told(request))
        return [*seen, await told(request)]

    monkeypatch.setattr(metrics, "call_workers", call_workers)
    monkeypatch.setattr(metrics, "WAIT_S", 0.05)
    monkeypatch.setattr(metrics, "FRESH_S", 0.0)
    assert asyncio.run(run()) == [10, None, 5000, None]


def test_workers_are_asked_once_a_second_whoever_scrapes(monkeypatch):
    now, asked = 100.0, []

    async def call_workers(engine, method):
        asked.append(now)
        return [[{"images": len(asked)}]]

    async def run():
        nonlocal now
        workers = metrics.WorkerMetrics(SimpleNamespace(errored=False))
        seen = []
        for passed in (0.0, 0.0, 0.5, 0.49, 0.01, 0.99, 0.02, 60.0):
            now += passed
            figures = await asyncio.gather(workers.ask(), workers.ask())
            seen.append([one.engines[0]["images"] for one in figures])
        return seen

    monkeypatch.setattr(metrics, "call_workers", call_workers)
    monkeypatch.setattr(metrics, "monotonic", lambda: now)
    expected = [1, 1, 1, 1, 2, 2, 3, 4]
    assert asyncio.run(run()) == [[images, images] for images in expected]


def test_the_histogram_adds_up(servers):
    samples = scraped(servers[0])
    buckets = [
        (float(dict(labels)["le"]), value)
        for (name, labels), value in samples.items()
        if name == "era:reducer_seconds_bucket"
    ]
    counts = [count for _, count in buckets]
    assert buckets == sorted(buckets) and counts == sorted(counts)
    assert buckets[-1] == (float("inf"), samples["era:reducer_seconds_count", ()])


def test_vllms_own_metrics_stay_as_they_are(servers):
    """One API server: no multiprocess mode, so the process's own figures and plain gauges stay."""
    before = scraped(servers[0])
    ask(servers[0], picture(fresh(0, FIRST + 50)))
    after = scraped(servers[0])
    assert added(before, after, "vllm:request_success") == {
        f"vllm:request_success_total{{0,length,{MODEL}}}": 1
    }
    engine = (("engine", "0"), ("model_name", MODEL))
    assert after["vllm:num_requests_running", engine] == 0
    assert after["vllm:num_requests_waiting", engine] == 0
    assert after["process_resident_memory_bytes", ()] > 1e8
    assert ("python_info" in {name for name, _ in after}) and "pid" not in json.dumps(list(after))


def test_ready_and_warm_before_the_socket_is_served(servers):
    for server in servers:
        reply = httpx.get(f"{server.url}/ready")
        assert (reply.status_code, reply.json()) == (200, {"ready": True})
        log = server.log.read_text()
        assert 0 < log.index("ready: warmed by one request") < log.index("Starting vLLM server on")


@pytest.mark.parametrize(
    ("errored", "warm", "silent_s", "status"),
    [
        (False, True, 29, 200),
        (True, True, 0, 503),
        (False, False, 0, 503),
        (False, True, 31, 503),
    ],
)
def test_not_ready_without_an_engine_a_first_answer_or_further_ones(
    errored, warm, silent_s, status
):
    app = FastAPI()
    app.include_router(ready.router)
    app.state.engine_client = SimpleNamespace(errored=errored)
    app.state.era_settings, app.state.era_warm = ServerSettings(), warm
    app.state.era_pulse = SimpleNamespace(silent_s=lambda: silent_s)
    reply = TestClient(app).get("/ready")
    assert reply.status_code == status and reply.json()["ready"] == (status == 200)
    assert ("retry-after" in reply.headers) == (status == 503)


def test_a_question_that_fails_is_no_answer(monkeypatch):
    """Silence is counted from the first one that got none; the next answer ends it."""
    outcomes = [RuntimeError("a worker has failed"), None, None]

    async def call_workers(engine, method):
        assert method == "check_health"
        if (outcome := outcomes.pop(0)) is not None:
            raise outcome

    async def run():
        pulse, seen = ready.Pulse(None), []
        for now in (100, 140, 150, 160):
            monkeypatch.setattr(ready.time, "monotonic", lambda now=now: now)
            seen.append(pulse.silent_s())
            if now != 150:  # then the question is still waiting
                await asyncio.wait([pulse._question])
        return seen

    monkeypatch.setattr(ready.probe, "call_workers", call_workers)
    assert asyncio.run(run()) == [0, 40, 0, 10]


def test_info_says_what_can_be_asked_for(servers):
    said = httpx.get(f"{servers[0].url}/v1/era").json()
    assert said["model"] == MODEL and said["prunes"] and said["policy"] == "era"
    assert said["levels"] == dict(EraConfig().levels)
    assert said["limits"] == {
        "min_pruning_rate": 0,
        "max_pruning_rate": 0.95,
        "min_anchors": 1,
        "max_model_len": 1024,
    }
    assert EraConfig.parse(said["settings"]) == EraConfig(policy="era")
    assert said["server"] == ServerSettings().model_dump(mode="json")
    assert said["families"] == sorted(FAMILIES)
    assert said["modalities"] == ["image"] and said["dtype"] == "bfloat16"
    known = said["identity"]
    assert known["model"] == model_identity(Path(DEFAULT_MODEL))[:16]
    assert known["code"] == build("era") and len(known["setup"]) == 16
    assert set(said["versions"]) == {"era_vllm", "vllm", "torch", "transformers", "python"}


def test_a_slow_step_is_no_failed_scrape():
    """The Prometheus that is shipped waits longer for /metrics than that does for the workers."""
    file = Path(__file__).parents[2] / "deploy" / "prometheus" / "prometheus.yml"
    shipped = yaml.safe_load(file.read_text())["global"]
    assert float(shipped["scrape_timeout"].removesuffix("s")) >= 2 * metrics.WAIT_S


def test_what_changes_an_answer_is_another_setup(tmp_path, caplog):
    def setup(**flags):
        args = Namespace(**{"model": str(tmp_path), "revision": None, "port": 1, **flags})
        return info.identity(args, EraConfig())

    caplog.set_level("WARNING", "era_vllm_server")  # some module raises the root's, once imported
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    first = setup()
    assert first == setup(port=2, api_key="k", middleware=lambda: None)
    assert first["setup"] != setup(kv_cache_dtype="fp8")["setup"]
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    other = setup()
    assert other["setup"] != first["setup"] and other["model"] == first["model"]
    (tmp_path / "model.safetensors").write_text("[]")
    assert setup()["model"] != first["model"] and not caplog.text
    (tmp_path / "model.safetensors").unlink()
    assert setup()["model"] not in (first["model"], other["model"])
    assert "by its name alone: calibration: got the model" in caplog.text


def test_info_names_no_file(tmp_path):
    shown = info._shown(ServerSettings(api_keys_file=tmp_path / "keys"))
    assert shown["api_keys_file"] is True and shown["metrics_key_file"] is None
    assert str(tmp_path) not in json.dumps(shown)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Two API servers over two ranks with JSON logs, and a server that prunes nothing."""
    folder = tmp_path_factory.mktemp("many")
    save_random_llava(folder / "model")  # two ranks need an even number of heads
    two = [str(folder / "model"), "--served-model-name", MODEL, "--tensor-parallel-size", "2"]
    two += ["--api-server-count", "2", "--era-log-json"]
    commands = {
        "two": ([*SERVE, "serve", *two, *LIMITS], {}),
        "off": ([*SERVE, "serve", *LIMITS, "--era-max-pruning-rate", "0"], {}),
    }
    with started(folder, commands) as servers:
        for server in servers:  # with two API servers the first to be ready answers /health
            wait_until_ready(server)
        yield servers


def wait_until_ready(server):
    """Wait until six connections in a row find a warm API server."""
    found = 0
    while found < 6:
        found = found + 1 if httpx.get(f"{server.url}/ready").status_code == 200 else 0


@pytest.mark.slow
def test_exact_with_two_api_servers_and_two_ranks(many):
    server = many[0]
    before = scraped(server)
    with ThreadPoolExecutor(4) as pool:  # connections of their own: both servers take some
        list(pool.map(lambda turn: send_mix(server, FIRST + 10 * turn), range(4)))
    for _ in range(6):  # whichever server answers
        found = added(before, scraped(server), "era:", "vllm:request_success")
        assert found.pop("era:reducer_seconds_count{}") > 0
        assert found.pop(f"vllm:request_success_total{{0,length,{MODEL}}}") == 4 * len(MIX)
        assert found == {name: 4 * n for name, n in EXPECTED.items()}


@pytest.mark.slow
def test_lines_of_json_hold_each_request_once_and_no_content(many):
    server = many[0]
    start = len(server.log.read_text())
    ids = [f"test-{turn}" for turn in range(20)]
    body = chat_body(picture(fresh(0, FIRST + 60), "low"))
    for name in ids:
        headers = {"X-Request-Id": name}
        reply = httpx.post(f"{server.url}{CHAT}", json=body, headers=headers, timeout=60)
        assert reply.json()["id"] == f"chatcmpl-{name}"
    text = server.log.read_text()[start:]
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    lines = [line for line in lines if line.get("event") == "request" and line["id"] in ids]
    assert sorted(line["id"] for line in lines) == sorted(ids)
    assert {(line["route"], line["status"]) for line in lines} == {(CHAT, 200)}
    image = {"pruning_rate": 0.889, "level": "strong", "source": "detail", "clamped": False}
    tokens = {"tokens_before": N, "tokens_after": 16}
    assert all(line["images"] == [image | tokens] for line in lines)
    assert "base64" not in text and QUESTION not in text and '"POST /v1' not in text


@pytest.mark.slow
def test_bias_of_both_ranks_is_read_back(many):
    body = {"image_url": {"url": url_of(fresh(0, FIRST + 61))}, "read_back": True}
    said = httpx.post(f"{many[0].url}/v1/era/inspect", json=body, timeout=60).json()
    read = said["read_back"]
    assert read["kv_heads"] == 2 and max(read["differences"]) < 1e-4
    assert max(read["log_bias"]) > 1


@pytest.mark.slow
def test_a_server_that_prunes_nothing_is_ready_and_says_so(many):
    url = many[1].url
    said = httpx.get(f"{url}/v1/era").json()
    assert not said["prunes"] and said["levels"] == {"off": 0}
    assert not [name for name, _ in scraped(many[1]) if name.startswith("era:reduc")]
    one = {"image_url": {"url": url_of(fresh(0, FIRST))}}
    assert httpx.post(f"{url}/v1/era/inspect", json=one).status_code == 400
