"""Heat maps on demand: computed one after another in the background, and kept."""

from __future__ import annotations

import base64
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pandas as pd

from vitmodel.config.labels import target_name
from vitmodel.model.explain import method_named
from vitmodel.releases.inputs import read_inputs
from vitmodel.results.heatmap import HeatMap
from vitmodel.scoring.explanation import explain_image
from vitmodel.scoring.predictor import Predictor
from vitmodel.viewer.exams import ImageEntry

KEPT = 500
"""Maps that are kept in memory, about 0.2 MB each."""
LONGEST_SIDE = 512
"""Longer side of the map that the page receives, in pixels."""
METHODS = {
    "gradient": "Patches whose attention, weighted by gradients, raised the score. It does not outline a lesion.",
    "rollout": "Patches that the network attended to, whether they raised or lowered the score.",
    "occlusion": "How much the score falls when a region is covered by smooth tissue.",
    "integrated": "How much each patch adds to the score, starting from a smoothed image without lesions.",
}
"""Method -> what it shows."""


@dataclass(frozen=True)
class HeatMapView:
    """A heat map as the page draws it."""

    width: int
    height: int
    values: str
    """Base64 of `(height, width)` uint8: 0 = outside the breast, 1 to 255 from `low` to `high`."""
    low: float
    high: float
    unit: str
    outline: list[list[float]]
    """Corners (x, y) of the region around the maximum in source pixels."""

    @classmethod
    def from_map(cls, heat: HeatMap, unit: str, low: float, high: float) -> HeatMapView:
        values = heat.to_source_image(min(1.0, LONGEST_SIDE / max(heat.source_shape)))
        share = np.clip((values - low) / (high - low), 0, 1)
        bytes_ = np.where(np.isnan(share), 0, np.rint(1 + 254 * np.nan_to_num(share))).astype(np.uint8)
        height, width = bytes_.shape
        text = base64.b64encode(bytes_.tobytes()).decode()
        return cls(width, height, text, float(low), float(high), unit, heat.peak_outline().round(1).tolist())


class HeatMapStore:
    """Heat maps by image and method. One is computed at a time, because each uses all cores.

    Args:
        predictor: The loaded packages.
    """

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self._pool = ThreadPoolExecutor(1, "heat-map")
        self._lock = threading.Lock()
        self._maps: OrderedDict[tuple[str, str], Future[HeatMapView]] = OrderedDict()

    def request(self, image: ImageEntry, method: str) -> Future[HeatMapView]:
        """Return the map of an image, finished or still being computed; its first request starts it."""
        with self._lock:
            if (image.key, method) not in self._maps:
                self._maps[image.key, method] = self._pool.submit(self._compute, image, method)
                self._forget()
            self._maps.move_to_end((image.key, method))
            return self._maps[image.key, method]

    def _forget(self) -> None:
        """Forget the maps that nobody asked for in the longest time."""
        finished = [place for place, future in self._maps.items() if future.done()]
        for place in finished[: max(0, len(self._maps) - KEPT)]:
            del self._maps[place]

    def waiting(self) -> int:
        """Return the number of maps that are not finished."""
        with self._lock:
            return sum(not future.done() for future in self._maps.values())

    def close(self) -> None:
        """Drop the maps that are waiting."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _compute(self, image: ImageEntry, method: str) -> HeatMapView:
        explanation = method_named(method)
        heat = explain_image(scored_row(image), self.predictor, method).heat
        unit = explanation.unit_for(target_name(self.predictor.ensemble.label))
        return HeatMapView.from_map(heat, unit, *explanation.scale)


def scored_row(image: ImageEntry) -> pd.DataFrame:
    """Return the manifest row of an image, with the side, view and grey range that it was scored with."""
    table = read_inputs([image.path or ""], "auto")
    known = {"laterality": image.side, "view": image.view, "voi": image.voi}
    return table.assign(**{name: value for name, value in known.items() if value})
