"""Figures for the report and the curves: points and metrics in, pictures out. Knows no report.

Colours are those of Okabe and Ito, which colour-blind readers tell apart; classes differ in line style too.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import wraps
from itertools import cycle
from typing import Any, Concatenate, ParamSpec

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vitmodel.metrics.curve_data import Band, DecisionCurve, Histogram, PrecisionRecall, Reliability, Roc
from vitmodel.metrics.metrics import Confusion, Metrics

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#767676"
P = ParamSpec("P")


def _style() -> AbstractContextManager[None]:
    return rc_context(
        {
            "font.size": 8.5,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": "#444444",
            "axes.linewidth": 0.7,
            "axes.labelcolor": "#222222",
            "xtick.color": "#444444",
            "ytick.color": "#444444",
            "xtick.labelcolor": "#222222",
            "ytick.labelcolor": "#222222",
            "legend.frameon": False,
            "legend.fontsize": 7.5,
            "lines.linewidth": 1.5,
            "text.parse_math": False,  # a name may hold a dollar sign
            "svg.fonttype": "path",  # the same glyphs on every machine
            "svg.hashsalt": "vitmodel",  # the same figure gives the same bytes
        }
    )


def _figure(height: float = 3.6) -> Callable[[Callable[Concatenate[Axes, P], None]], Callable[P, Figure]]:
    """Turns a function that draws on axes into one that gives a figure, 3.5 inches wide (a journal's column) and `height` high."""

    def decorate(draw: Callable[Concatenate[Axes, P], None]) -> Callable[P, Figure]:
        @wraps(draw)
        def render(*args: P.args, **kwargs: P.kwargs) -> Figure:
            with _style():
                figure = Figure(figsize=(3.5, height), layout="constrained")
                axes = figure.add_subplot()
                draw(axes, *args, **kwargs)
                if axes.get_legend_handles_labels()[0]:  # below the axes, where it hides no data
                    figure.legend(loc="outside lower center", ncols=2, handlelength=1.8, columnspacing=1.4)
            return figure

        return render

    return decorate


def to_svg(figure: Figure) -> str:
    """The figure as SVG text; the same figure gives the same text."""
    file = io.StringIO()
    with _style():
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def to_pixels(figure: Figure) -> np.ndarray:
    """The figure as a picture, H W 3 uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


@_figure()
def roc(axes: Axes, data: Roc, metrics: Metrics) -> None:
    """The ROC curve with its pointwise 95 % band over patients, and the operating point with its intervals."""
    _band(axes, data.band)
    axes.plot([0, 1], [0, 1], color=GREY, lw=0.8, ls=(0, (4, 3)), label="Chance")
    axes.plot(data.fpr, data.tpr, color=BLUE, label=f"AUROC {metrics.intervals['auroc']}")
    _operating_point(axes, metrics, x="specificity", y="sensitivity", complement=True)
    _unit_square(axes, "1 − specificity (false-positive fraction)", "Sensitivity")


@_figure()
def precision_recall(axes: Axes, data: PrecisionRecall, metrics: Metrics) -> None:
    """Precision against recall in steps, with band, prevalence and operating point."""
    _band(axes, data.band)
    prevalence = metrics.positives / metrics.units
    axes.axhline(prevalence, color=GREY, lw=0.8, ls=(0, (4, 3)), label=f"Prevalence {prevalence:.3f}")
    axes.step(data.recall, data.precision, where="pre", color=BLUE, label=f"AUPRC {metrics.intervals['auprc']}")
    _operating_point(axes, metrics, x="sensitivity", y="precision")
    _unit_square(axes, "Recall (sensitivity)", "Precision (PPV)")


@_figure()
def reliability(axes: Axes, data: Reliability, metrics: Metrics, label: str) -> None:
    """The fraction of positives against the mean score of each bin. Both axes end where the bins do: at screening prevalence that is far
    below 1."""
    slope, intercept = (metrics.intervals[name].value for name in ("calibration_slope", "calibration_intercept"))
    end = min(1.0, 1.08 * max(data.score.max(), data.high.max()))
    axes.plot([0, end], [0, end], color=GREY, lw=0.8, ls=(0, (4, 3)), label="Perfect calibration")
    axes.errorbar(
        data.score, data.observed, yerr=[data.observed - data.low, data.high - data.observed],
        fmt="o-", ms=3.5, color=BLUE, elinewidth=0.8, lw=1, label=f"Slope {slope:.2f}, intercept {intercept:.2f}".replace("-", "−"),
    )  # fmt: skip
    axes.set(
        xlim=(0, end), ylim=(0, end), xlabel="Mean score", ylabel=f"Observed fraction with {label}", aspect="equal"
    )


@_figure(height=2.9)
def histogram(axes: Axes, data: Histogram, metrics: Metrics, label: str) -> None:
    """The scores of each class, as fractions of that class, and the threshold."""
    for counts, name, colour, style in (
        (data.negatives, f"No {label}", BLUE, "-"),
        (data.positives, label.capitalize(), ORANGE, (0, (3, 1))),
    ):
        if total := counts.sum():
            axes.stairs(counts / total, data.edges, fill=True, color=colour, alpha=0.2)
            axes.stairs(counts / total, data.edges, color=colour, ls=style, lw=1.3, label=f"{name} (n = {total:,})")
    axes.axvline(metrics.threshold, color="#222222", lw=0.9, ls=":", label=f"Threshold {metrics.threshold:.3f}")
    axes.set(xlim=(0, 1.02 * data.edges[-1]), xlabel="Score", ylabel="Fraction of the class")


@_figure(height=2.9)
def confusion(axes: Axes, counts: Confusion, threshold: float, label: str = "cancer") -> None:
    """Counts of decisions, shaded and with percentages by the true class."""
    table = np.array([[counts.tn, counts.fp], [counts.fn, counts.tp]])
    fraction = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    axes.pcolormesh(fraction, cmap="Blues", vmin=0, vmax=1.25)
    axes.invert_yaxis()
    for (row, column), count in np.ndenumerate(table):
        colour = "white" if fraction[row, column] > 0.7 else "#222222"
        axes.text(column + 0.5, row + 0.5, f"{count:,}", ha="center", va="bottom", fontsize=13, color=colour)
        axes.text(
            column + 0.5,
            row + 0.5,
            f"\n{100 * fraction[row, column]:.1f} % of row",
            ha="center",
            va="center",
            fontsize=7.5,
            color=colour,
        )
    axes.set(xlabel=f"Called at threshold {threshold:.3f}", ylabel="Truth")
    axes.set_xticks([0.5, 1.5], [f"No {label}", label.capitalize()])
    axes.set_yticks([0.5, 1.5], [f"No {label}", label.capitalize()], rotation=90, va="center")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


@_figure(height=2.9)
def decision_curve(axes: Axes, data: DecisionCurve, metrics: Metrics) -> None:
    """Net benefit over the threshold probability, beside acting on everyone and on no one."""
    axes.axhline(0, color="#222222", lw=0.9, label="No one")
    axes.plot(data.threshold, data.everyone, color=GREY, lw=1.2, ls=(0, (4, 3)), zorder=3, label="Everyone")
    axes.plot(data.threshold, data.model, color=BLUE, label="By the score")
    top = max(data.model.max(), metrics.positives / metrics.units)
    axes.set(
        ylim=(-0.25 * top, 1.08 * top), xlim=(0, None), xlabel="Threshold probability", ylabel="Net benefit (per unit)"
    )


def forest(groups: Sequence[tuple[str, str, Metrics]], overall: Metrics) -> Figure:
    """The AUROC of each subgroup (attribute, value, metrics) with its interval and counts, under the headings of the attributes."""
    lines: list[tuple[str, Metrics | None]] = [("All", overall)]
    for number, (attribute, value, metrics) in enumerate(groups):
        if not number or groups[number - 1][0] != attribute:
            lines.append((attribute, None))
        lines.append((f"{value}  ({metrics.positives:,} of {metrics.units:,})", metrics))
    with _style():
        figure = Figure(figsize=(5.2, 0.6 + 0.175 * len(lines)), layout="constrained")
        axes = figure.add_subplot()
        axes.axvline(0.5, color=GREY, lw=0.8, ls=(0, (4, 3)))
        axes.axvline(overall.intervals["auroc"].value, color=BLUE, lw=0.8, ls=":")
        for row, (_, measured) in enumerate(lines):
            if measured:
                auroc = measured.intervals["auroc"]
                axes.plot([auroc.low, auroc.high], [row, row], color=BLUE, lw=1.2)
                axes.plot(
                    auroc.value,
                    row,
                    "D" if row == 0 else "s",
                    ms=4 if row == 0 else 3.2,
                    color=ORANGE if row == 0 else BLUE,
                )
                axes.text(1.02, row, str(auroc), va="center", fontsize=7, transform=axes.get_yaxis_transform())
        axes.set_yticks(range(len(lines)), [name for name, _ in lines])
        for tick, (_, measured) in zip(axes.get_yticklabels(), lines, strict=True):
            tick.set_fontweight("normal" if measured else "bold")
        values = [m.intervals["auroc"] for _, m in lines if m]
        least = min(0.45, *(np.nanmin([v.low, v.value]) for v in values))
        axes.set(
            xlim=(max(0, least - 0.02), 1.01),
            ylim=(len(lines) - 0.4, -0.6),
            xlabel="AUROC with 95 % interval (positive of all)",
        )
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    return figure


@_figure(height=2.6)
def history(axes: Axes, name: str, splits: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """One metric over the epochs of training, which are shown counted from 1: a line for each split ("val") or, thinner, for each of its
    folds ("val fold_0")."""
    unused = cycle([(BLUE, "-", "o"), (ORANGE, (0, (3, 1)), "s"), (GREY, ":", "^")])
    looks: dict[str, tuple[Any, ...]] = {}
    for line, points in splits.items():
        split, _, fold = line.partition(" ")
        label = "_" if split in looks else split  # the legend names a split once, not each of its folds
        colour, style, marker = looks[split] = looks.get(split) or next(unused)
        size, width = (1.2, 0.6) if fold else (2.5, 1.2)
        epochs, values = zip(*points, strict=True) if points else ((), ())
        axes.plot(np.array(epochs) + 1, values, color=colour, ls=style, marker=marker, ms=size, lw=width, label=label)
    axes.set(xlabel="Epoch", ylabel=name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _band(axes: Axes, band: Band) -> None:
    axes.fill_between(band.x, band.low, band.high, color=BLUE, alpha=0.15, lw=0, label="95 % band")


def _operating_point(axes: Axes, metrics: Metrics, x: str, y: str, complement: bool = False) -> None:
    across, up = metrics.intervals[x], metrics.intervals[y]
    if np.isnan(across.value) or np.isnan(up.value):
        return
    left, at, right = (
        (1 - across.high, 1 - across.value, 1 - across.low) if complement else (across.low, across.value, across.high)
    )
    axes.errorbar(
        at, up.value, xerr=[[max(at - left, 0)], [max(right - at, 0)]], yerr=[[max(up.value - up.low, 0)], [max(up.high - up.value, 0)]],
        fmt="o", ms=4.5, color=ORANGE, elinewidth=1, label=f"Threshold {metrics.threshold:.3f}", zorder=5,
    )  # fmt: skip


def _unit_square(axes: Axes, xlabel: str, ylabel: str) -> None:
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), xlabel=xlabel, ylabel=ylabel, aspect="equal")
