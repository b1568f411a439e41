"""``era-vllm recommend``: the highest pruning rate at which answers about one's pictures stay.

Leaves out the pictures (``own_pictures.py``), who answers (``askers.py``), the figures
(``lab/recommendation.py``) and the page (``lab/recommend_report.py``).
"""

import argparse
import json
import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Final

from era_vllm.cli import askers
from era_vllm.cli.own_pictures import fingerprint, read
from era_vllm.cli.preflight import check_least, check_out
from era_vllm.config import DEFAULT_POLICY
from era_vllm.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from era_vllm.lab.asking import ServerAsker
    from era_vllm.lab.evaluation import Row
    from era_vllm.lab.recommend_report import Case
    from era_vllm.lab.recommendation import Level, Shown

DESCRIPTION: Final = """Find how much can be pruned of pictures of your own. No labels are needed.

  era-vllm recommend MODEL photos                     MODEL is a folder; a server is started for it
  era-vllm recommend --url http://HOST:8000 photos    a server that is up
  era-vllm recommend MODEL scans --kind document      what documents (or charts) are usually asked
  era-vllm recommend MODEL scans questions.txt        your questions: a line each, of every picture
  era-vllm recommend MODEL scans questions.jsonl      {"picture": "a.png", "question": "..."} a line

Asks about each picture unpruned, then at each level, and compares the answers: a rate is safe where
the model says what it says unpruned. Recommends the highest rate whose agreement reaches --target,
as all milder rates do, and says how sure that is and how many pictures would make it surer. What
changed is in the report to be looked at: a different answer is not always a worse one.
Writes recommend.html (one file), recommend.json, and each answer to answers.jsonl, to --out: the
same command goes on where it was stopped.
"""
KINDS: Final = ("photo", "document", "chart")
_SERVER: Final = "--enforce-eager --max-model-len auto --max-num-seqs 8 --kv-cache-memory-bytes 1G"
_PAGES: Final = ("recommend.html", "recommend.json")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="a folder (default: the sample model)")
    add("pictures", type=Path, metavar="PICTURES", help="a folder of picture files")
    text = "a question a line, or JSON lines with picture and question (default: those of --kind)"
    add("prompts", nargs="?", type=Path, metavar="PROMPTS", help=text)
    text = "whose questions are asked where you name none (default photo)"
    add("--kind", choices=KINDS, default="photo", help=text)
    text = "agreement that is wanted, 0 to 1 (default .98)"
    add("--target", type=float, default=0.98, metavar="A", help=text)
    text = "pruning rates (default: the levels light, medium, strong and extreme, or the server's)"
    add("--rates", nargs="+", type=float, metavar="R", help=text)
    text = "pictures asked about at most, evenly spaced in the folder (default 100)"
    add("--count", type=int, default=100, metavar="N", help=text)
    add("--max-tokens", type=int, default=64, metavar="N", help="of an answer (default 64)")
    text = "disagreements shown of a level at most (default 6)"
    add("--worst", type=int, default=6, metavar="N", help=text)
    add("--policy", metavar="NAME", help=f"how MODEL's server prunes (default {DEFAULT_POLICY})")
    text = "default: out/recommend"
    add("--out", type=Path, default=Path("out/recommend"), metavar="DIR", help=text)
    askers.add_options(parser, _SERVER)


def run(arguments: argparse.Namespace) -> int:
    """Ask, write the page, and say what is recommended."""
    if arguments.url and arguments.model and arguments.prompts is None:  # there is no MODEL then
        arguments.prompts, arguments.pictures = arguments.pictures, Path(arguments.model)
        arguments.model = None
    _check(arguments)
    from era_vllm.bench.provenance import command, provenance
    from era_vllm.lab import recommendation as figures
    from era_vllm.lab.evaluation import Variant, cells

    rates, most = sorted(set(arguments.rates or ()) - {0.0}), arguments.max_tokens
    source = askers.source(arguments, [0.0, *rates], most, server=_SERVER, passes_over=True)
    rates = rates or sorted(set(source.levels.values()) - {0.0})
    if not rates:
        raise ConfigError("--rates: got none above 0, and the server has no level; name some")
    asked, out = (arguments.pictures, arguments.prompts, arguments.kind), arguments.out
    subjects = read(*asked, arguments.count)
    check_out(out, _PAGES)
    origin, own = provenance(), askers.variant_of(arguments.policy or DEFAULT_POLICY)
    variant = Variant(source.policy) if source.policy else own
    head = {**source.head, "max_tokens": most, "asked": fingerprint(subjects)}
    head |= {"policy": variant.policy, "commit": origin["commit"], "versions": origin["versions"]}
    head |= askers.code(source, [variant])
    wanted = cells([variant], [0.0, *rates])
    with source.asker_of(variant) as asker:
        rows = askers.answered(
            "recommend", out, head, subjects, wanted, lambda _: nullcontext(asker)
        )
        left, rows = figures.without_refused(subjects, rows)
        if len(left) < 2:
            raise ConfigError(
                f"PICTURES: {len(left)} of {len(subjects)} were answered at every rate, needed "
                f"2 or more; why is above; to ask again, remove {str(out / 'answers.jsonl')!r}"
            )
        whole, pruned = figures.levels(rows, source.levels, arguments.target)
        best = figures.recommended(pruned, arguments.target)
        cases = _cases(arguments, left, rows, best, asker)  # type: ignore[arg-type]
    questions = sum(len(subject.questions) for subject in left) / len(left)
    about = {**origin, "model": source.title, "pictures": len(left), "target": arguments.target}
    about |= {"questions": f"{questions:g}", "command": command()}
    about["refused"] = sorted({one.name for one in subjects} - {one.name for one in left})
    _write(arguments, about, head, [whole, *pruned], best, cases)
    return 0


def _write(
    arguments: argparse.Namespace,
    about: dict[str, object],
    head: dict[str, object],
    levels: "Sequence[Level]",
    best: "Level | None",
    cases: "dict[str, list[Case]]",
) -> None:
    """Write both files, and print table and verdict."""
    from era_vllm.lab import recommend_report as report

    whole, *pruned = levels
    number = int(str(about["pictures"]))
    words = [] if arguments.url else ["era-vllm", "serve", *filter(None, [arguments.model])]
    words += _flags(arguments.policy) if arguments.policy else []
    command = shlex.join(words)
    said = report.verdict(best, pruned, number, arguments.target, command)
    if refused := list(map(str, about["refused"])):  # type: ignore[call-overload]
        more = f" and {len(refused) - 5} more" if len(refused) > 5 else ""
        said.append(f"left out, as the server refused them: {', '.join(refused[:5])}{more}")
    page, figures = (arguments.out / name for name in _PAGES)
    print(report.text_of(report.table(whole, pruned)), "", *said, "", sep="\n")
    found = {
        **about,
        "source": head,
        "recommended": best and best.rate,
        "pictures_needed": best and best.pictures_needed(number),
        "levels": [asdict(level) for level in levels],
        "disagreements": {
            title: [{"picture": case.picture, **asdict(case.found)} for case in some]
            for title, some in cases.items()
        },
    }
    figures.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = report.page(about, said, whole, pruned, best, cases)
    page.write_text(text, encoding="utf-8", errors="replace")  # a file's name may be any bytes
    print(f"{page} shows what changed; {figures}")


def _check(arguments: argparse.Namespace) -> None:
    if not 0 < arguments.target <= 1:
        raise ConfigError(f"--target: got {arguments.target:g}, allowed: above 0, at most 1")
    check_least(arguments, count=2, max_tokens=1, worst=0)
    if arguments.url and arguments.policy:
        raise ConfigError("--policy: a server that is up has its own; leave it out with --url")
    if arguments.policy:
        from era_vllm.policies import defaults, make_policy

        make_policy(defaults(arguments.policy))


def _flags(policy: str) -> list[str]:
    """Return what makes a server prune as one did that was started for it (``variant_of``)."""
    asks = askers.variant_of(policy).options
    return ["--era-policy", policy, *(["--era-question-aware"] if asks else [])]


def _cases(
    arguments: argparse.Namespace,
    subjects: "Sequence[Shown]",
    rows: "Sequence[Row]",
    best: "Level | None",
    asker: "ServerAsker",
) -> "dict[str, list[Case]]":
    """Return what changes at the rate that is recommended, and at the next one."""
    from era_vllm.lab.recommend_report import Case
    from era_vllm.lab.recommendation import worst
    from era_vllm.lab.screen import bar

    whole, *pruned = rows
    place = next((at for at, row in enumerate(pruned) if best and row.rate == best.rate), -1)
    titles = ["What changes at the recommended rate"] if best else []
    chosen = pruned[max(place, 0) : place + 2]
    titles.append("What would change at the next rate" if best else "What changes at the mildest")
    found: dict[str, list[Case]] = {}
    for title, row in zip(titles, chosen, strict=False):
        some = worst(subjects, whole, row, arguments.worst)
        with bar(len(some), "drawing", "picture") as shown:
            cases = found.setdefault(f"{title}, {row.rate:g}", [])
            for one in some:
                subject = subjects[one.subject]
                try:
                    kept: bytes | str = asker.drawn(subject.media[0], row.rate)
                except UnsupportedError as error:
                    kept = f"not drawn: {error}"
                cases.append(Case(subject.name, one, subject.media[0].data, kept))
                shown.update()
    return found
