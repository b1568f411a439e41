"""What a soak is judged by, and its report for people."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from traffic import Outcome
from watch import SETTLED, Watch

from era_vllm.lab.screen import progress


@dataclass(slots=True)
class Judgement:
    """The checks of a run, and the figures behind them."""

    checks: list[dict[str, object]] = field(default_factory=list)
    facts: dict[str, object] = field(default_factory=dict)

    def check(self, name: str, got: object, passed: bool) -> None:
        """Add a verdict."""
        self.checks.append({"check": name, "passed": passed, "got": got})
        progress(f"{'passed' if passed else 'FAILED'}: {name}: {got}")

    @property
    def passed(self) -> bool:
        """Whether all checks passed."""
        return all(check["passed"] for check in self.checks)


def judge(
    outcomes: Sequence[Outcome], watch: Watch, allowed_kib: float, judgement: Judgement
) -> None:
    """Check the load's outcomes and the memory; its ``facts`` hold the load.

    Args:
        outcomes: Of all requests that were sent.
        watch: Samples of the whole load.
        allowed_kib: Growth of the server's memory a request.
        judgement: Added to.
    """
    ends = Counter(outcome.ended for outcome in outcomes)
    for ended, name in (
        ("wrong", "answers that differ from the unloaded server's"),
        ("lost", "requests without an end in time"),
        ("error", "errors that were not asked for"),
    ):
        said = [f"{o.name}: {o.said}" for o in outcomes if o.ended == ended]
        judgement.check(name, said[:5] or 0, not said)
    judgement.check("right answers under overload", ends["right"], ends["right"] > 0)
    judgement.check("503 with Retry-After for what is too much", ends["shed"], ends["shed"] > 0)
    judgement.check("broken requests refused", ends["refused"], ends["refused"] > 0)
    judgement.check("clients that left", ends["left"], ends["left"] > 0)
    slope, total = watch.slope(), watch.total()
    kib = slope * 1024 / (60 * judgement.facts["load"]["sent_rps"])
    judgement.facts["memory_mib"] = {
        "slope_a_minute": slope,
        "kib_a_request": kib,
        "first": total[0],
        "settled": total[int(len(total) * SETTLED)],
        "last": total[-1],
        "by_process": {
            name: {"first": held[0], "last": held[-1]} for name, held in watch.mib.items()
        },
        "times_s": [round(at - watch.times_s[0], 1) for at in watch.times_s],
        "total": [round(mib, 1) for mib in total],
    }
    judgement.check(
        f"memory grows by at most {allowed_kib:g} KiB a request",
        f"{kib:.1f}",
        kib <= allowed_kib,
    )


def page(report: dict[str, object]) -> str:
    """Return the report for people."""
    load, memory = report["load"], report["memory_mib"]
    ends = ", ".join(f"{name} {count}" for name, count in sorted(load["ends"].items()))
    lines = [
        f"soak of era_vllm {report['commit']}: {'PASSED' if report['soak'] else 'FAILED'}",
        f"{report['hardware']}; vllm {report['versions']['vllm']}; {report['date']}",
        f"server: {report['server']}",
        "",
        f"capacity   {report['capacity_rps']:.1f} requests/s in a closed loop",
        f"load       {load['sent_rps']:.1f} requests/s for {load['seconds']:.0f} s: {load['sent']}",
        f"ends       {ends}",
        f"memory     {memory['first']:.0f} MiB first, {memory['settled']:.0f} settled, "
        f"{memory['last']:.0f} last; {memory['slope_a_minute']:+.2f} MiB a minute, "
        f"{memory['kib_a_request']:+.1f} KiB a request",
        "",
        *(
            f"{'passed' if check['passed'] else 'FAILED':<8}{check['check']}: {check['got']}"
            for check in report["checks"]
        ),
    ]
    return "\n".join(lines) + "\n"
