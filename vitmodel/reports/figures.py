"""Figures of the evaluation report, drawn from points and metrics.

Colours are from the palette of Okabe and Ito, which colour-blind readers can distinguish; classes also differ in line
style.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import wraps
from itertools import cycle
from typing import Any, Concatenate, ParamSpec

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vitmodel.config.labels import CANCER, target_name, target_title
from vitmodel.metrics.bootstrap import Interval
from vitmodel.metrics.curve_data import Band, DecisionCurve, Histogram, PrecisionRecall, Reliability, Roc
from vitmodel.metrics.metrics import Confusion, Metrics
from vitmodel.metrics.multiclass import AuxiliaryMetrics

BLUE = "#0072B2"
ORANGE = "#D55E00"
GREY = "#767676"
P = ParamSpec("P")
Shares = Sequence[float] | np.ndarray
DriftPanel = tuple[str, Sequence[str], Shares, Mapping[str, Shares]]
"""The arguments of `draw_distribution` after the axes."""


def _style() -> AbstractContextManager[None]:
    """Return a context in which figures are drawn in the report's style."""
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
            "text.parse_math": False,  # names may contain a dollar sign
            "svg.fonttype": "path",  # the same glyphs on every machine
            "svg.hashsalt": "vitmodel",  # the same figure gives the same bytes
        }
    )


def _figure(height: float = 3.6) -> Callable[[Callable[Concatenate[Axes, P], None]], Callable[P, Figure]]:
    """Turn a function that draws on axes into one that returns a figure.

    Args:
        height: Height of the figure in inches. It is 3.5 inches wide, the width of a journal's column.
    """

    def decorate(draw: Callable[Concatenate[Axes, P], None]) -> Callable[P, Figure]:
        @wraps(draw)
        def render(*args: P.args, **kwargs: P.kwargs) -> Figure:
            with _style():
                figure = Figure(figsize=(3.5, height), layout="constrained")
                axes = figure.add_subplot()
                draw(axes, *args, **kwargs)
                if axes.get_legend_handles_labels()[0]:  # below the axes, where it covers no data
                    figure.legend(loc="outside lower center", ncols=2, handlelength=1.8, columnspacing=1.4)
            return figure

        return render

    return decorate


def to_svg(figure: Figure) -> str:
    """Return a figure as SVG text; equal figures give equal text."""
    file = io.StringIO()
    with _style():
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def to_pixels(figure: Figure) -> np.ndarray:
    """Return a figure as an RGB image, `(H, W, 3)` uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


@_figure()
def roc(axes: Axes, data: Roc, metrics: Metrics) -> None:
    """Draw the ROC curve with its pointwise 95 % band over patients, and the operating point with its intervals."""
    _band(axes, data.band)
    axes.plot([0, 1], [0, 1], color=GREY, lw=0.8, ls=(0, (4, 3)), label="Chance")
    axes.plot(data.fpr, data.tpr, color=BLUE, label=f"AUROC {metrics.intervals['auroc']}")
    _operating_point(axes, metrics, x="specificity", y="sensitivity", complement=True)
    _unit_square(axes, "1 − specificity (false-positive fraction)", "Sensitivity")


@_figure()
def precision_recall(axes: Axes, data: PrecisionRecall, metrics: Metrics) -> None:
    """Draw the precision-recall curve as steps, with its band, the prevalence and the operating point."""
    _band(axes, data.band)
    prevalence = metrics.positives / metrics.units
    axes.axhline(prevalence, color=GREY, lw=0.8, ls=(0, (4, 3)), label=f"Prevalence {prevalence:.3f}")
    axes.step(data.recall, data.precision, where="pre", color=BLUE, label=f"AUPRC {metrics.intervals['auprc']}")
    _operating_point(axes, metrics, x="sensitivity", y="precision")
    _unit_square(axes, "Recall (sensitivity)", "Precision (PPV)")


@_figure()
def reliability(axes: Axes, data: Reliability, metrics: Metrics, label: str) -> None:
    """Draw the fraction of positives against the mean score of each bin.

    Both axes end at the last bin, which is far below 1 at screening prevalence.
    """
    slope = metrics.intervals["calibration_slope"].value
    intercept = metrics.intervals["calibration_intercept"].value
    calibration = f"Slope {slope:.2f}, intercept {intercept:.2f}".replace("-", "−")
    end = min(1.0, 1.08 * max(data.score.max(), data.high.max()))
    axes.plot([0, end], [0, end], color=GREY, lw=0.8, ls=(0, (4, 3)), label="Perfect calibration")
    axes.errorbar(
        data.score,
        data.observed,
        yerr=[data.observed - data.low, data.high - data.observed],
        fmt="o-",
        ms=3.5,
        color=BLUE,
        elinewidth=0.8,
        lw=1,
        label=calibration,
    )
    observed = f"Observed fraction with {target_name(label)}"
    axes.set(xlim=(0, end), ylim=(0, end), xlabel="Mean score", ylabel=observed, aspect="equal")


@_figure(height=2.9)
def histogram(axes: Axes, data: Histogram, metrics: Metrics, label: str) -> None:
    """Draw the scores of each class, as fractions of the class, and the threshold."""
    classes = (
        (data.negatives, f"No {target_name(label)}", BLUE, "-"),
        (data.positives, target_title(label), ORANGE, (0, (3, 1))),
    )
    for counts, name, colour, style in classes:
        if total := counts.sum():
            axes.stairs(counts / total, data.edges, fill=True, color=colour, alpha=0.2)
            axes.stairs(counts / total, data.edges, color=colour, ls=style, lw=1.3, label=f"{name} (n = {total:,})")
    axes.axvline(metrics.threshold, color="#222222", lw=0.9, ls=":", label=f"Threshold {metrics.threshold:.3f}")
    axes.set(xlim=(0, 1.02 * data.edges[-1]), xlabel="Score", ylabel="Fraction of the class")


@_figure(height=2.9)
def confusion(axes: Axes, counts: Confusion, threshold: float, label: str = CANCER) -> None:
    """Draw the confusion matrix; percentages and shades are fractions of the true class."""
    table = np.array([[counts.tn, counts.fp], [counts.fn, counts.tp]])
    fraction = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    axes.pcolormesh(fraction, cmap="Blues", vmin=0, vmax=1.25)
    axes.invert_yaxis()
    for (row, column), count in np.ndenumerate(table):
        colour = "white" if fraction[row, column] > 0.7 else "#222222"
        share = f"\n{100 * fraction[row, column]:.1f} % of row"
        axes.text(column + 0.5, row + 0.5, f"{count:,}", ha="center", va="bottom", fontsize=13, color=colour)
        axes.text(column + 0.5, row + 0.5, share, ha="center", va="center", fontsize=7.5, color=colour)
    axes.set(xlabel=f"Decision at threshold {threshold:.3f}", ylabel="Truth")
    classes = [f"No {target_name(label)}", target_title(label)]
    axes.set_xticks([0.5, 1.5], classes)
    axes.set_yticks([0.5, 1.5], classes, rotation=90, va="center")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


@_figure(height=3.2)
def class_confusion(axes: Axes, metrics: AuxiliaryMetrics, title: str) -> None:
    """Draw the confusion matrix of an auxiliary output; percentages and shades are fractions of the true class."""
    table = np.array(metrics.confusion)
    fraction = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    axes.pcolormesh(fraction, cmap="Blues", vmin=0, vmax=1.25)
    axes.invert_yaxis()
    size = 9 if len(table) < 5 else 7
    for (row, column), count in np.ndenumerate(table):
        colour = "white" if fraction[row, column] > 0.7 else "#222222"
        text = f"{count:,}\n{100 * fraction[row, column]:.0f} %" if table[row].sum() else "–"
        axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=size, color=colour)
    axes.set(xlabel="Most probable class", ylabel="Known class", title=title)
    places = np.arange(len(table)) + 0.5
    axes.set_xticks(places, metrics.classes)
    axes.set_yticks(places, metrics.classes)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


@_figure(height=2.9)
def decision_curve(axes: Axes, data: DecisionCurve, metrics: Metrics) -> None:
    """Draw the net benefit over the threshold probability, compared with acting on everyone and on no one."""
    axes.axhline(0, color="#222222", lw=0.9, label="No one")
    axes.plot(data.threshold, data.everyone, color=GREY, lw=1.2, ls=(0, (4, 3)), zorder=3, label="Everyone")
    axes.plot(data.threshold, data.model, color=BLUE, label="By the score")
    top = max(data.model.max(), metrics.positives / metrics.units)
    axes.set(
        ylim=(-0.25 * top, 1.08 * top), xlim=(0, None), xlabel="Threshold probability", ylabel="Net benefit (per unit)"
    )


def forest(groups: Sequence[tuple[str, str, Metrics]], overall: Metrics) -> Figure:
    """Draw the AUROC of each subgroup with its interval and counts, under the headings of the attributes.

    Args:
        groups: Attribute, value and metrics of each subgroup, sorted by attribute.
        overall: The metrics of all units, drawn first.
    """
    lines = _forest_lines(groups, overall)
    with _style():
        figure = Figure(figsize=(5.2, 0.6 + 0.175 * len(lines)), layout="constrained")
        axes = figure.add_subplot()
        axes.axvline(0.5, color=GREY, lw=0.8, ls=(0, (4, 3)))
        axes.axvline(overall.intervals["auroc"].value, color=BLUE, lw=0.8, ls=":")
        for row, (_, metrics) in enumerate(lines):
            if metrics:
                _forest_row(axes, row, metrics.intervals["auroc"])
        axes.set_yticks(range(len(lines)), [title for title, _ in lines])
        for tick, (_, metrics) in zip(axes.get_yticklabels(), lines, strict=True):
            tick.set_fontweight("normal" if metrics else "bold")
        aurocs = [metrics.intervals["auroc"] for _, metrics in lines if metrics]
        lowest = min(0.45, *(np.nanmin([auroc.low, auroc.value]) for auroc in aurocs))
        axes.set(
            xlim=(max(0, lowest - 0.02), 1.01),
            ylim=(len(lines) - 0.4, -0.6),
            xlabel="AUROC with 95 % interval (positives of all)",
        )
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    return figure


def _forest_lines(groups: Sequence[tuple[str, str, Metrics]], overall: Metrics) -> list[tuple[str, Metrics | None]]:
    """Return the title and metrics of each line of the forest plot; an attribute's heading has no metrics."""
    lines: list[tuple[str, Metrics | None]] = [("All", overall)]
    heading = None
    for attribute, value, metrics in groups:
        if attribute != heading:
            lines.append((attribute, None))
            heading = attribute
        lines.append((f"{value}  ({metrics.positives:,} of {metrics.units:,})", metrics))
    return lines


def _forest_row(axes: Axes, row: int, auroc: Interval) -> None:
    """Draw one AUROC with its interval; the first row, of all units, has a larger marker in another colour."""
    marker, size, colour = ("D", 4, ORANGE) if row == 0 else ("s", 3.2, BLUE)
    axes.plot([auroc.low, auroc.high], [row, row], color=BLUE, lw=1.2)
    axes.plot(auroc.value, row, marker, ms=size, color=colour)
    axes.text(1.02, row, str(auroc), va="center", fontsize=7, transform=axes.get_yaxis_transform())


@_figure(height=2.6)
def history(axes: Axes, name: str, splits: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """Draw one metric over the training epochs, counted from 1.

    Args:
        axes: The axes to draw on.
        name: The metric.
        splits: Points (epoch from 0, value) by split ("val") or by split and fold ("val fold_0"). The folds of a split
            share a style and are drawn thinner.
    """
    styles = cycle([(BLUE, "-", "o"), (ORANGE, (0, (3, 1)), "s"), (GREY, ":", "^")])
    style_of: dict[str, tuple[Any, ...]] = {}
    for line, points in splits.items():
        split, _, fold = line.partition(" ")
        label = "_" if split in style_of else split  # the legend names a split once, not each of its folds
        if split not in style_of:
            style_of[split] = next(styles)
        colour, style, marker = style_of[split]
        size, width = (1.2, 0.6) if fold else (2.5, 1.2)
        epochs, values = zip(*points, strict=True) if points else ((), ())
        axes.plot(np.array(epochs) + 1, values, color=colour, ls=style, marker=marker, ms=size, lw=width, label=label)
    axes.set(xlabel="Epoch", ylabel=name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


@_figure()
def learning_rates(
    axes: Axes, rates: np.ndarray, losses: np.ndarray, smoothed: np.ndarray, suggestion: float | None
) -> None:
    """Draw the losses of a sweep of the learning rate, `(S,)` each, and the suggested rate if there is one."""
    axes.plot(rates, losses, ".", color=GREY, ms=3, label="loss of a step")
    axes.plot(rates, smoothed, color=BLUE, label="moving average")
    if suggestion is not None:
        axes.axvline(suggestion, color=ORANGE, ls="--", label=f"suggestion {suggestion:.2g}")
    axes.set(xscale="log", xlabel="Learning rate", ylabel="Loss", ylim=(0, 1.5 * smoothed[0]))


def _band(axes: Axes, band: Band) -> None:
    """Draw a curve's pointwise 95 % band."""
    axes.fill_between(band.x, band.low, band.high, color=BLUE, alpha=0.15, lw=0, label="95 % band")


def _operating_point(axes: Axes, metrics: Metrics, x: str, y: str, complement: bool = False) -> None:
    """Draw the metrics `x` and `y` at the threshold with their intervals; `complement` plots 1 - x."""
    across = metrics.intervals[x]
    up = metrics.intervals[y]
    if np.isnan(across.value) or np.isnan(up.value):
        return
    if complement:
        across = Interval(1 - across.value, 1 - across.high, 1 - across.low)
    axes.errorbar(
        across.value,
        up.value,
        xerr=_error_lengths(across),
        yerr=_error_lengths(up),
        fmt="o",
        ms=4.5,
        color=ORANGE,
        elinewidth=1,
        label=f"Threshold {metrics.threshold:.3f}",
        zorder=5,
    )


def _error_lengths(interval: Interval) -> list[list[float]]:
    """Return the lengths of the lower and the upper error bar, 0 where the limit lies beyond the value."""
    return [[max(interval.value - interval.low, 0)], [max(interval.high - interval.value, 0)]]


def _unit_square(axes: Axes, xlabel: str, ylabel: str) -> None:
    """Set the axes to the unit square and label them."""
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), xlabel=xlabel, ylabel=ylabel, aspect="equal")


@_figure(height=2.9)
def distribution(axes: Axes, title: str, bins: Sequence[str], training: Shares, runs: Mapping[str, Shares]) -> None:
    """Draw the shares of the training set as bars and those of one or several runs as dots, one row per bin.

    Args:
        axes: The axes.
        title: What the bins divide.
        bins: Names of the bins, from the lowest.
        training: Share of the training images in each bin, `(B,)`.
        runs: Name of each run, in order -> its shares.
    """
    draw_distribution(axes, title, bins, training, runs)


def draw_distribution(
    axes: Axes, title: str, bins: Sequence[str], training: Shares, runs: Mapping[str, Shares]
) -> None:
    """Draw what `distribution` shows on given axes."""
    rows = np.arange(len(bins))
    axes.barh(rows, training, color="#d5dade", height=0.75, label="Training and validation images")
    for number, (name, shares) in enumerate(runs.items()):
        colour = BLUE if len(runs) == 1 else colormaps["viridis"](0.85 * number / (len(runs) - 1))
        axes.plot(shares, rows, "o", ms=4.5, color=colour, label=name)
    axes.set_yticks(rows, [_shorten(name) for name in bins])
    axes.set(xlim=(0, None), xlabel="Share of the images")
    axes.set_title(title[0].upper() + title[1:], fontsize=9)


def _shorten(name: str, most: int = 24) -> str:
    """Return a name that fits next to an axis."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def drift_overview(columns: Sequence[DriftPanel]) -> Figure:
    """Draw the distributions of all columns in one picture, two per row."""
    rows = -(-len(columns) // 2)
    with _style():
        figure = Figure(figsize=(8.5, 2.9 * rows + 0.4), layout="constrained")
        grid = figure.subplots(rows, 2, squeeze=False)
        for axes, panel in zip(grid.flat, columns, strict=False):
            draw_distribution(axes, *panel)
        for axes in grid.flat[len(columns) :]:
            axes.set_axis_off()
        handles, labels = grid.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))
    return figure


@_figure(height=3.2)
def stability(axes: Axes, runs: Sequence[str], columns: Mapping[str, Sequence[float]], large: float) -> None:
    """Draw the population stability index of each column in one run after the other.

    Args:
        axes: The axes.
        runs: Names of the runs in order.
        columns: Column -> its index in each run; NaN where the column is unknown.
        large: Index from which a difference counts as large.
    """
    places = np.arange(len(runs))
    axes.axhline(large, color=GREY, lw=0.8, ls=(0, (4, 3)), label=f"Large: above {large:g}")
    markers = cycle("osD^v<>P")
    for number, (name, values) in enumerate(columns.items()):
        colour = colormaps["tab10"](number % 10)
        axes.plot(places, values, marker=next(markers), ms=4, lw=1, color=colour, label=name)
    axes.set_xticks(places, [_shorten(name, 18) for name in runs], rotation=30 if len(runs) > 3 else 0)
    axes.set(ylim=(0, None), ylabel="Population stability index")
