"""One picture of a load test: four figures against concurrency, one line a level."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

_PANELS: Final = (
    ("rps", None, "requests a second"),
    ("ttft_ms", "ttft_p90_ms", "time to first token, ms (median; thin: p90)"),
    ("tpot_ms", "tpot_p90_ms", "time per output token, ms (median; thin: p90)"),
    ("goodput_rps", None, "goodput: requests a second within limits"),
)
_COLOURS: Final = ("#555555", "#2e6fe4", "#f2b134", "#e4572e", "#3a9e6f")


def draw(
    path: Path,
    title: str,
    figures: Mapping[str, Mapping[int, Mapping[str, float]]],
    limits: Mapping[str, float],
) -> None:
    """Draw it.

    Args:
        path: PNG.
        title: Over everything: which model.
        figures: Level -> concurrency -> measure -> value.
        limits: Of the goodput, ms.
    """
    from matplotlib.figure import Figure  # no pyplot: no state, no window

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    for axis, (measure, tail, name) in zip(figure.subplots(2, 2).flat, _PANELS, strict=True):
        for colour, (level, of_level) in zip(_COLOURS * 4, figures.items(), strict=False):
            xs = sorted(of_level)
            axis.plot(xs, [of_level[x][measure] for x in xs], "o-", color=colour, label=level)
            if tail is not None:
                axis.plot(xs, [of_level[x][tail] for x in xs], "-", color=colour, linewidth=0.6)
        axis.set_xscale("log", base=2)
        axis.set_xticks(xs, [str(x) for x in xs])
        axis.set_ylim(bottom=0)
        axis.set_xlabel("concurrency")
        axis.set_title(name, loc="left", fontsize=9)
    figure.axes[0].legend(title="level", fontsize=8)
    kept = ", ".join(f"{name.upper()} {limit:g} ms" for name, limit in limits.items())
    figure.suptitle(f"{title}; goodput limits: {kept}", fontsize=9)
    figure.savefig(path, dpi=130)
