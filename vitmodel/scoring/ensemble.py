"""Ensembles of model packages: packed images to logits, probabilities and explanations."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from scipy.special import expit

from vitmodel.config import PredictorConfig
from vitmodel.errors import UsageError
from vitmodel.metrics.scored_units import aggregate, mean_logits
from vitmodel.model.device import resolve_device
from vitmodel.model.explain import explain
from vitmodel.model.network import Network
from vitmodel.model.package import TENSORS_FILE, TYPICALITY_FILE
from vitmodel.model.package_check import content_digest
from vitmodel.model.packed_batch import PackedBatch, concat_packs
from vitmodel.scoring.auxiliary import AuxiliaryEnsemble
from vitmodel.scoring.loaded_package import LoadedPackage
from vitmodel.utils import sha256_file


class Ensemble:
    """One or more model packages whose probabilities are averaged.

    Each package averages the logits of an image and, with flip averaging, of its flip, and applies its own
    calibration. The ensemble's probability and threshold are the means over its packages.

    Shapes: I images, L levels (image and, with exam fusion, breast), A auxiliary outputs, M packages.

    Args:
        config: The packages, the device and the runtime.

    Raises:
        VitmodelError: A package cannot be loaded.
        UsageError: The packages cannot be combined, because they prepare images or aggregate scores differently.
    """

    def __init__(self, config: PredictorConfig) -> None:
        self.runtime = config.runtime
        self.device = torch.device(resolve_device(config.device if config.runtime == "torch" else "cpu"))
        self.packages = [LoadedPackage(folder, config, self.device) for folder in (config.package, *config.ensemble)]
        first = self.packages[0]
        for other in self.packages[1:]:
            differing = [name for name, value in first.shared_settings.items() if other.shared_settings[name] != value]
            if differing:
                raise UsageError(
                    f"ensemble: {other.folder} differs from {first.folder} in {', '.join(differing)}; "
                    "combine packages with the same settings"
                )
        self.model: Network = first.models[0]
        self.package = first.package
        self.label = first.label
        self.preprocessing = first.preprocessing
        self.packed = first.packed
        self.flip = first.flip
        self.calibration_level = first.calibration_level
        self.aggregation = first.aggregation
        self.fused = self.model.exam is not None
        """Whether the network itself scores breasts, from all images of an exam."""
        self.levels = 1 + self.fused
        """Number of logits per image: its own and, with exam fusion, its breast's."""
        self.auxiliary = AuxiliaryEnsemble(tuple(package.auxiliary for package in self.packages))
        self.outputs = self.levels + self.auxiliary.count
        """Number of outputs per image, L + A: the logits, then the outputs of the auxiliary heads."""
        self.calibrates_breasts = self.aggregation in ("mean_logit", "fusion")
        """Whether a breast's logits are averaged before calibration; older packages aggregate probabilities."""
        self.patient_aggregation = "noisy_or" if self.fused else "max"
        self.threshold = float(np.mean([package.threshold for package in self.packages]))
        self.prevalence = float(np.mean([package.calibration.prevalence for package in self.packages]))
        # now, because the networks in memory stay as they are when the files are replaced
        self._fingerprint = self._compute_fingerprint()

    def explain_missing_typicality(self) -> str:
        """Return why typicality is unavailable, so that no image is refused as atypical; '' if it is available."""
        if self.runtime != "torch":
            return f"typicality is unavailable with --runtime {self.runtime}: no image is refused as atypical"
        without = [str(package.folder) for package in self.packages if not package.typicalities]
        if not without:
            return ""
        return (
            f"typicality is unavailable, so that no image is refused as atypical: {', '.join(without)} has none, "
            "because an earlier version wrote it or fewer than 10 training or validation images were there"
        )

    def fingerprint(self) -> str:
        """Return the hashes and settings that, together with an image, determine its score."""
        return self._fingerprint

    def _compute_fingerprint(self) -> str:
        digests = []
        for package in self.packages:
            digests += [sha256_file(package.folder / TENSORS_FILE), content_digest(package.folder)]
            digests += [sha256_file(path) for path in package.onnx]
            if package.typicalities:
                digests.append(sha256_file(package.folder / TYPICALITY_FILE))
        return " ".join([*(digest[:16] for digest in digests), f"flip={self.flip}", self.runtime])

    def logits(self, packs: Sequence[PackedBatch]) -> np.ndarray:
        """Return the outputs `(I, L + A, M)` for I images; see `judge`."""
        return self.judge(packs)[0]

    def judge(self, packs: Sequence[PackedBatch]) -> tuple[np.ndarray, np.ndarray]:
        """Return the outputs `(I, L + A, M)` and the typicality `(I,)` of I images.

        The outputs are averaged with those of the flip if the packs hold both. The breast's logit of an image outside
        an exam, such as a copy, is NaN. Typicality is that of the unflipped image, the geometric mean over packages;
        NaN if a package has none.
        """
        if not packs:
            return np.empty((0, self.outputs, len(self.packages))), np.empty(0)
        batch = concat_packs(packs).to(self.device)
        with torch.inference_mode():
            judged = [package.judge(batch) for package in self.packages]
        by_view = np.stack([self._align(outputs, number) for number, (outputs, _) in enumerate(judged)], axis=-1)
        logits = by_view.reshape(len(packs), -1, *by_view.shape[1:]).mean(axis=1, dtype=np.float64)
        if self.fused:
            logits[[pack.metadata[0].breast < 0 for pack in packs], 1] = np.nan
        typicality = np.exp(np.mean([np.log(typicality) for _, typicality in judged], axis=0))
        return logits, typicality.reshape(len(packs), -1)[:, 0]

    @cached_property
    def _is_computed(self) -> np.ndarray:
        """Which outputs of an image `(L + A, M)` the networks compute; a package lacks heads that only others have."""
        columns = []
        for number, package in enumerate(self.packages):
            own = np.zeros((1, self.levels + package.models[0].config.auxiliary_outputs))
            columns.append(np.isfinite(self._align(own, number)[0]))
        return np.stack(columns, axis=1)

    def is_finite(self, logits: np.ndarray, has_breast: bool) -> bool:
        """Return whether an image's outputs `(L + A, M)` are finite, except those that no network computes.

        Args:
            logits: What `logits` returned for the image.
            has_breast: Whether exam fusion gave a logit of its breast; the image is not a copy.
        """
        computed = self._is_computed
        if self.fused and not has_breast:
            computed = computed.copy()
            computed[1] = False
        return bool(np.isfinite(logits[computed]).all())

    def _align(self, outputs: np.ndarray, number: int) -> np.ndarray:
        """Return the outputs `(B, L + A)` of one package for B images; NaN for a head that only others have."""
        auxiliary = self.auxiliary.align(outputs[:, self.levels :], number)
        return np.concatenate([outputs[:, : self.levels], auxiliary], axis=1)

    def probability(self, logits: np.ndarray) -> np.ndarray:
        """Return the calibrated probabilities `(N,)` of logits `(N, M)`: the mean over packages."""
        calibrated = [
            package.calibration.apply(column) for package, column in zip(self.packages, logits.T, strict=True)
        ]
        return np.mean(calibrated, axis=0)

    @property
    def has_intervals(self) -> bool:
        """Whether all packages store how uncertain the calibration of a breast's logits is."""
        return self.calibrates_breasts and all(package.calibration_band for package in self.packages)

    def probability_limits(self, logits: np.ndarray) -> np.ndarray:
        """Return the calibration interval `(N, 2)` of breasts' mean logits `(N, M)`: the mean over packages.

        The mean of the limits is as wide as if the errors of all packages were alike, so it is not too narrow.
        """
        limits = []
        for package, column in zip(self.packages, logits.T, strict=True):
            assert package.calibration_band is not None
            limits.append(package.calibration_band.limits(column, package.calibration.apply(column)))
        return np.mean(limits, axis=0)

    def calibrate(self, logits: np.ndarray) -> np.ndarray:
        """Return score and probability `(N, 2)` of logits `(N, M)`: the mean over packages, raw and calibrated."""
        return np.stack([expit(logits).mean(axis=1), self.probability(logits)], axis=1)

    def breast_scores(self, image_scores: np.ndarray, logits: np.ndarray, breasts: pd.Series) -> np.ndarray:
        """Return score and probability of each image's breast, `(N, 2)`.

        Args:
            image_scores: Score and probability of each image, `(N, 2)`; used by packages that aggregate probabilities.
            logits: Logits of each image or, with exam fusion, of its breast, `(N, M)`. Their mean over a breast is
                calibrated.
            breasts: The breast of each image, `(N,)`.
        """
        if self.calibrates_breasts:
            values = self.calibrate(mean_logits(logits, breasts))
        else:
            values = np.stack([aggregate(column, breasts, self.aggregation)[1] for column in image_scores.T], axis=1)
        return values[np.unique(breasts, return_inverse=True)[1]]

    def explain(self, pack: PackedBatch, method: str) -> np.ndarray:
        """Return the contribution of each patch `(h, w)` to the score of the pack's first image.

        Contributions are averaged over all models; air is NaN. `model.explain.method_named(method)` has the unit.
        """
        image = next(iter(pack)).to(self.device)
        models = [model for package in self.packages for model in package.models]
        return np.mean([explain(model, image, method).float().cpu().numpy() for model in models], axis=0)
