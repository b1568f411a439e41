"""One picture (PNG) a benchmark, its title over everything; by matplotlib (the ``lab`` extra)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from era_vllm.bench.clock import PowerLaw, Samples

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from era_vllm.lab.scores import Estimate, Score

STAGES: Final = {
    "tower": "#9aa5b1",
    "projector": "#c7ced6",
    "scout": "#8f3fae",
    "reducer": "#e4572e",
    "merge": "#f2b134",
    "language_model": "#2e6fe4",
    "rest": "#dddddd",
}
"""Parts of the time to the first token in their order, and their colours."""
_OTHER: Final = "#2e6fe4"


def bars(
    path: Path,
    title: str,
    samples: Samples,
    panels: Mapping[str, tuple[Sequence[str], Sequence[str]]],
) -> None:
    """Draw medians as stacked bars.

    Args:
        panels: Title -> cells, a bar each, and measures, its parts from the left.
    """
    heights = [1 + len(cells) for cells, _ in panels.values()]
    figure, axes = _figure(len(panels), 1, (8.5, 0.9 + 0.33 * sum(heights)), heights)
    for axis, (name, (cells, measures)) in zip(axes, panels.items(), strict=True):
        left = [0.0] * len(cells)
        for part in measures:
            widths = [samples.median(cell, part) or 0.0 for cell in cells]
            if any(widths):
                colour, label = STAGES.get(part, _OTHER), part.replace("_", " ")
                axis.barh(list(cells), widths, left=left, color=colour, label=label)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axis.invert_yaxis()
        axis.set_title(name, loc="left", fontsize=10)
        axis.set_xlabel("seconds (medians)")
        if len(axis.get_legend_handles_labels()[0]) > 1:
            axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, title, path)


def growth(
    path: Path,
    title: str,
    shares: Mapping[str, Mapping[str, float]],
    limit: float,
    curves: Mapping[str, Mapping[str, tuple[Sequence[int], Sequence[float], PowerLaw | None]]],
) -> None:
    """Draw shares of a whole beside times over sizes with their fits.

    Args:
        shares: Policy -> size -> share of the tower's time.
        limit: The share that is the goal.
        curves: Axis's name ("n", "k") -> policy -> sizes, seconds, fitted law.
    """
    figure, axes = _figure(1, 1 + len(curves), (4.2 * (1 + len(curves)), 3.8))
    for policy, of_size in shares.items():
        percent = [100 * share for share in of_size.values()]
        axes[0].plot(list(of_size), percent, "o-", label=policy)
    axes[0].axhline(100 * limit, color="grey", linestyle="--", label=f"goal, {limit:.0%}")
    axes[0].set_ylabel("% of the vision tower's time")
    axes[0].set_yscale("log")
    for axis, (name, of_policy) in zip(axes[1:], curves.items(), strict=True):
        for policy, (sizes, seconds, law) in of_policy.items():
            (line,) = axis.loglog(sizes, seconds, "o", label=policy)
            if law is not None:
                label = f"{name.upper()}^{law.exponent:.2f}"
                axis.loglog(sizes, list(map(law, sizes)), color=line.get_color(), label=label)
        axis.set_xlabel(name.upper())
        axis.set_ylabel("seconds (medians)")
    for axis in axes:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    _save(figure, title, path)


def segments(
    path: Path,
    title: str,
    panels: Mapping[str, Mapping[str, tuple[Sequence[int], Sequence[float]]]],
    answers: "Mapping[str, tuple[Score, Estimate]]",
) -> None:
    """Draw values over the tokens of a block, and right answers against those of whole pictures.

    Args:
        panels: What is measured -> line -> blocks' tokens, values.
        answers: Case -> right answers, and how many more than whole.
    """
    figure, axes = _figure(1, 1 + len(panels), (4.2 * (1 + len(panels)), 3.8))
    for axis, (name, lines) in zip(axes, panels.items(), strict=False):
        for label, (x, y) in lines.items():
            axis.plot(x, y, "o-", label=label)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("tokens of a block, at most")
        axis.set_ylabel(name)
        axis.legend(fontsize=7)
    axes[0].set_yscale("log")
    gains = [gain for _, gain in answers.values()]
    ends = [(gain.value - gain.low, gain.high - gain.value) for gain in gains]
    spans = [[100 * max(0.0, end) for end in side] for side in zip(*ends, strict=True)]
    means = [100 * gain.value for gain in gains]
    axes[-1].errorbar(means, list(answers), xerr=spans, fmt="o", color=_OTHER)
    axes[-1].axvline(0, color="grey", linestyle="--")
    axes[-1].set_xlabel("right against whole, % of questions")
    _save(figure, title, path)


def _figure(
    rows: int, columns: int, size: tuple[float, float], heights: Sequence[int] | None = None
) -> "tuple[Figure, list[Axes]]":
    from matplotlib.figure import Figure  # no pyplot: no state, no window

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, height_ratios=heights)
    return figure, list(axes.flat)


def _save(figure: "Figure", title: str, path: Path) -> None:
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=130)
