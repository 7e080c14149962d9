"""Draw docs/road.svg, the diagram of the pipeline from files to scores: `python docs/figures/road.py`."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

OUT = Path(__file__).resolve().parents[1] / "road.svg"
DATA, RESULT, OPTIONAL = "#e8eefb", "#e6f4ea", "#f3f3f3"
EDGE, VERB = "#33415c", "#b3460f"


def box(axes: Axes, x: float, y: float, title: str, lines: str, colour: str, height: float = 1.7) -> None:
    """Draw a box of data, centred at x, y, with a title and what it holds."""
    width = 3.9
    style = "round,pad=0.02,rounding_size=0.12"
    corner = (x - width / 2, y - height / 2)
    patch = FancyBboxPatch(corner, width, height, boxstyle=style, facecolor=colour, edgecolor=EDGE)
    axes.add_patch(patch)
    axes.text(x, y + height / 2 - 0.3, title, ha="center", va="center", weight="bold", size=11, color="#111")
    axes.text(x, y - 0.17, lines, ha="center", va="center", size=9, color="#333", linespacing=1.45)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], verb: str, at: tuple[float, float]) -> None:
    """Draw an arrow with the verb that makes its end from its start."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": EDGE, "linewidth": 1.6})
    axes.text(*at, verb, ha="center", va="center", size=12, weight="bold", color=VERB, family="monospace")


def draw() -> Figure:
    """Return the figure."""
    figure = Figure(figsize=(10.4, 4.2))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 19.8), ylim=(0, 6.4))
    axes.axis("off")
    box(
        axes,
        2.05,
        4.6,
        "Mammograms",
        "DICOM, PNG, zip, DICOMDIR;\nsix public releases\nor your own data",
        DATA,
    )
    box(
        axes,
        7.3,
        4.6,
        "Crops + manifest.csv",
        "chest wall left, 0 = air;\none row per image,\nreason for each refusal",
        DATA,
    )
    box(axes, 12.55, 4.6, "Model package", "weights, calibration,\nthreshold, model card;\nno patient ids", DATA)
    box(axes, 17.7, 5.35, "report.html", "intervals, subgroups,\nleakage audit, errors", RESULT, 1.5)
    box(axes, 17.7, 3.1, "Scores", "per image, breast, patient;\nheat maps, DICOM SR,\nsubmission.csv", RESULT)
    box(axes, 2.05, 1.4, "No data?", "synthetic mammograms\nas a DICOM release", OPTIONAL, 1.4)
    box(
        axes,
        9.95,
        1.4,
        "Weights to start from",
        "timm, Hugging Face,\nGoogle, or pretrain",
        OPTIONAL,
        1.4,
    )
    arrow(axes, (4.1, 4.6), (5.25, 4.6), "etl", (4.65, 5.0))
    arrow(axes, (9.35, 4.6), (10.5, 4.6), "train", (9.9, 5.0))
    arrow(axes, (14.6, 4.8), (15.7, 5.3), "evaluate", (14.55, 5.8))
    arrow(axes, (14.6, 4.3), (15.7, 3.4), "predict\nserve", (14.55, 3.05))
    arrow(axes, (2.05, 2.2), (2.05, 3.65), "synth", (2.9, 2.9))
    arrow(axes, (9.95, 2.2), (9.95, 4.35), "--weights", (11.2, 3.0))
    note = "compare  leave-out  tune\nversions  export  info  demo"
    axes.text(16.1, 1.6, note, ha="center", va="center", size=10, color=VERB, family="monospace", linespacing=1.5)
    axes.text(16.1, 0.7, "Research software, not a medical device.", ha="center", va="center", size=10.5, color="#333")
    return figure


def main() -> None:
    """Write the picture; text becomes outlines, so that it looks the same everywhere."""
    with mpl.rc_context({"svg.fonttype": "path", "svg.hashsalt": "vitmodel"}):
        draw().savefig(OUT, facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    main()
