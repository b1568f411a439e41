"""What is asked, kept and gone on with; the page. The servers of these tests answer by rule."""

import json
from contextlib import contextmanager
from pathlib import Path

import pytest
from tqdm import tqdm

from era_vllm.cli.main import main
from era_vllm.errors import ConfigError
from era_vllm.lab import evaluation
from era_vllm.lab.asking import Answer
from era_vllm.lab.eval_report import draw, markdown, scored
from era_vllm.lab.evaluation import Answers, Variant, cells, evaluate
from era_vllm.lab.samples import load_task_samples

RATES = (0.0, 0.5, 0.9)
PLAIN, WITHOUT = Variant("era"), Variant("era", (("bias", False),))
HEAD = {"model": "m", "tasks": {"picture": 4}, "seed": 1}


class Rule:
    """Answers right up to a rate of .5, and ends after so many subjects."""

    asked: list[tuple[str, float]] = []
    left = 10**6

    def __init__(self, url: str, rate: float) -> None:
        self.url, self.rate = url, rate

    def each(self, subjects):
        for subject in subjects:
            if Rule.left == 0:
                raise KeyboardInterrupt
            Rule.left -= 1
            Rule.asked.append((self.url, self.rate))
            right = self.rate <= 0.5
            yield [Answer(q.answer if right else "x", 10) for q in subject.questions]


@pytest.fixture(autouse=True)
def rule(monkeypatch: pytest.MonkeyPatch):
    Rule.asked, Rule.left = [], 10**6
    monkeypatch.setattr(evaluation, "ServerAsker", Rule)


@contextmanager
def served(variant: Variant):
    yield variant.name


def run(folder: Path):
    subjects = load_task_samples()
    wanted = cells([PLAIN, WITHOUT], RATES)
    with tqdm(total=len(wanted) * len(subjects), disable=True) as shown:
        rows = list(evaluate(subjects, wanted, Answers(folder, HEAD), served, shown))
    return subjects, rows


def test_a_variant_is_a_server_and_rate_0_is_asked_once(tmp_path: Path) -> None:
    subjects, rows = run(tmp_path)
    assert [(row.variant, row.rate) for row in rows] == [
        ("era", 0.0), ("era", 0.5), ("era", 0.9), ("era bias=false", 0.5), ("era bias=false", 0.9)
    ]  # fmt: skip
    assert len(Rule.asked) == 5 * len(subjects)
    assert WITHOUT.variables() == {"ERA_POLICY": "era", "ERA_BIAS": "false"}


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
    assert len(Rule.asked) == 18 + 5 * len(subjects) - 17
    with pytest.raises(ConfigError, match=r"differs in seed.*name another folder"):
        Answers(tmp_path, {**HEAD, "seed": 2})


def test_the_page_has_each_row_against_the_unpruned_one(tmp_path: Path) -> None:
    found = scored(*run(tmp_path))
    head = {**HEAD, "command": "era-vllm eval", "commit": "c", "hardware": "h", "date": "d"}
    page = markdown(head, found)
    lines = [line for line in page.splitlines() if line.startswith(("| unpruned", "| era"))]
    assert lines[0].startswith("| unpruned | 0 | 10.0 | 100.0 (100.0 to 100.0) | - |")
    against = "+0.0 (+0.0 to +0.0)"
    assert lines[1].startswith(f"| era | 0.5 | 10.0 | 100.0 (100.0 to 100.0) | {against} |")
    assert lines[4].startswith("| era bias=false | 0.9 | 10.0 | 0.0 (0.0 to 0.0) | -100.0 ")
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
        (["--variant", "bias"], "--variant: got 'bias', needed NAME=VALUE"),
        (["--variant", "biass=false"], "biass"),
        (["MODEL", "--url", "http://x"], "MODEL and --url: choose one"),
        (["--url", "http://x", "--policies", "dpp"], "leave them out with --url"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", *flags]) == 2
    assert said in capsys.readouterr().err
