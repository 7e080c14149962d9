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
from vitmodel.scoring.segment_reading import SegmentReading, read_segments
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
SEGMENTS = "segments"
READ_SEGMENTS = (
    "The segments that the network read: the share of its attention that each has, the overview of the whole image "
    "included, and where there is room its own score, which is not calibrated. It shows what was read and weighted, "
    "not where a lesion is."
)
"""What the segments of a model of large images show."""


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
    probability: float
    """Calibrated probability of the image that is explained, which should be the one that is shown."""

    @classmethod
    def from_map(cls, heat: HeatMap, unit: str, low: float, high: float, probability: float) -> HeatMapView:
        values = heat.to_source_image(min(1.0, LONGEST_SIDE / max(heat.source_shape)))
        share = np.clip((values - low) / (high - low), 0, 1)
        bytes_ = np.where(np.isnan(share), 0, np.rint(1 + 254 * np.nan_to_num(share))).astype(np.uint8)
        height, width = bytes_.shape
        text = base64.b64encode(bytes_.tobytes()).decode()
        outline = heat.peak_outline().round(1).tolist()
        return cls(width, height, text, float(low), float(high), unit, outline, probability)


@dataclass(frozen=True)
class SegmentView:
    """A segment as the page draws it."""

    corners: list[list[float]]
    """Its corners (x, y) in source pixels."""
    attention: float
    score: float


@dataclass(frozen=True)
class SegmentsView:
    """The segments of an image as the page draws them."""

    segments: list[SegmentView]
    overview_attention: float
    probability: float

    @classmethod
    def of(cls, reading: SegmentReading) -> SegmentsView:
        segments = [
            SegmentView(segment.corners.round(1).tolist(), segment.attention, segment.score)
            for segment in reading.segments
        ]
        return cls(segments, reading.overview_attention, reading.probability)


Overlay = HeatMapView | SegmentsView


class HeatMapStore:
    """Heat maps by image and method. One is computed at a time, because each uses all cores.

    Args:
        predictor: The loaded packages.
    """

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self._pool = ThreadPoolExecutor(1, "heat-map")
        self._lock = threading.Lock()
        self._maps: OrderedDict[tuple[str, str], Future[Overlay]] = OrderedDict()

    @property
    def methods(self) -> dict[str, str]:
        """The methods that the packages offer, and what each shows."""
        return METHODS | ({SEGMENTS: READ_SEGMENTS} if self.predictor.ensemble.model.segments else {})

    def request(self, image: ImageEntry, method: str) -> Future[Overlay]:
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

    def _compute(self, image: ImageEntry, method: str) -> Overlay:
        row = scored_row(image)
        if method == SEGMENTS:
            return SegmentsView.of(read_segments(row, self.predictor))
        explanation = method_named(method)
        explained = explain_image(row, self.predictor, method)
        unit = explanation.unit_for(target_name(self.predictor.ensemble.label))
        probability = float(self.predictor.ensemble.probability(explained.scored.logits[:1])[0])
        return HeatMapView.from_map(explained.heat, unit, *explanation.scale, probability)


def scored_row(image: ImageEntry) -> pd.DataFrame:
    """Return the manifest row of an image, with the side, view, grey range and other inputs that it was scored with."""
    table = read_inputs([image.path or ""], "auto")
    known = {"machine_id": image.machine, **image.inputs}
    known |= {"laterality": image.side, "view": image.view, "voi": image.voi}
    return table.assign(**{name: value for name, value in known.items() if value != ""})
