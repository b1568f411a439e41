"""Askers behind ``era-vllm eval`` and the demo; starts no engine."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from era_vllm.cli import demo
from era_vllm.cli.main import main
from era_vllm.config import EraConfig
from era_vllm.errors import UnsupportedError
from era_vllm.lab import CHECKPOINT, CHECKPOINT_QWEN3_VL
from era_vllm.lab.asking import Answer, ServerAsker, TransformersAsker, ask
from era_vllm.lab.oracle import Oracle
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
        choice = {"message": message}
        if body.get("logprobs"):
            assert body["return_tokens_as_token_ids"] is True
            likely = [
                {"token": f"token_id:{7 + rank}", "logprob": -1.0 - rank}
                for rank in range(body["top_logprobs"])
            ]
            choice["logprobs"] = {"content": [{**likely[0], "top_logprobs": likely}]}
        answer = {"model": body["model"], "choices": [choice]}
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
    tokens = [IMAGE_TOKENS * len(subject.media) for subject in subjects]
    assert {16, 32, 48} == set(tokens)
    with ServerAsker(url) as asker:
        found = ask(asker, subjects, rate)
    assert found == [
        [Answer(question.text.split()[-2], cost) for question in subject.questions]
        for subject, cost in zip(subjects, tokens, strict=True)
    ]


def test_first_tokens_are_told_where_they_are_asked_for(url: str) -> None:
    with ServerAsker(url) as plain, ServerAsker(url, shown=3) as asker:
        (without, *_), (answer, *_) = (next(one.each(load_samples())) for one in (plain, asker))
    assert without.first is None
    assert answer.first == {7: -1.0, 8: -2.0, 9: -3.0}
    assert answer.seconds > 0


def test_a_server_that_does_not_prune_is_told_apart(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ServerAsker(url) as asker:
        monkeypatch.setattr(asker, "_model", "stock")
        with pytest.raises(UnsupportedError, match="needed one of era-vllm serve"):
            ask(asker, load_samples()[:1])


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


def test_eval_asks_plain_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn (the lab extra)")
    pytest.importorskip("skimage", reason="needs scikit-image (the lab extra)")
    pytest.importorskip("matplotlib", reason="needs matplotlib (the lab extra)")
    flags = ["--policies", "uniform", "--variant", "positions=compact", "--rates", "0", ".889"]
    words = ["eval", "--asker", "transformers", "--count", "2", *flags, "--dtype", "float32"]
    assert main([*words, "--out", str(tmp_path / "new")]) == 0
    assert "| uniform positions=compact | 0.889 | 16.0 |" in capsys.readouterr().out
    found = json.loads((tmp_path / "new" / "eval.json").read_text())
    assert {"commit", "date", "versions", "hardware"} < set(found)
    assert (found["asker"], found["dtype"]) == ("transformers", "float32")
    whole, *pruned = found["rows"]
    assert [row["tokens"] for row in found["rows"]] == [144, 16, 16]
    assert whole["same"] is whole["kl"] is None
    for row in pruned:
        assert row["kl"]["value"] > 0 and 0 < row["same"]["value"] < 1 and row["seconds"] > 0
        assert row["families"].keys() == row["counts"].keys()
    assert pruned[0]["kl"] != pruned[1]["kl"], "compact positions are others"


def test_plain_transformers_weigh_the_bias_as_configured() -> None:
    oracle, samples = Oracle(str(CHECKPOINT)), load_samples()[:1]
    configs = (EraConfig(gamma=0.0), EraConfig(bias=False), EraConfig(), EraConfig(gamma=2.0))
    none, off, one, two = (
        ask(TransformersAsker(oracle, config), samples, 0.889)[0][0].first for config in configs
    )
    assert none == off
    assert len({str(first) for first in (none, one, two)}) == 3


def test_plain_transformers_refuse_what_they_cannot_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", str(CHECKPOINT_QWEN3_VL), "--asker", "transformers", "--out", str(tmp_path)]
    assert main(words) == 2
    assert "got Qwen3VLForConditionalGeneration, allowed: LlavaFor" in capsys.readouterr().err
    oracle = Oracle(str(CHECKPOINT), language=False)
    with pytest.raises(UnsupportedError, match="got a video, allowed: pictures"):
        ask(TransformersAsker(oracle, EraConfig()), load_task_samples()[-1:], 0.5)


def test_a_key_goes_to_the_address_that_was_named_and_to_no_other(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[str, str | None]] = []

    class Redirect(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers.get("Authorization")))
            self.send_response(302)
            port = self.server.server_address[1]
            self.send_header("Location", f"http://localhost:{port}/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Redirect) as server:
        Thread(target=server.serve_forever).start()
        try:
            url = f"http://127.0.0.1:{server.server_address[1]}"
            monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")
            assert main(["eval", "--url", url, "--out", str(tmp_path)]) == 2
        finally:
            server.shutdown()
    assert asked == [("/v1/era", "Bearer sk-secret")]
    assert "302" in (said := capsys.readouterr().err) and "sk-secret" not in said
    monkeypatch.setenv("OPENAI_API_KEY", "sk-sec\nret")
    assert main(["eval", "--url", url, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "$OPENAI_API_KEY: has characters that no key has" in said and "sk-sec" not in said
