"""Do the heat maps point at what the model sees? Asked on phantoms, whose lesions are known. Prints a table.

python benchmarks/explain.py PACKAGE RELEASE MANIFEST [--images N] [--pointing] [--json FILE]

RELEASE is what `vitmodel synth` wrote, MANIFEST that of the run which trained PACKAGE (RUN/manifest.csv); its test patients are used.

- Pointing game (Zhang et al. 2016, arXiv 1608.00507): how often the highest patch's middle lies in a lesion's box, on images with cancer.
  Beside it the middle of the breast, the brightest patch, and a random place (its exact chance); with the paired difference from the
  middle and from chance.
- Deletion and insertion (Petsiuk et al. 2018, arXiv 1806.07421): mean probability while patches are smoothed away, or put back into a
  smoothed breast, the most important first; as difference to random orders of the same image, above 0 where it speaks for the map.
- Sanity (Adebayo et al. 2018, arXiv 1810.03292): Spearman correlation with the map of the same model with random weights; 0 is right.

Intervals (95 %) are of 2,000 resamplings of patients, the same ones for all, so that differences are paired.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr

from vitmodel.config import Preprocessing
from vitmodel.data.cropping import SourceImage, crop_image
from vitmodel.data.dataset import to_tensor
from vitmodel.data.manifest import read_manifest
from vitmodel.metrics.bootstrap import Interval, percentile_limits, resample
from vitmodel.model.explain import METHODS, explain, logit_function, smooth_tissue
from vitmodel.model.network import Network
from vitmodel.model.package import load_package
from vitmodel.model.packed_batch import PackedBatch, pack_images
from vitmodel.pixels.preprocessing import CropGeometry
from vitmodel.results.heatmap import HeatMap
from vitmodel.utils import progress, to_json, write_atomic

FRACTIONS = np.linspace(0, 1, 11)
ORDERS = 3  # random ones per image
AGAINST = {"random": "random place", "middle": "middle of the breast", "brightest": "brightest patch"}


@dataclass(frozen=True, eq=False)
class Case:
    """One image with cancer: what the model sees of it and where the lesions are."""

    patient: str
    image: PackedBatch
    tissue: np.ndarray
    geometry: CropGeometry
    source: tuple[int, int]
    boxes: list[tuple[float, ...]]

    def heat(self, values: np.ndarray) -> HeatMap:
        return HeatMap(
            values=values, tissue=self.tissue, geometry=self.geometry, patch=self.image.patch, source_shape=self.source
        )

    def hit(self, x: float, y: float) -> float:
        """Whether a place in the source lies in a lesion's box."""
        return float(any(x0 <= x < x1 and y0 <= y < y1 for x0, y0, x1, y1 in self.boxes))

    def chance(self) -> float:
        """How often a random place of the breast lies in a lesion's box."""
        return float(np.mean([self.hit(x, y) for x, y in self.places().T]))

    def brightness(self) -> np.ndarray:
        """The mean of each patch that is looked at, as a map."""
        (pixels,), (kept,), patch = self.image.images, self.image.patch_indices, self.image.patch
        means = torch.nn.functional.avg_pool2d(pixels, patch).flatten()
        return self.image.scatter_to_grid([means[kept]])[0].numpy()

    def places(self) -> np.ndarray:
        """Every pixel of the breast, in the source: 2 K."""
        rows, columns = np.nonzero(self.tissue)
        return self.geometry.to_source() @ np.stack([columns, rows, np.ones_like(rows)])


def read_cases(
    release: Path, manifest: Path, preprocessing: Preprocessing, patch: int, air: bool, most: int
) -> list[Case]:
    lesions = pd.read_csv(release / "lesions.csv", dtype={"image_id": str}).query("cancer == 1")
    table = read_manifest(manifest).query("split == 'test'")
    table = table[table.image_id.isin(lesions.image_id) & (table.status != "refused")]
    cases = []
    for row in table.head(most).itertuples():
        cropped = crop_image(SourceImage(Path(str(row.source_path))), preprocessing)
        assert cropped.crop is not None
        assert cropped.geometry is not None
        boxes = lesions.loc[lesions.image_id == row.image_id, ["x0", "y0", "x1", "y1"]]
        image = pack_images([to_tensor(cropped.crop)], patch, air=air)
        source = (int(row.source_height), int(row.source_width))
        boxes_of = [tuple(box) for box in boxes.itertuples(index=False)]
        cases.append(Case(str(row.patient_id), image, cropped.crop > 0, cropped.geometry, source, boxes_of))
    return cases


def curves(model: Network, case: Case, importance: np.ndarray) -> tuple[float, float]:
    """Mean probability while the kept patches are taken away, and while they are put back, the most important first."""
    (pixels,), (kept,), patch = case.image.images, case.image.patch_indices, case.image.patch
    order = kept[torch.as_tensor(np.argsort(-importance, kind="stable"))]
    smooth, width = smooth_tissue(pixels, patch), pixels.shape[2] // patch
    taken = []
    for fraction in FRACTIONS:
        mask = torch.zeros(pixels.shape[1] // patch * width)
        mask[order[: round(fraction * len(order))]] = 1
        taken.append(mask.unflatten(0, (-1, width)).repeat_interleave(patch, 0).repeat_interleave(patch, 1)[None])
    first = torch.stack(taken)
    with torch.no_grad():
        of = logit_function(model, case.image)
        return tuple(of(pixels * (1 - mask) + smooth * mask).sigmoid().mean().item() for mask in (first, 1 - first))  # type: ignore[return-value]


def interval(values: Sequence[float], patients: list[str]) -> Interval:
    rows = np.stack([np.array(values), np.ones(len(values))])
    replicates = resample(rows, lambda sums: sums[:1] / sums[1:], patients, replicates=2000, seed=0)
    (low,), (high,) = percentile_limits(replicates)
    return Interval(float(np.mean(values)), float(low), float(high))


def difference(figures: dict[str, list[float]], other: dict[str, list[float]]) -> list[float]:
    return [mine - its for mine, its in zip(figures["pointing"], other["pointing"], strict=True)]


def chances(model: Network, cases: list[Case]) -> list[np.ndarray]:
    """Of each case, deletion and insertion in random orders."""
    rng = np.random.default_rng(0)
    return [
        np.mean([curves(model, case, rng.random(len(case.image.patch_indices[0]))) for _ in range(ORDERS)], axis=0)
        for case in progress(cases, "random orders")
    ]


def point(model: Network, cases: list[Case], method: str) -> tuple[dict[str, list[float]], list[np.ndarray]]:
    """Whether each case's map points at the lesion, what it cost, and the maps."""
    found: dict[str, list[float]] = {"pointing": [], "seconds": []}
    maps = []
    for case in progress(cases, method):
        start = time.perf_counter()
        maps.append(explain(model, case.image, method).numpy())
        found["seconds"].append(time.perf_counter() - start)
        found["pointing"].append(case.hit(*case.heat(maps[-1]).peak_position()))
    return found, maps


def judge(
    model: Network,
    random_model: Network,
    cases: list[Case],
    maps: list[np.ndarray],
    chance: list[np.ndarray],
    method: str,
) -> dict[str, list[float]]:
    """How far each case's map is faithful to the model, and how far it depends on it."""
    found: dict[str, list[float]] = {"deletion": [], "insertion": [], "sanity": []}
    for case, values, (deletion, insertion) in zip(progress(cases, method), maps, chance, strict=True):
        kept = case.image.patch_indices[0].numpy()
        with_map = curves(model, case, values.flatten()[kept])
        found["deletion"].append(deletion - with_map[0])
        found["insertion"].append(with_map[1] - insertion)
        blind = explain(random_model, case.image, method).numpy()
        found["sanity"].append(spearmanr(values.flatten()[kept], blind.flatten()[kept]).statistic)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("release", type=Path)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--images", type=int, default=1000, help="at most this many images with cancer")
    parser.add_argument("--pointing", action="store_true", help="the pointing game alone, the quickest of the figures")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    model, package = load_package(arguments.package)
    torch.manual_seed(0)
    random_model = Network(model.config).eval()
    air = not package.get("packed", False)
    preprocessing = Preprocessing.from_json(package["preprocessing"])
    cases = read_cases(
        arguments.release, arguments.manifest, preprocessing, model.config.vit.patch, air, arguments.images
    )
    patients = [case.patient for case in cases]
    found: dict[str, dict[str, list[float]]] = {
        "random place": {"pointing": [case.chance() for case in cases]},
        "middle of the breast": {"pointing": [case.hit(*case.places().mean(axis=1)) for case in cases]},
        "brightest patch": {"pointing": [case.hit(*case.heat(case.brightness()).peak_position()) for case in cases]},
    }
    chance = [] if arguments.pointing else chances(model, cases)
    for method in METHODS:
        found[method], maps = point(model, cases, method)
        if not arguments.pointing:
            found[method] |= judge(model, random_model, cases, maps, chance, method)
    for figures in found.values():
        figures |= {f"- {other}": difference(figures, found[name]) for other, name in AGAINST.items()}
    results = {
        name: {figure: interval(values, patients) for figure, values in figures.items()}
        for name, figures in found.items()
    }
    print(f"{len(cases)} images with cancer of {len(set(patients))} test patients, {arguments.package}")
    for shown in (["pointing", *(f"- {other}" for other in AGAINST)], ["seconds", "deletion", "insertion", "sanity"]):
        print(f"{'':22}" + "".join(f"{figure:>26}" for figure in shown))
        for name, numbers in results.items():
            if shown[0] in numbers:
                print(f"{name:22}" + "".join(f"{numbers.get(figure, '')!s:>26}" for figure in shown))
    if arguments.json:
        write_atomic(
            arguments.json,
            to_json({name: {k: vars(v) for k, v in numbers.items()} for name, numbers in results.items()}),
        )


if __name__ == "__main__":
    main()
