"""The model behind the scores, as far as the pages know it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vitmodel.model.package_check import CARD_FILE
from vitmodel.scoring.report_facts import describe_fit

if TYPE_CHECKING:
    from vitmodel.scoring.ensemble import Ensemble


@dataclass(frozen=True)
class ModelFacts:
    """The model behind the scores, as far as it is known."""

    name: str = ""
    version: str = ""
    threshold: float | None = None
    label: str = "cancer"
    prevalence: float | None = None
    """Share of positives at which the probabilities were calibrated."""
    notes: dict[str, str] = field(default_factory=dict)
    """How calibration and threshold were fitted."""
    card: str = ""
    """Text of the model card."""

    @classmethod
    def of(cls, ensemble: Ensemble, name: str) -> ModelFacts:
        """Return the facts of loaded packages; calibration and card are those of the first one."""
        first = ensemble.packages[0]
        path = first.folder / CARD_FILE
        return cls(
            name=name,
            version=ensemble.fingerprint()[:8],
            threshold=ensemble.threshold,
            label=ensemble.label,
            prevalence=ensemble.prevalence,
            notes=describe_fit(first),
            card=path.read_text(encoding="utf-8", errors="replace") if path.is_file() else "",
        )
