"""What is asked, kept and gone on with; the page. The servers of these tests answer by rule."""

import argparse
import json
import math
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from tqdm import tqdm

from era_vllm.cli.askers import _of_server, code, source
from era_vllm.cli.eval import _settings, _variants
from era_vllm.cli.main import main
from era_vllm.errors import ConfigError
from era_vllm.lab import evaluation
from era_vllm.lab.asking import Answer, ServerAsker
from era_vllm.lab.eval_report import draw, markdown, scored
from era_vllm.lab.evaluation import Answers, Variant, cells, evaluate
from era_vllm.lab.samples import load_task_samples

RATES = (0.0, 0.5, 0.9)
RIGHT, WRONG = {3: -0.1, 4: -3.0}, {3: -3.0, 4: -0.1}
PLAIN, WITHOUT = Variant("era"), Variant("era", (("bias", False),))
HEAD = {"model": "m", "tasks": {"picture": 4}, "split": "test", "seed": 1}


class Rule:
    """Answers right up to a rate of .5, and ends after so many subjects."""

    asked: list[tuple[str, float]] = []
    left = 10**6

    def __init__(self, name: str) -> None:
        self.name = name

    def each(self, subjects, rate):
        for subject in subjects:
            if Rule.left == 0:
                raise KeyboardInterrupt
            Rule.left -= 1
            Rule.asked.append((self.name, rate))
            text, first = ("{}", RIGHT) if rate <= 0.5 else ("x", WRONG)
            yield [Answer(text.format(q.answer), 10, 0.5, first) for q in subject.questions]


@pytest.fixture(autouse=True)
def rule():
    Rule.asked, Rule.left = [], 10**6


@contextmanager
def rule_of(variant: Variant):
    yield Rule(variant.name)


def run(folder: Path):
    subjects = load_task_samples()
    wanted = cells([PLAIN, WITHOUT], RATES)
    total = len(wanted) * len(subjects)
    with tqdm(total=total, disable=True) as shown, Answers(folder, HEAD) as answers:
        rows = list(evaluate(subjects, wanted, answers, rule_of, shown))
    return subjects, rows


def test_a_variant_is_a_server_and_rate_0_is_asked_once(tmp_path: Path) -> None:
    subjects, rows = run(tmp_path)
    assert [(row.variant, row.rate) for row in rows] == [
        ("unpruned", 0.0),
        ("era", 0.5),
        ("era", 0.9),
        ("era bias=false", 0.5),
        ("era bias=false", 0.9),
    ]
    assert len(Rule.asked) == 5 * len(subjects)
    assert WITHOUT.settings == {"policy": "era", "bias": False}


def test_what_was_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    Rule.left = 17
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    file = tmp_path / evaluation.ANSWERS
    file.write_text(file.read_text()[:-5])  # as a machine that lost power leaves it
    Rule.left = 10**6
    subjects, rows = run(tmp_path)
    assert len(Rule.asked) == 17 + 5 * len(subjects) - 16
    again = run(tmp_path)[1]
    assert again == rows
    first, last = again[0].answers[0][0], again[2].answers[0][0]
    assert (first.first, first.seconds, last.first) == (RIGHT, 0.5, WRONG)
    assert len(Rule.asked) == 18 + 5 * len(subjects) - 17
    with pytest.raises(ConfigError, match=r"differs in seed.*name another folder"):
        Answers(tmp_path, {**HEAD, "seed": 2})


@pytest.mark.parametrize("head", [HEAD, {**HEAD, "format": 3}])
def test_a_file_of_another_format_is_told_apart(head: dict, tmp_path: Path) -> None:
    """The first format had no version."""
    line = {"variant": "unpruned", "rate": 0.0, "subject": 0, "tokens": 3, "texts": ["x"]}
    (tmp_path / evaluation.ANSWERS).write_text(f"{json.dumps(head)}\n{json.dumps(line)}\n")
    with pytest.raises(ConfigError, match=r"has format [13], needed 2: another version of era"):
        Answers(tmp_path, HEAD)


def test_one_evaluation_at_a_time_has_a_folder(tmp_path: Path) -> None:
    with Answers(tmp_path, HEAD), pytest.raises(ConfigError, match="another evaluation is writing"):
        Answers(tmp_path, HEAD)
    with Answers(tmp_path, HEAD):
        pass


@pytest.mark.parametrize("text", ["half {\n", "[]\n", '{"model": 1}\nx\n', "\n"])
def test_what_is_no_file_of_answers_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / evaluation.ANSWERS).write_text(text)
    with pytest.raises(ConfigError, match="--out: .*name another folder"):
        Answers(tmp_path, HEAD)
    assert (tmp_path / evaluation.ANSWERS).read_text() == text


def test_lines_of_two_runs_are_no_answers(tmp_path: Path) -> None:
    with Answers(tmp_path, HEAD) as answers:
        answers.add("era", 0.5, [Answer("x", 3)])
    file = tmp_path / evaluation.ANSWERS
    file.write_text(file.read_text() + file.read_text().splitlines()[1] + "\n")
    with pytest.raises(ConfigError, match="is no file of answers"):
        Answers(tmp_path, HEAD)


def test_a_head_that_was_cut_off_begins_anew(tmp_path: Path) -> None:
    (tmp_path / evaluation.ANSWERS).write_text('{"format": 2, "mod')
    with Answers(tmp_path, HEAD) as answers:
        answers.add("era", 0.5, [Answer("x", 3)])
    with Answers(tmp_path, HEAD) as answers:
        assert answers.of("era", 0.5) == [[Answer("x", 3)]]


@pytest.mark.parametrize(
    "content",
    [
        b'{"id": 1, "answer": "my only line"}',
        b'{"id": 1}\n{"id": 2}',
        b'{"id": 1}\r\n{"id": 2}\r\n',
        b"\xff\xfe\x00",
    ],
)
def test_a_file_of_somebody_else_is_left_as_it_is(content: bytes, tmp_path: Path) -> None:
    (tmp_path / evaluation.ANSWERS).write_bytes(content)
    with pytest.raises(ConfigError, match="no file of answers|another evaluation"):
        Answers(tmp_path, HEAD)
    assert (tmp_path / evaluation.ANSWERS).read_bytes() == content


def test_the_page_has_each_row_against_the_unpruned_one(tmp_path: Path) -> None:
    found = scored(*run(tmp_path))
    head = {
        **HEAD,
        "asker": "http",
        "command": "era-vllm eval",
        "commit": "c",
        "hardware": "h",
        "date": "d",
    }
    page = markdown(head, found)
    lines = [line for line in page.splitlines() if line.startswith(("| unpruned", "| era"))]
    assert lines[0].startswith("| unpruned | 0 | 10.0 | 0.500 | 100.0 (75.7 to 100.0) | - |")
    assert lines[0].endswith("| - | - |")
    against = "+0.0 (+0.0 to +0.0)"
    assert lines[1].startswith(f"| era | 0.5 | 10.0 | 0.500 | 100.0 (75.7 to 100.0) | {against} |")
    assert lines[1].endswith("| 100.0 (75.7 to 100.0) | 0.000 (0.000 to 0.000) |")
    assert lines[4].startswith(
        "| era bias=false | 0.9 | 10.0 | 0.500 | 0.0 (0.0 to 24.3) | -100.0 "
    )
    far = sum(math.exp(p) * (p - q) for p, q in ((-0.1, -3.0), (-3.0, -0.1)))
    assert found[4].kl is not None and found[4].kl.value == pytest.approx(far)
    families = [line for line in page.splitlines()[22:] if line.startswith("| unpruned")]
    assert families[0].count("100 (") == len(found[0].families)
    assert "Tasks: 4 picture, 4 several, 4 film, test split, seed 1, 48 questions" in page
    assert json.dumps([row.as_dict() for row in found])
    pytest.importorskip("matplotlib", reason="needs matplotlib (the lab extra)")
    draw(tmp_path / "eval.png", "title", found)
    assert (tmp_path / "eval.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rates", "0", ".99"], "--rates: got 0.99, allowed: numbers in [0, 0.95]"),
        (["--count", "1"], "--count: got 1, allowed: 2 or more"),
        (["--policies", "eral"], "eral"),
        (["--variant", "calibration=nosuch.json"], "calibration 'nosuch.json': No such file"),
        (["--variant", "bias"], "--variant: got 'bias', needed NAME=VALUE"),
        (["--variant", "biass=false"], "biass"),
        (["--variant", "policy=dpp"], "name it with --policies"),
        (["--variant", "pruning_rate=.5"], "each request says its rate: --rates"),
        (["--server", '"'], "--server: got '\"': No closing quotation"),
        (["--server", "--era-policy random"], "--server: got --era-policy, which is said by a fl"),
        (["--server", "--api-key sk-x"], "--server: --api-key: its value would stand in"),
        (["--server", "--dtype half"], "--server: got --dtype, which is said by a flag"),
        (["--server=--enforce-eager", "--asker", "engine"], "is for --asker http, got engine"),
        (["--url", "http://x", "--asker", "engine"], "leave them out with --url"),
        (["--backgrounds", "nosuch"], "nosuch"),
        (["--families", "colour"], "colour"),
        (["--families", "which", "--tasks", "standard"], "which: no task has such a question"),
        (["nosuch"], "MODEL: got 'nosuch', needed a folder with a model's config.json"),
        (["MODEL", "--url", "http://x"], "MODEL and --url: choose one"),
        (["--url", "http://x", "--policies", "dpp"], "leave them out with --url"),
        (["--url", "http://127.0.0.1:1"], "--url: http://127.0.0.1:1/v1/era: URLError"),
        (["--url", "127.0.0.1:1"], "needed the address of a server of era-vllm serve"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["eval", *flags, "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_family_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    assert main(["eval", str(tmp_path)]) == 2
    assert "MODEL: got LlamaForCausalLM, allowed: " in capsys.readouterr().err


def test_a_variable_that_servers_would_read_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ERA_BIAS", "false")
    assert main(["eval"]) == 2
    assert "ERA_BIAS: is set in the environment" in capsys.readouterr().err


def test_settings_of_a_variant_may_be_lists_and_short_numbers() -> None:
    assert _settings("gamma=[[1, 2],[3,4]],bias=false") == (
        ("gamma", [[1, 2], [3, 4]]),
        ("bias", False),
    )
    assert _settings("gamma=.5, positions=compact") == (("gamma", 0.5), ("positions", "compact"))


def test_a_model_is_its_files_and_how_it_is_computed(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"architectures": ["Qwen3VLForConditionalGeneration"]}')

    def found(model: str, dtype: str | None = None, asker: str = "http"):
        named = argparse.Namespace(url=None, model=model, dtype=dtype, server=None, out=tmp_path)
        return source(named, [0.0], 8, asker)

    first = found(str(tmp_path))
    assert "video" in first.modalities and first.head["dtype"] in ("bfloat16", "float32")
    assert found(str(tmp_path) + "/.").head == first.head
    assert found(str(tmp_path), "half").head["dtype"] == "half"
    engine = found(str(tmp_path), asker="engine").head
    assert (engine["asker"], "server" in engine, "server" in first.head) == ("engine", False, True)
    config.write_text('{"architectures":  ["Qwen3VLForConditionalGeneration"]}')
    assert found(str(tmp_path)).head["files"] != first.head["files"]


class _About(BaseHTTPRequestHandler):
    """Says that it serves ``dpp`` up to a rate of .9."""

    identity: dict[str, str] | None = {"model": "0123"}

    def do_GET(self) -> None:
        known = self.path == "/v1/era"
        about = {
            "model": "m",
            "policy": "dpp",
            "modalities": ["image"],
            "levels": {"off": 0.0, "strong": 0.889},
            "settings": {"policy": "dpp"},
            "limits": {"min_pruning_rate": 0.0, "max_pruning_rate": 0.9},
            "versions": {},
            "identity": self.identity,
        }
        body = json.dumps(about if known else {}).encode()
        self.send_response(200 if known else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_a_server_says_itself_how_it_prunes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _About) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        found = _of_server(url, [0.0, 0.9], ServerAsker)
        assert (found.policy, found.modalities, found.title) == ("dpp", ["image"], "m")
        assert found.head["settings"] == {"policy": "dpp"} and found.levels["strong"] == 0.889
        assert found.head["identity"] == {"model": "0123"} and code(found, [Variant("dpp")]) == {}
        assert main(["eval", "--url", f"{url}/", "--rates", "0", ".92"]) == 2
        assert "--rates: got 0.92, the server allows [0, 0.9]" in capsys.readouterr().err
        assert main(["eval", "--url", f"{url}/v1"]) == 2
        assert "HTTPError" in capsys.readouterr().err
        monkeypatch.setattr(_About, "identity", None)
        assert main(["eval", "--url", url]) == 2
        assert "is an older era-vllm, which does not tell what it runs" in capsys.readouterr().err
        server.shutdown()


def test_a_policy_that_asks_is_evaluated_asking() -> None:
    theta = 'policy_options={"theta": 0.5}'
    given = argparse.Namespace(model=None, policies=["cdpruner", "dpp"], variant=[])
    names = ["cdpruner question_aware=true", "dpp"]
    assert [variant.name for variant in _variants(given)] == names
    given = argparse.Namespace(model=None, policies=["cdpruner"], variant=[theta])
    asking = f"cdpruner {theta} question_aware=true"
    assert [variant.name for variant in _variants(given)] == [names[0], asking]
    given.variant = ["question_aware=false"]
    with pytest.raises(ConfigError, match="add --era-question-aware"):
        _variants(given)
