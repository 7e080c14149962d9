"""The model card in the format of the hub: metadata in YAML, then the text of MODEL_CARD.md.

The metadata are those of https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml

from vitmodel.reports.model_card import CARD_METRICS, EVALUATION_HEADING

METRIC_TYPES = {
    "AUROC": "roc_auc",
    "AUPRC": "average_precision",
    "pF1": "pf1",
    "Sensitivity": "recall",
    "Specificity": "specificity",
    "PPV": "precision",
    "Brier score": "brier_score",
    "Calibration slope": "calibration_slope",
}
"""Title of a metric on the card -> its name on the hub."""
TAGS = ["mammography", "breast-cancer", "medical-imaging", "vision-transformer", "research-only"]
INTERVAL = re.compile(r"(-?[\d.]+) \((-?[\d.]+) to (-?[\d.]+)\)")


class CardMetric(NamedTuple):
    """A metric on a model card, with its 95 % interval."""

    title: str
    level: str
    """What was scored, such as "per breast"."""
    value: float
    low: float
    high: float


def card_metrics(card: str) -> Iterator[CardMetric]:
    """Yield the metrics in the table of a card's evaluation; none without an evaluation."""
    section = card.partition(f"{EVALUATION_HEADING}\n")[2]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")]
    for row in rows:
        if row[0] in CARD_METRICS:
            for level, cell in zip(rows[0][1:], row[1:], strict=False):
                if match := INTERVAL.fullmatch(cell):
                    yield CardMetric(row[0], level, *map(float, match.groups()))


def measured_data(card: str) -> str:
    """Return the data of a card's evaluation in words."""
    match = re.search(r"^- Measured rows: (.+)$", card, re.MULTILINE)
    return match[1] if match else "unnamed"


def hub_card(repository: str, card: str, package: dict[str, Any], licence: str) -> str:
    """Return README.md: the metadata and the text of the card.

    Args:
        repository: Such as org/name.
        card: The text of MODEL_CARD.md.
        package: The values in config.json.
        licence: Identifier of the licence.
    """
    metadata: dict[str, Any] = {"license": licence, "library_name": "vitmodel", "pipeline_tag": "image-classification"}
    metadata["tags"] = TAGS
    if datasets := sorted(package.get("data", {}).get("datasets", {})):
        metadata["datasets"] = datasets
    weights = package.get("weights", {})
    if str(weights.get("name", "")).startswith("hf:"):
        metadata["base_model"] = str(weights["name"]).removeprefix("hf:")
    if metrics := list(card_metrics(card)):
        metadata["metrics"] = sorted({METRIC_TYPES[metric.title] for metric in metrics})
        metadata["model-index"] = [_results(repository, measured_data(card), metrics)]
    use = f'Use it with `vitmodel predict hf:{repository} exam/ scores` or `vitmodel.load("hf:{repository}")`.'
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n\n{card.rstrip()}\n\n{use}\n"


def _results(repository: str, data: str, metrics: list[CardMetric]) -> dict[str, Any]:
    """Return the entry of the key `model-index`."""
    values = [
        {
            "type": METRIC_TYPES[metric.title],
            "name": f"{metric.title} {metric.level} (95 % interval {metric.low:g} to {metric.high:g})",
            "value": metric.value,
        }
        for metric in metrics
    ]
    task = {"type": "image-classification", "name": "breast cancer in mammograms"}
    result = {"task": task, "dataset": {"type": "mammograms", "name": data}, "metrics": values}
    return {"name": repository.partition("/")[2], "results": [result]}
