"""Which rate is safe for pictures without labels: answers at each rate against the unpruned ones.

What nobody has labelled can still be compared: a rate is safe where the model says what it says
unpruned. Leaves out the asking (``evaluation.py``), and the page (``recommend_report.py``).
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from era_vllm.lab.evaluation import Row
from era_vllm.lab.media import Medium
from era_vllm.lab.scores import Estimate, agreement, alike, divergence, estimate, kl, ratio

SHORT: Final = 5
"""Words of an unpruned answer up to which another one is the same or is not."""
HALF_WIDTH: Final = 0.02
"""Of the interval that an agreement should have."""
PROMPTS: Final[Mapping[str, tuple[str, ...]]] = {
    "photo": (
        "What is the main thing in this picture? Answer in one or two words.",
        "How many people are in this picture? Answer with a number.",
        "What colour is the largest thing? Answer in one word.",
        "Is this indoors or outdoors? Answer in one word.",
        "Describe this picture in one sentence.",
    ),
    "document": (
        "What kind of document is this? Answer in one or two words.",
        "What is its title or first line? Answer with its words alone.",
        "What is the largest number in it? Answer with the number alone.",
        "What date stands in it? Answer with the date alone, or none.",
        "Who wrote or issued it? Answer with the name alone, or unknown.",
    ),
    "chart": (
        "What is the title of this chart? Answer with its words alone.",
        "What is the largest value? Answer with the number alone.",
        "Which category has the smallest value? Answer with its name alone.",
        "What does the horizontal axis show? Answer in a few words.",
        "Which way do the values go? Answer in one sentence.",
    ),
}
"""Kind of pictures -> what they are asked, where the user names no questions."""
DRAWS: Final = 4000
_NO_BLANKS: Final = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
)
"""Thai, Lao, Burmese, Khmer, kana, Chinese characters."""
_MARKS: Final = "\u0300-\u036f\u0900-\u0dff\u200d"
"""Letters' own marks, and the scripts of India, whose vowels are marks."""
_WORD: Final = re.compile(
    rf"[{_NO_BLANKS}]"
    r"|(?:(?<!\w)[-+\u2212<>\u2264\u2265~])?[$\u20ac\u00a3\u00a5]?\d+(?:[.,:/]\d+)*[%\u00b0\u2030$\u20ac\u00a3\u00a5]?"
    rf"|(?:(?![{_NO_BLANKS}])[\w{_MARKS}])+"
    r"|[^\w\s.,:;!?'\"()\[\]{}\u3001\u3002\uff0c\u201c\u201d\u2018\u2019*_`#-]"
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question without a known answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Shown:
    """A picture of the user's, and what is asked about it."""

    name: str
    media: tuple[Medium, ...]
    questions: tuple[Prompt, ...]


@dataclass(frozen=True, slots=True)
class Level:
    """What a rate does to the answers about all pictures, against rate 0."""

    rate: float
    name: str | None
    tokens: float
    """Visual tokens of a picture, the mean."""
    seconds: float
    """Of a question, the mean; others are under way beside it."""
    saved_tokens: float
    """Of the unpruned ones, 0 to 1."""
    saved_seconds: Estimate
    """Of the unpruned ones, 0 to 1."""
    agreement: Estimate
    """Mean over questions of ``likeness``."""
    sure: float
    """How likely the agreement reaches the target (``posterior``)."""
    same: Estimate
    """Answers that are the same to the letter, but for case and punctuation."""
    f1: Estimate
    """Mean ``word_f1`` of all answers."""
    kl: Estimate | None
    """Of first tokens (``scores.kl``)."""

    def pictures_needed(self, pictures: int) -> int:
        """Return how many would narrow the agreement's interval to +- 2 points."""
        half = (self.agreement.high - self.agreement.low) / 2
        return math.ceil(pictures * (half / HALF_WIDTH) ** 2)


@dataclass(frozen=True, slots=True)
class Disagreement:
    """An answer that pruning changed."""

    subject: int
    question: str
    whole: str
    pruned: str
    likeness: float
    kl: float
    """Of the first token; 0 where none was told."""


def words_of(answer: str) -> list[str]:
    """Return an answer's words and numbers, without case or punctuation.

    Numbers keep sign and unit, what is no word or punctuation counts as it is, and scripts without
    blanks go by the letter.
    """
    return _WORD.findall(unicodedata.normalize("NFC", answer.lower()))


def word_f1(whole: str, other: str) -> float:
    """Return the F1 of the words of two answers, in any order; of two without words, 1.

    Source: Rajpurkar et al. 2016, arXiv:1606.05250, Sec. 6.1; differs: articles count.
    """
    one, two = Counter(words_of(whole)), Counter(words_of(other))
    if not one and not two:
        return 1.0
    return 2 * (one & two).total() / (one.total() + two.total())


def is_same(whole: str, other: str) -> bool:
    """Return whether two answers are the same words."""
    return words_of(whole) == words_of(other)


def likeness(whole: str, other: str) -> float:
    """Return 1 or 0 for a short unpruned answer, for a longer one the F1 of the words."""
    short = len(words_of(whole)) <= SHORT
    return float(is_same(whole, other)) if short else word_f1(whole, other)


def levels(
    rows: Sequence[Row], names: Mapping[str, float], target: float
) -> tuple[Level, list[Level]]:
    """Compare rows with the first of them, which is unpruned.

    Args:
        rows: Of the same pictures, by rate.
        names: Names of rates.
        target: Agreement that is wanted, 0 to 1.

    Returns: the unpruned level, and the others.
    """
    whole, *pruned = rows
    named = {rate: name for name, rate in names.items()}
    kinds = ("picture",) * len(whole.answers)
    asked = [len(given) for given in whole.answers]
    before_s = _seconds(whole)
    found: list[Level] = []
    for row in rows:
        seconds = _seconds(row)
        both = whole.answers, row.answers
        agreed, sure = posterior(alike(*both, likeness), asked, target)
        found.append(
            Level(
                row.rate,
                named.get(row.rate),
                row.tokens,
                sum(seconds) / sum(asked),
                1 - row.tokens / whole.tokens,
                estimate(1 - ratio(kinds, seconds, asked) / ratio(kinds, before_s, asked)),
                agreed,
                sure,
                agreement(kinds, *both, is_same),
                agreement(kinds, *both, word_f1),
                divergence(kinds, row.answers, whole.answers),
            )
        )
    return found[0], found[1:]


def _seconds(row: Row) -> list[float]:
    return [sum(answer.seconds for answer in given) for given in row.answers]


def posterior(
    agreed: Sequence[float], asked: Sequence[int], target: float
) -> tuple[Estimate, float]:
    """Return an agreement with its interval, and how likely the target is reached.

    Bayesian bootstrap over pictures, with one more whose agreement may be any: pictures weigh as
    exponential draws do. Resamples alone would call an agreement of all certain, and one of nearly
    all surer than that.

    Args:
        agreed: Sum over each picture's questions.
        asked: How many they are.

    Source: Rubin 1981, "The Bayesian Bootstrap"; the further picture is ours.
    """
    lots, sums, counts = np.random.default_rng(0), np.asarray(agreed), np.asarray(asked)
    weights = lots.exponential(size=(DRAWS, len(sums)))
    more = lots.exponential(size=DRAWS) * counts.mean()
    drawn = (weights @ sums + more * lots.random(DRAWS)) / (weights @ counts + more)
    value = float(sums.sum() / counts.sum())
    low, high = np.percentile(drawn, (2.5, 97.5))
    found = Estimate(value, min(float(low), value), max(float(high), value))
    return found, float((drawn >= target).mean())


def recommended(found: Sequence[Level], target: float) -> Level | None:
    """Return the highest rate that reaches the target as all milder ones do; None: no rate does."""
    best = None
    for level in sorted(found, key=lambda level: level.rate):
        if level.agreement.value < target:
            break
        best = level
    return best


def worst(subjects: Sequence[Shown], whole: Row, row: Row, most: int) -> list[Disagreement]:
    """Return where a row is furthest from the unpruned one, a question a picture at most."""
    found: list[Disagreement] = []
    for at, (subject, *both) in enumerate(zip(subjects, whole.answers, row.answers, strict=True)):
        pairs = zip(subject.questions, *both, strict=True)
        differ = [
            Disagreement(
                at,
                question.text,
                a.text,
                b.text,
                likeness(a.text, b.text),
                kl(a.first, b.first) if a.first and b.first else 0.0,
            )
            for question, a, b in pairs
            if not is_same(a.text, b.text)
        ]
        found += sorted(differ, key=_order)[:1]
    return sorted(found, key=_order)[:most]


def _order(one: Disagreement) -> tuple[float, float]:
    return one.likeness, -one.kl


def without_refused(
    subjects: Sequence[Shown], rows: Sequence[Row]
) -> tuple[list[Shown], list[Row]]:
    """Leave out the pictures that a server refused at any rate."""
    left = [at for at in range(len(subjects)) if all(row.answers[at] for row in rows)]
    kept = [Row(row.variant, row.rate, [row.answers[at] for at in left]) for row in rows]
    return [subjects[at] for at in left], kept
