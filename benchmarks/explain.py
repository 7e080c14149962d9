"""Measure whether heat maps point at what the model uses, on phantoms whose lesions are known. Prints a table.

python benchmarks/explain.py PACKAGE RELEASE MANIFEST [--images N] [--pointing] [--json FILE]

RELEASE is the output of `vitmodel synth`, and MANIFEST that of the run which trained PACKAGE (RUN/manifest.csv); its
test patients are used.

- Pointing game (Zhang et al. 2016, arXiv 1608.00507): how often the centre of the highest patch lies in the box of a
  lesion, on images with cancer. The baselines are the centre of the breast, the brightest patch and a random position
  (exact probability), each with the paired difference.
- Deletion and insertion (Petsiuk et al. 2018, arXiv 1806.07421): mean probability while patches are smoothed away, or
  restored in a smoothed breast, the most important first. Reported as the difference from random orders of the same
  image; positive values favour the map.
- Sanity check (Adebayo et al. 2018, arXiv 1810.03292): Spearman correlation with the map of the same model with random
  weights; 0 is ideal.

The 95 % intervals are from 2,000 resamplings of patients. All figures use the same resamplings, so that differences are
paired.
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
ORDERS = 3  # number of random orders per image
BASELINES = {"random": "random place", "middle": "middle of the breast", "brightest": "brightest patch"}


@dataclass(frozen=True, eq=False)
class Case:
    """One image with cancer: the input of the model and the positions of the lesions."""

    patient: str
    image: PackedBatch
    tissue: np.ndarray
    geometry: CropGeometry
    source: tuple[int, int]
    boxes: list[tuple[float, ...]]

    def heat(self, values: np.ndarray) -> HeatMap:
        """Return a heat map of this image with `values` per patch."""
        return HeatMap(
            values=values, tissue=self.tissue, geometry=self.geometry, patch=self.image.patch, source_shape=self.source
        )

    def hit(self, x: float, y: float) -> float:
        """Return 1 if a position in the source image lies in the box of a lesion, else 0."""
        return float(any(x0 <= x < x1 and y0 <= y < y1 for x0, y0, x1, y1 in self.boxes))

    def chance(self) -> float:
        """Return the probability that a random position of the breast lies in the box of a lesion."""
        return float(np.mean([self.hit(x, y) for x, y in self.breast_positions().T]))

    def brightness(self) -> np.ndarray:
        """Return the mean of each patch that is not air, as a map."""
        (pixels,), (kept,), patch = self.image.images, self.image.patch_indices, self.image.patch
        means = torch.nn.functional.avg_pool2d(pixels, patch).flatten()
        return self.image.scatter_to_grid([means[kept]])[0].numpy()

    def breast_positions(self) -> np.ndarray:
        """Return the positions `(2, K)` of all pixels of the breast in the source image."""
        rows, columns = np.nonzero(self.tissue)
        return self.geometry.to_source() @ np.stack([columns, rows, np.ones_like(rows)])


def read_cases(
    release: Path, manifest: Path, preprocessing: Preprocessing, patch: int, air: bool, limit: int
) -> list[Case]:
    """Return up to `limit` test images with cancer."""
    lesions = pd.read_csv(release / "lesions.csv", dtype={"image_id": str}).query("cancer == 1")
    table = read_manifest(manifest).query("split == 'test'")
    table = table[table.image_id.isin(lesions.image_id) & (table.status != "refused")]
    cases = []
    for row in table.head(limit).itertuples():
        cropped = crop_image(SourceImage(Path(str(row.source_path))), preprocessing)
        assert cropped.crop is not None
        assert cropped.geometry is not None
        boxes = lesions.loc[lesions.image_id == row.image_id, ["x0", "y0", "x1", "y1"]]
        image = pack_images([to_tensor(cropped.crop)], patch, air=air)
        source = (int(row.source_height), int(row.source_width))
        lesion_boxes = [tuple(box) for box in boxes.itertuples(index=False)]
        cases.append(Case(str(row.patient_id), image, cropped.crop > 0, cropped.geometry, source, lesion_boxes))
    return cases


def curves(model: Network, case: Case, importance: np.ndarray) -> tuple[float, float]:
    """Return the mean probability while patches are deleted, and while they are inserted, the most important first."""
    (pixels,), (kept,), patch = case.image.images, case.image.patch_indices, case.image.patch
    order = kept[torch.as_tensor(np.argsort(-importance, kind="stable"))]
    smooth = smooth_tissue(pixels, patch)
    width = pixels.shape[2] // patch
    masks = []
    for fraction in FRACTIONS:
        grid = torch.zeros(pixels.shape[1] // patch * width)
        grid[order[: round(fraction * len(order))]] = 1
        masks.append(grid.unflatten(0, (-1, width)).repeat_interleave(patch, 0).repeat_interleave(patch, 1)[None])
    most_important = torch.stack(masks)
    with torch.no_grad():
        logits = logit_function(model, case.image)

        def mean_probability(smoothed: torch.Tensor) -> float:
            return logits(pixels * (1 - smoothed) + smooth * smoothed).sigmoid().mean().item()

        return mean_probability(most_important), mean_probability(1 - most_important)


def interval(values: Sequence[float], patients: list[str]) -> Interval:
    """Return the mean with its 95 % interval over patients."""
    rows = np.stack([np.array(values), np.ones(len(values))])
    replicates = resample(rows, lambda sums: sums[:1] / sums[1:], patients, replicates=2000, seed=0)
    (low,), (high,) = percentile_limits(replicates)
    return Interval(float(np.mean(values)), float(low), float(high))


def difference(figures: dict[str, list[float]], other: dict[str, list[float]]) -> list[float]:
    """Return the paired differences between two results of the pointing game."""
    return [first - second for first, second in zip(figures["pointing"], other["pointing"], strict=True)]


def random_orders(model: Network, cases: list[Case]) -> list[np.ndarray]:
    """Return the mean deletion and insertion of each case in random orders."""
    rng = np.random.default_rng(0)
    means = []
    for case in progress(cases, "random orders"):
        count = len(case.image.patch_indices[0])
        means.append(np.mean([curves(model, case, rng.random(count)) for _ in range(ORDERS)], axis=0))
    return means


def point(model: Network, cases: list[Case], method: str) -> tuple[dict[str, list[float]], list[np.ndarray]]:
    """Return whether the map of each case points at a lesion, its cost, and the maps.

    The cost is given in seconds and in forward passes of the same image.
    """
    figures: dict[str, list[float]] = {"pointing": [], "seconds": [], "forward passes": []}
    with torch.no_grad():
        model(cases[0].image)  # the first call loads what later calls share
    explain(model, cases[0].image, method)
    maps = []
    for case in progress(cases, method):
        start = time.perf_counter()
        with torch.no_grad():
            model(case.image)
        forward = time.perf_counter() - start
        start = time.perf_counter()
        maps.append(explain(model, case.image, method).numpy())
        figures["seconds"].append(time.perf_counter() - start)
        figures["forward passes"].append(figures["seconds"][-1] / forward)
        figures["pointing"].append(case.hit(*case.heat(maps[-1]).peak_position()))
    return figures, maps


def judge(
    model: Network,
    random_model: Network,
    cases: list[Case],
    maps: list[np.ndarray],
    chance: list[np.ndarray],
    method: str,
) -> dict[str, list[float]]:
    """Return how faithful the map of each case is to the model, and how much it depends on the weights."""
    figures: dict[str, list[float]] = {"deletion": [], "insertion": [], "sanity": []}
    for case, values, (deletion, insertion) in zip(progress(cases, method), maps, chance, strict=True):
        kept = case.image.patch_indices[0].numpy()
        map_deletion, map_insertion = curves(model, case, values.flatten()[kept])
        figures["deletion"].append(deletion - map_deletion)
        figures["insertion"].append(map_insertion - insertion)
        random_values = explain(random_model, case.image, method).numpy()
        figures["sanity"].append(spearmanr(values.flatten()[kept], random_values.flatten()[kept]).statistic)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("release", type=Path)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--images", type=int, default=1000, help="maximum number of images with cancer")
    parser.add_argument("--pointing", action="store_true", help="only the pointing game, which is the fastest figure")
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
    figures: dict[str, dict[str, list[float]]] = {
        "random place": {"pointing": [case.chance() for case in cases]},
        "middle of the breast": {"pointing": [case.hit(*case.breast_positions().mean(axis=1)) for case in cases]},
        "brightest patch": {"pointing": [case.hit(*case.heat(case.brightness()).peak_position()) for case in cases]},
    }
    chance = [] if arguments.pointing else random_orders(model, cases)
    for method in METHODS:
        figures[method], maps = point(model, cases, method)
        if not arguments.pointing:
            figures[method] |= judge(model, random_model, cases, maps, chance, method)
    for values in figures.values():
        values |= {f"- {key}": difference(values, figures[baseline]) for key, baseline in BASELINES.items()}
    results: dict[str, dict[str, Interval]] = {}
    for name, by_figure in figures.items():
        results[name] = {figure: interval(values, patients) for figure, values in by_figure.items()}
    print(f"{len(cases)} images with cancer of {len(set(patients))} test patients, {arguments.package}")
    show(results, ["pointing", *(f"- {key}" for key in BASELINES)])
    show(results, ["seconds", "forward passes", "deletion", "insertion", "sanity"])
    if arguments.json:
        plain = {name: {key: vars(value) for key, value in numbers.items()} for name, numbers in results.items()}
        write_atomic(arguments.json, to_json(plain))


def show(results: dict[str, dict[str, Interval]], columns: list[str]) -> None:
    """Print the results that have the first of `columns`."""
    print(f"{'':22}" + "".join(f"{column:>26}" for column in columns))
    for name, numbers in results.items():
        if columns[0] in numbers:
            print(f"{name:22}" + "".join(f"{numbers.get(column, '')!s:>26}" for column in columns))


if __name__ == "__main__":
    main()
