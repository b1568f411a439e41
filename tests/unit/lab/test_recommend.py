"""The figures and the page of a recommendation, from hand-made answers; what is refused."""

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from era_vllm.cli.main import main
from era_vllm.cli.own_pictures import _prompts, read
from era_vllm.cli.recommend import KINDS, _flags
from era_vllm.config import LEVELS, EraConfig
from era_vllm.errors import ConfigError
from era_vllm.lab import CHECKPOINT
from era_vllm.lab import recommend_report as report
from era_vllm.lab.asking import Answer
from era_vllm.lab.evaluation import Row
from era_vllm.lab.media import png
from era_vllm.lab.recommendation import (
    PROMPTS,
    Prompt,
    Shown,
    levels,
    likeness,
    posterior,
    recommended,
    without_refused,
    word_f1,
    worst,
)
from era_vllm.policies import make_policy

NEAR, FAR = {1: -0.1, 2: -3.0}, {1: -3.0, 2: -0.1}
NAMES = dict(LEVELS)
LONG = "a red circle stands beside the word stop"


def row(rate: float, texts: list[list[str]], tokens: int, seconds: float, first=NEAR) -> Row:
    return Row("era", rate, [[Answer(t, tokens, seconds, first) for t in one] for one in texts])


def rows(pictures: int, wrong: int) -> list[Row]:
    """Two questions a picture; at .889 the second is another of some, at .944 of all."""
    whole = [["red", "2"]] * pictures
    some = [["red", "3" if at < wrong else "2"] for at in range(pictures)]
    return [
        row(0.0, whole, 100, 2.0),
        row(0.5, whole, 50, 1.5),
        row(0.889, some, 11, 1.0, FAR),
        row(0.944, [["red", "4"]] * pictures, 6, 1.0, FAR),
    ]


def test_what_is_to_be_served_reads_the_question_where_what_was_measured_did() -> None:
    assert _flags("dpp") == ["--era-policy", "dpp"]
    assert _flags("cdpruner") == ["--era-policy", "cdpruner", "--era-question-aware"]
    for policy in ("dpp", "cdpruner"):
        settings = {"policy": policy, "question_aware": "--era-question-aware" in _flags(policy)}
        make_policy(EraConfig.parse(settings))


def test_one_picture_of_many_is_read_where_one_is_enough(tmp_path: Path) -> None:
    for name in "abc":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    assert [one.name for one in read(tmp_path, None, "photo", 1, least=1)] == ["a.png"]
    with pytest.raises(ConfigError, match="has 1 pictures .* needed 2 or more"):
        read(tmp_path, None, "photo", 1)


def test_words_count_and_not_how_they_are_written() -> None:
    assert likeness("Stop!", "stop") == 1 == word_f1("stop.", "STOP")
    assert likeness("7.50", "7.5") == 0, "a number is one word"
    assert likeness("red circle", "red star") == 0, "short answers are the same or not"
    assert word_f1("red circle", "red star") == 0.5
    assert likeness(LONG, LONG.replace("red", "green")) == pytest.approx(7 / 8)
    assert word_f1("", "") == 1 and word_f1("red", "") == 0


def test_each_level_stands_against_the_unpruned_answers() -> None:
    whole, (light, strong, extreme) = levels(rows(50, 4), NAMES, 0.95)
    assert (light.name, strong.name, extreme.name) == ("light", "strong", "extreme")
    assert (whole.tokens, strong.tokens, strong.saved_tokens) == (100, 11, pytest.approx(0.89))
    assert (whole.seconds, strong.saved_seconds.value) == (2.0, pytest.approx(0.5))
    assert (strong.agreement.value, strong.same.value) == (pytest.approx(0.96),) * 2
    assert 0.88 < strong.agreement.low < 0.95 < strong.agreement.high < 1
    assert 0.5 < strong.sure < 0.95 and extreme.sure == 0
    assert (light.agreement.value, extreme.agreement.value) == (1, 0.5)
    assert light.kl is not None and strong.kl is not None
    assert light.kl.value == 0 and strong.kl.value > 1


def test_agreement_of_all_is_no_certainty() -> None:
    """Of 50 pictures of which all agree, .98 is likely and not sure; of 300 it is."""
    sure = [levels(rows(number, 0), NAMES, 0.98)[1][0] for number in (50, 300)]
    assert 0.8 < sure[0].sure < 0.9 and sure[1].sure > 0.99
    assert sure[0].agreement.low < 0.98 < sure[1].agreement.low


def test_an_answer_that_changed_makes_nothing_surer() -> None:
    """One, two, three ... of five answers about each of 50 pictures."""
    sums = [[5.0 - min(5, max(0, wrong - 5 * at)) for at in range(50)] for wrong in range(30)]
    found = [posterior(one, [5] * 50, 0.98) for one in sums]
    sure = [share for _, share in found]
    assert sure == sorted(sure, reverse=True) and sure[0] > sure[1] > sure[5]
    lows = [agreement.low for agreement, _ in found]
    assert lows == sorted(lows, reverse=True)
    assert all(one.low <= one.value <= one.high for one, _ in found)
    best = levels(rows(2, 0), NAMES, 0.98)[1]
    assert "too few pictures" in report.verdict(best[0], best, 2, 0.98, "x")[1]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *(("-5", "5"), ("+3", "-3"), ("50%", "50"), ("$5", "\u20ac5"), ("<5", ">5"), ("3.5", "35")),
        ("\u2605\u2605\u2605", "\u2605"),
        ("\u0915\u0940", "\u0915\u093f"),  # two vowels of Hindi
    ],
)
def test_signs_units_and_marks_count(one: str, other: str) -> None:
    assert likeness(one, one) == 1 and likeness(one, other) == 0


def test_scripts_without_blanks_go_by_the_letter() -> None:
    whole = "\u4e00\u53ea\u7ea2\u8272\u7684\u732b\u7ad9\u5728\u8def\u8fb9\u7684\u6811\u4e0b"
    assert 0.8 < likeness(whole, whole[:-1] + "\u4e0a") < 1
    assert likeness("Stop!", "stop") == likeness("a 5-year plan", "A 5 year plan.") == 1


def test_the_pictures_that_an_interval_needs() -> None:
    few, many = (levels(rows(n, n // 10), NAMES, 0.9)[1][1] for n in (40, 4000))
    needed = few.pictures_needed(40)
    assert 150 < needed < 300, "1.96 sqrt(.09 / n) / 2 = .02 at 216"
    assert many.pictures_needed(4000) == pytest.approx(216, rel=0.15)


def test_the_highest_rate_is_one_that_milder_ones_hold_too() -> None:
    _, found = levels(rows(50, 4), NAMES, 0.95)
    light, strong, _ = found
    assert recommended(found, 0.95) is strong
    assert recommended(found, 0.98) is light
    assert recommended(found[1:], 0.98) is None
    turned = levels([*rows(50, 4)[:2], *reversed(rows(50, 4)[2:])], NAMES, 0.95)[1]
    assert recommended(turned, 0.4).rate == 0.944  # type: ignore[union-attr]
    odd = rows(50, 4)
    odd[1], odd[3] = row(0.5, [["x", "y"]] * 50, 50, 1.0), row(0.944, [["red", "2"]] * 50, 6, 1.0)
    assert recommended(levels(odd, NAMES, 0.95)[1], 0.95) is None, "luck of a stronger one"


def shown(number: int) -> list[Shown]:
    media = (png(Image.new("RGB", (64, 32), "navy")),)
    prompts = (Prompt("what?"), Prompt("how many?"))
    return [Shown(f"{at}.png", media, prompts) for at in range(number)]


def test_the_worst_comes_first_and_a_picture_once() -> None:
    whole = row(0.0, [[LONG, "2"], [LONG, "2"], [LONG, "2"]], 9, 1)
    other = row(0.9, [[LONG[2:], "2"], ["no", "3"], [LONG, "2."]], 3, 1)
    found = worst(shown(3), whole, other, 9)
    assert [(one.subject, one.pruned) for one in found] == [(1, "no"), (0, LONG[2:])]
    assert len(worst(shown(3), whole, other, 1)) == 1
    surer = row(0.9, [["no", "2"], ["no", "2"]], 3, 1)
    surer.answers[1][0] = Answer("no", 3, 1, FAR)
    assert [one.subject for one in worst(shown(2), row(0.0, [["a", "2"]] * 2, 9, 1), surer, 9)] == [
        1,
        0,
    ], "of those alike, the further one in probability"


def test_what_a_server_refused_at_one_rate_counts_at_none() -> None:
    one, two = rows(3, 0)[:2]
    two.answers[1] = []
    subjects, left = without_refused(shown(3), [one, two])
    assert [subject.name for subject in subjects] == ["0.png", "2.png"]
    assert [len(each.answers) for each in left] == [2, 2]


class _Page(HTMLParser):
    """Collects addresses and tags; checks that they are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.addresses, self._open = list[str](), list[str](), list[str]()
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("img", "meta"):
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag


HEAD = {"model": "<m>", "pictures": 50, "questions": "2", "target": 0.95, "command": "era-vllm x"}


def page(target: float = 0.95) -> str:
    whole, found = levels(rows(50, 4), NAMES, target)
    best = recommended(found, target)
    (one,) = worst(shown(50), *[rows(50, 4)[at] for at in (0, 2)], 1)
    script = "<script>alert(1)</script>"
    bad = replace(one, question=script, whole=script, pruned=script)
    found = [replace(level, name=script) if level.rate > 0.9 else level for level in found]
    buffer = io.BytesIO()
    Image.new("RGB", (30, 30)).save(buffer, "PNG")
    cases = {
        "What changes": [report.Case("<b>.png", bad, buffer.getvalue(), buffer.getvalue())],
        "Not drawn": [report.Case("c.png", one, buffer.getvalue(), "not <drawn>")],
        "Nothing": [],
    }
    said = report.verdict(best, found, 50, target, "era-vllm serve m")
    return report.page(HEAD | {"target": target}, said, whole, found, best, cases)


def test_the_page_is_one_file_and_escapes_what_others_wrote() -> None:
    text = page()
    found = _Page(text)
    assert found.addresses and all(one.startswith("data:image/jpeg;") for one in found.addresses)
    assert not re.search(r"https?://|<script|<link|@import", text)
    assert text.count("&lt;script&gt;") >= 4, "level, question and both answers"
    assert "&lt;b&gt;.png" in text and "&lt;m&gt;" in text and "not &lt;drawn&gt;" in text
    assert "every answer has the same words" in text
    assert found.tags.count("img") == 3 and found.tags.count("svg") == 1
    assert '<tr class="best"><td>strong</td><td>0.889</td><td>11</td><td>89 %</td>' in text


def test_what_is_recommended_says_how_it_is_set_and_how_sure_it_is() -> None:
    _, found = levels(rows(50, 4), NAMES, 0.95)
    lines = report.verdict(found[1], found, 50, 0.95, "era-vllm serve m")
    assert lines[0] == "recommended: strong (rate 0.889), 89 % of the visual tokens less"
    assert "96.0 (" in lines[1] and "probability of" in lines[1]
    assert re.search(r"for an interval of \+-2 points about 2\d\d are needed$", lines[2])
    enough = levels(rows(400, 4), NAMES, 0.95)[1]
    assert "these are enough" in report.verdict(enough[1], enough, 400, 0.95, "x")[2]
    assert lines[3] == "for every request: era-vllm serve m --era-pruning-rate 0.889"
    assert '{"era": {"pruning_rate": 0.889}} or {"era": {"level": "strong"}}' in lines[4]
    none = report.verdict(None, found, 50, 0.999, "era-vllm serve m")
    assert none[0] == "recommended: no pruning (off)" and "light (rate 0.5)" in none[1]
    assert '<div class="verdict">' in page() and '<div class="verdict">' in page(0.99)
    text = report.text_of(report.table(*levels(rows(50, 4), NAMES, 0.95)))
    assert text.splitlines()[1].startswith("off") and "89 %" in text


def test_every_kind_has_questions_of_its_own() -> None:
    assert set(PROMPTS) == set(KINDS)
    assert len({text for some in PROMPTS.values() for text in some}) == 15


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "pictures"
    made.mkdir()
    for name in ("a.png", "b.jpg"):
        Image.new("RGB", (32, 32), "red").save(made / name)
    (made / "notes.txt").write_text("no picture")
    return made


def test_prompts_are_lines_or_stand_beside_a_picture(tmp_path: Path) -> None:
    text, rows = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_text("what is it?\n\n  how many? \n")
    assert _prompts(text, []) == (["what is it?", "how many?"], {})
    lines = [("a.png", "what?"), ("b.jpg", "who?"), ("a.png", "why?")]
    body = [json.dumps({"picture": p, "question": q, "answer": "x"}) for p, q in lines]
    rows.write_text("\n".join(body))
    found = _prompts(rows, ["a.png", "b.jpg"])
    assert found == ((), {"a.png": ["what?", "why?"], "b.jpg": ["who?"]})


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["{folder}", "nosuch"], "PROMPTS: 'nosuch' cannot be read"),
        (["{folder}", "{empty}"], "is empty, needed a question a line"),
        (["{folder}", "{bad}"], 'line 2 of \'{bad}\': needed {"picture": "a.png"'),
        (["{folder}", "{lost}"], "got picture 'c.png', which is no picture file of the folder"),
        (["nosuch"], "PICTURES: got 'nosuch', needed a folder of pictures"),
        (["{one}"], "has 1 pictures that can be asked about, needed 2 or more"),
        (["{folder}", "--target", "98"], "--target: got 98, allowed: above 0, at most 1"),
        (["{folder}", "--count", "1"], "--count: got 1, allowed: 2 or more"),
        (["{folder}", "--rates", "1.5"], "--rates: got 1.5, allowed: numbers in [0, 0.95]"),
        (["{folder}", "--policy", "eral"], "eral"),
        (["{folder}", "--url", "http://127.0.0.1:1"], "needed the address of a server"),
        (["{folder}", "--url", "http://x", "--policy", "dpp"], "leave it out with --url"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    flags: list[str], said: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "bad.jsonl").write_text('{"picture": "a.png", "question": "x"}\n{"picture": "a"}\n')
    (tmp_path / "lost.jsonl").write_text('{"picture": "c.png", "question": "x"}\n')
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.png").write_bytes((folder / "a.png").read_bytes())
    places = {"{folder}": folder, "{one}": tmp_path / "one", "{empty}": tmp_path / "empty.txt"}
    places |= {"{bad}": tmp_path / "bad.jsonl", "{lost}": tmp_path / "lost.jsonl"}
    for name, place in places.items():
        flags = [word.replace(name, str(place)) for word in flags]
        said = said.replace(name, str(place))
    model = [] if "--url" in flags else [str(CHECKPOINT)]
    assert main(["recommend", *model, *flags, "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_picture_that_cannot_be_read_is_named_and_left_out(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "b.jpg").write_bytes((folder / "b.jpg").read_bytes()[:200])
    assert main(["recommend", str(folder), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"left out: image {str(folder / 'b.jpg')!r}" in said
    assert "has 1 pictures" in said
