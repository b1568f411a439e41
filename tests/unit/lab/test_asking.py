"""Askers and the scorer behind ``era-vllm accuracy`` and the demo; starts no engine."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from era_vllm.cli import demo
from era_vllm.cli.main import main
from era_vllm.errors import UnsupportedError
from era_vllm.lab.accuracy import Accuracy, Score, table
from era_vllm.lab.asking import Answer, ServerAsker, media_of
from era_vllm.lab.samples import load_samples, load_task_samples

IMAGE_TOKENS = 16


class _Answering(BaseHTTPRequestHandler):
    """Answers every question with its last word but one, in capitals."""

    def _reply(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self._reply({"object": "list", "data": [{"id": "m", "object": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        *media, text = body["messages"][0]["content"]
        assert {part["type"] for part in media} <= {"image_url", "video_url"}
        pruned = {"images": [], "videos": []}
        for part in media:
            kind = part["type"].removesuffix("_url")
            assert part[part["type"]]["url"].startswith(f"data:{kind}/")
            pruned[f"{kind}s"].append({"tokens_after": IMAGE_TOKENS})
        message = {"role": "assistant", "content": f" {text['text'].split()[-2].upper()}\n"}
        answer = {"model": body["model"], "choices": [{"message": message}]}
        if body["model"] == "m":
            assert body.get("era") in (None, {"pruning_rate": 0.5})
            answer["era"] = pruned
        self._reply(answer)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Answering) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("rate", [None, 0.5])
def test_a_servers_answers_come_in_order_with_what_their_media_cost(
    url: str, rate: float | None
) -> None:
    subjects = [*load_samples(), *load_task_samples()]
    tokens = [IMAGE_TOKENS * len(media_of(subject)) for subject in subjects]
    assert {16, 32, 48} == set(tokens)
    with ServerAsker(url, rate) as asker:
        found = asker.ask(subjects)
    assert found == [
        [Answer(question.text.split()[-2], cost) for question in subject.questions]
        for subject, cost in zip(subjects, tokens, strict=True)
    ]


def test_a_server_that_does_not_prune_is_told_apart(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ServerAsker(url) as asker:
        monkeypatch.setattr(asker, "_model", "stock")
        with pytest.raises(UnsupportedError, match="needed one of era-vllm serve"):
            asker.ask(load_samples()[:1])


def test_the_demos_table_marks_first_questions_and_counts_all() -> None:
    samples = load_samples()[:2]
    right = [[Answer(q.answer, 144) for q in sample.questions] for sample in samples]
    wrong = [[Answer("x", 16), *row[1:]] for row in right]
    lines = demo._table(samples, [right, wrong]).splitlines()
    assert lines[0].split() == [
        "question",
        "rate",
        "0",
        "rate",
        "0.889",
        "right",
        "image",
        "tokens",
    ]
    answer = samples[0].questions[0].answer
    assert lines[2].split()[-8:] == [answer, "ok", "x", "x", answer, "144", "->", "16"]
    assert lines[5:] == [
        "rate 0     8 of all 8 questions right",
        "rate 0.889 6 of all 8 questions right",
        "           6 of 8 answers are the same at both rates",
    ]


def test_an_accuracy_has_a_wilson_interval() -> None:
    row = Accuracy("dpp", "compact", 0.5, 72, Score(45, 50))
    assert row.score.interval == pytest.approx((0.9, 0.7864, 0.9565), abs=1e-4)
    assert table([row]).splitlines()[-1] == "| dpp | compact | 0.5 | 72 | 90.0 % (78.6-95.7) |"


def test_accuracy_asks_plain_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn (the lab extra)")
    pytest.importorskip("skimage", reason="needs scikit-image (the lab extra)")
    few = ["accuracy", "--transformers", "--pictures", "2", "--questions", "2"]
    out = tmp_path / "new" / "figures.json"
    flags = ["--policies", "uniform", "--positions", "compact", "--rates", "0", ".889"]
    assert main([*few, *flags, "--json", str(out)]) == 0
    assert "| uniform | compact | 0.889 | 16 |" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert {"commit", "date", "versions", "hardware"} < set(found)
    assert [row["tokens"] for row in found["rows"]] == [144, 16]
    assert set(found["rows"][0]) == {
        *("policy", "positions", "pruning_rate", "tokens", "right", "asked", "interval")
    }
    assert main([*few, "--by-family"]) == 0
    page = capsys.readouterr().out.splitlines()
    assert page[0] == "| family | right | asked | % |"
    assert sum(int(line.split("|")[3]) for line in page[2:] if line.count("|") == 5) == 4
    assert [line.partition(":")[0] for line in page if line.startswith("all")] == ["all"]
